"""The pipeline works in odd folders, as an ordinary user, without a home, a terminal or git, and after a move."""

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.project import STAGES, Project, ran
from support.store import Store

ODD = "pfad mit Leerzeichen äöü 100% %41#b"


def as_ordinary_user() -> list[str]:
    """A prefix that takes root's rights from a command; it keeps root's id, since only root may reach Python."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root cannot give up its rights here (Debian: apt-get install util-linux)")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def assert_plain(result: subprocess.CompletedProcess[str]) -> None:
    """Assert that the output has no colours, progress bars or carriage returns."""
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|%\|", result.stdout + result.stderr), result


def places(project: Project) -> set[str]:
    """The locations of artifacts in MLflow's database, up to mlartifacts."""
    with contextlib.closing(sqlite3.connect(project.folder / "mlflow.db")) as database:
        found = database.execute(
            "SELECT artifact_uri FROM runs UNION SELECT artifact_location FROM logged_models UNION "
            "SELECT artifact_location FROM experiments WHERE name != 'Default' UNION "
            "SELECT storage_location FROM model_versions"
        ).fetchall()
    return {re.sub("(/mlartifacts).*", r"\1", location) for (location,) in found}


def assert_opens(project: Project, picture: Path, *before: str) -> None:
    """Assert that after the commands `before`, MLflow's record is whole: every artifact, and the model."""
    predict = f"predict --model models:/fashion-mnist-lenet@champion '{picture}'"
    ends = project.commands(*before, "audit", predict)
    assert {end.returncode for end in ends.values()} == {0}, ends
    assert "top 3" in ends[predict].stdout
    assert places(project) == {(project.folder / "mlartifacts").as_uri()}


def test_the_pipeline_runs_anywhere_and_survives_a_move_and_a_copy(new_project: Project, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("L", (28, 28)).save(picture)
    project = Project(new_project.folder.rename(tmp_path / ODD))
    closed = project.folder / "closed"
    closed.mkdir(mode=0o500)
    plain = ["env", "-u", "HOME", *as_ordinary_user(), *(["setsid", "--wait"] if shutil.which("setsid") else [])]
    assert project.run(*plain, "touch", "closed/file", check=False).returncode != 0, "an ordinary user may not"
    closed.rmdir()

    result = project.run(*plain, "dvc", "repro")
    assert set(ran(result.stdout)) == {*STAGES}
    assert "warning" not in result.stderr
    assert_plain(result)
    assert_opens(project, picture, "promote")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ODD, picture.name]), "nothing beside them"

    moved = Project(project.folder.rename(tmp_path / "umgezogen?"))
    assert_opens(moved, picture)

    copied = Project(tmp_path / "copy")
    shutil.copytree(moved.folder, copied.folder, symlinks=True)
    shutil.rmtree(moved.folder / "mlartifacts")
    assert_opens(copied, picture)
    assert places(moved) == {(moved.folder / "mlartifacts").as_uri()}, "the original keeps its own"


def test_nothing_stays_in_the_folder_for_temporary_files(small: Project, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    place = str(tmp_path / "temporary")
    small.dvc("repro", "--force", TMPDIR=place)
    small.dvc("repro", "--force", warns=True, MLFLOW_TRACKING_URI="http://127.0.0.1:9", TMPDIR=place)
    small.dvc("exp", "run", "--name", "high", "--set-param", "lr=0.9", TMPDIR=place)
    for command in ("sync", "audit", "lineage score.json", "sync --all"):
        small.command(*command.split(), TMPDIR=place)
    assert [*(tmp_path / "temporary").iterdir()] == []


def test_artifacts_elsewhere_stay_there_if_the_project_moves(project: Project, tmp_path: Path) -> None:
    elsewhere = (tmp_path / "project/mlartifacts-of-mine").as_uri()
    experiment_id = Store(project).client.create_experiment("mine", artifact_location=elsewhere)
    run = Store(project).client.create_run(experiment_id)
    moved = Project(project.folder.rename(tmp_path / "moved"))
    moved.command("sync")
    assert Store(moved).client.get_run(run.info.run_id).info.artifact_uri == run.info.artifact_uri
    train = Store(moved).run("train")
    assert train.info.artifact_uri == (moved.folder / "mlartifacts" / train.info.run_id / "artifacts").as_uri()


def test_a_git_worktree_has_a_store_of_its_own_and_shares_the_cache(project: Project, tmp_path: Path) -> None:
    tree = Project(tmp_path / "tree")
    project.run("git", "worktree", "add", "-q", "-b", "side", str(tree.folder))
    tree.dvc("cache", "dir", "--local", str(project.folder / ".dvc/cache"))
    tree.set("evaluate.batch_size", 50)
    assert tree.repro() == ["evaluate"]
    evaluate = Store(tree).run("evaluate")
    assert evaluate.data.tags["mlflow.source.git.commit"] == project.run("git", "rev-parse", "HEAD").stdout.strip()
    assert len(Store(project).runs("evaluate")) == 1


@pytest.fixture
def without_git(tmp_path: Path) -> str:
    """A PATH with the environment's and the shell's programs, but without git."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "env", "make", "uname"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    path = f"{Path(sys.executable).parent}:{programs}"
    assert shutil.which("git", path=path) is None
    return path


def test_without_git_stages_run_and_what_needs_it_says_so_in_one_line(
    project: Project, without_git: str, tmp_path: Path
) -> None:
    project.set("evaluate.batch_size", 50)
    assert project.repro(PATH=without_git) == ["evaluate"]
    train, evaluate = Store(project).run("train"), Store(project).runs("evaluate")[0]
    assert "mlflow.source.git.commit" not in evaluate.data.tags
    for command in (
        ["python", "-m", "commands.replicate", "--seeds", "1"],
        ["python", "-m", "dvc_mlflow", "lineage", train.info.run_id, "--restore", str(tmp_path / "again")],
        ["make", "repro"],
    ):
        failed = project.run(*command, check=False, PATH=without_git)
        assert failed.returncode != 0
        assert failed.stderr.startswith("error: expected git, found none; install it")
        assert [line for line in failed.stderr.splitlines()[1:] if not line.startswith("make: ")] == []
