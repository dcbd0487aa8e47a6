"""Two branches that both changed results are merged as docs/team.md says: merge, `dvc repro`, commit."""

from pathlib import Path

import pytest
from support.project import Project, copy


@pytest.fixture(scope="module")
def branches(two_results: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """On `main`, another batch size of evaluate; on `slow`, another learning rate of train. Both ran."""
    project = copy(two_results, tmp_path_factory.mktemp("branches"))
    project.run("git", "checkout", "-qb", "slow")
    project.commit("Learn slowly")
    project.run("git", "checkout", "-q", "main")
    project.set("evaluate.batch_size", 50)
    assert project.repro() == ["evaluate"]
    project.commit("Evaluate 50 images at a time")
    return project


def conflicts(project: Project, *command: str) -> list[str]:
    """The files in conflict after a command of git that must not succeed."""
    assert project.run("git", *command, check=False).returncode != 0
    return project.run("git", "diff", "--name-only", "--diff-filter=U").stdout.split()


def assert_whole(project: Project) -> None:
    """The lock is of the params and the code beside it, as committed, and MLflow agrees."""
    assert project.dvc("status").stdout == "Data and pipelines are up to date.\n"
    assert project.run("git", "status", "--porcelain").stdout == ""
    assert "agree" in project.command("audit").stdout


@pytest.mark.parametrize(("ours", "theirs"), [("main", "slow"), ("slow", "main")])
def test_what_neither_side_ran_is_run_after_a_merge_and_the_rest_comes_from_the_run_cache(
    ours: str, theirs: str, branches: Project, tmp_path: Path
) -> None:
    project = copy(branches, tmp_path)
    project.run("git", "checkout", "-q", ours)
    project.dvc("checkout")
    assert conflicts(project, "merge", theirs) == ["dvc.lock"]
    assert "<<<<<<<" not in (project.folder / "dvc.lock").read_text()
    assert project.repro() == ["evaluate"], "neither side evaluated the slow model 50 images at a time"
    project.run("git", "add", "dvc.lock")
    project.run("git", "commit", "-q", "--no-edit")
    assert_whole(project)
    assert project.md5s()["models/lenet.safetensors"] in project.run("git", "show", "slow:dvc.lock").stdout


def test_if_the_params_conflict_one_side_is_taken_and_its_results_come_from_the_run_cache(
    branches: Project, tmp_path: Path
) -> None:
    project = copy(branches, tmp_path)
    project.run("git", "checkout", "-qb", "other", "slow~1")
    project.set("train.lr", 0.0002)
    project.repro()
    project.commit("Learn slowly, too")
    assert conflicts(project, "merge", "slow") == ["dvc.lock", "params.yaml"]
    project.run("git", "checkout", "--theirs", "params.yaml")
    assert project.repro() == []
    project.run("git", "add", "dvc.lock", "params.yaml")
    project.run("git", "commit", "-q", "--no-edit")
    assert_whole(project)
    assert project.run("git", "diff", "--name-only", "slow").stdout == ""


def test_a_rebase_is_resolved_like_a_merge(branches: Project, tmp_path: Path) -> None:
    project = copy(branches, tmp_path)
    project.run("git", "checkout", "-q", "slow")
    project.dvc("checkout")
    assert conflicts(project, "rebase", "main") == ["dvc.lock"]
    assert project.repro() == ["evaluate"]
    project.run("git", "add", "dvc.lock")
    project.run("git", "-c", "core.editor=true", "rebase", "--continue")
    assert_whole(project)
