"""From a row in MLflow back to the bytes, and from bytes to the rows."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.project import ROOT, Pipeline, Project, copy
from support.store import Store

from stages.stage import md5


def lineage(project: Project, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return project.command("lineage", *arguments, check=check)


@pytest.fixture(scope="module")
def changed_project(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after a second run, from a tree with a changed param and a new module, and a third."""
    project = copy(finished_project, tmp_path_factory.mktemp("changed"))
    project.set("train.lr", 0.02)
    (project.folder / "stages/extra.py").write_text("# not in git yet\n")
    # Settings that turn a diff into one that `git apply` refuses
    for key, value in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "echo")):
        project.run("git", "config", key, value)
    project.repro()
    (project.folder / "stages/extra.py").unlink()
    project.run("git", "checkout", "-q", ".")
    project.dvc("checkout")
    return project


def test_a_run_shows_its_commit_hashes_and_command(finished_project: Project) -> None:
    run = Store(finished_project).run("train")
    shown = lineage(finished_project, run.info.run_id).stdout
    assert f"{run.data.tags['mlflow.source.git.commit']}, clean" in shown
    assert run.data.tags["dvc.cmd"] in shown
    for path, digest in finished_project.md5s().items():
        assert (f"made     {digest}  {path}" in shown) == (path in Pipeline(ROOT).outs("train"))
    assert f"restore  dvc-mlflow lineage {run.info.run_id} --restore DIR" in shown


def test_the_bytes_of_a_clean_run_come_back_in_a_new_folder(finished_project: Project, tmp_path: Path) -> None:
    run = Store(finished_project).run("evaluate")
    shown = lineage(finished_project, run.info.run_id, "--restore", str(tmp_path / "again")).stdout
    pipeline = Pipeline(ROOT)
    assert shown.count("verified ") == len(pipeline.deps("evaluate")) + len(pipeline.outs("evaluate"))
    for path, digest in finished_project.md5s().items():
        assert md5(tmp_path / "again" / path) == digest


def test_the_bytes_of_a_dirty_run_come_back_by_its_patch(changed_project: Project, tmp_path: Path) -> None:
    dirty, clean = Store(changed_project).runs("train")
    assert (dirty.data.tags["git.dirty"], clean.data.tags["git.dirty"]) == ("true", "false")
    folder = tmp_path / "with spaces and ü"
    shown = lineage(changed_project, dirty.info.run_id, "--restore", str(folder)).stdout
    path = "models/lenet.safetensors"
    assert f"verified {dirty.data.tags[f'dvc.outs.{path}']}  {path}" in shown
    assert md5(folder / path) != md5(changed_project.folder / path)
    assert (folder / "stages/extra.py").read_text() == "# not in git yet\n"


@pytest.mark.parametrize("by", ["path", "copy", "md5"])
def test_a_file_leads_to_the_runs_that_made_and_read_it(by: str, finished_project: Project, tmp_path: Path) -> None:
    store, path = Store(finished_project), "models/lenet.safetensors"
    elsewhere = str(shutil.copy(finished_project.folder / path, tmp_path / "model"))
    target = {"path": path, "copy": elsewhere, "md5": finished_project.md5s()[path]}[by]
    lines = lineage(finished_project, target).stdout.splitlines()
    assert lines[0] == f"md5 {finished_project.md5s()[path]}"
    assert [line.split()[:3] for line in lines[1:]] == [
        ["made", "by", store.run("train").info.run_id],
        ["read", "by", store.run("evaluate").info.run_id],
    ]


def test_a_restore_that_differs_is_refused(finished_project: Project, tmp_path: Path) -> None:
    project = copy(finished_project, tmp_path)
    store = Store(project)
    run = store.run("train")
    artifact = project.folder / "mlartifacts" / run.info.run_id / "artifacts/execution.json"
    artifact.write_text(artifact.read_text().replace(project.md5s()["metrics/train.json"], "0" * 32))
    result = lineage(project, run.info.run_id, "--restore", str(tmp_path / "again"), check=False)
    assert result.returncode == 1
    assert f"expected {'0' * 32}  metrics/train.json, found " in result.stderr
    assert "error: 1 file(s) differ from run" in result.stderr
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("arguments", [["nonsense"], ["0" * 32], ["params.yaml"], ["x", "--restore", "."]])
def test_an_unknown_target_is_refused_in_one_line(arguments: list[str], finished_project: Project) -> None:
    result = lineage(finished_project, *arguments, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: expected ")
