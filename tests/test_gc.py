"""`dvc gc` with what people usually type breaks neither MLflow's record, nor sync, audit and lineage."""

import shutil
from pathlib import Path

import pytest
from support.project import Project, copy
from support.store import Store
from support.team import Remote, found_team

from benchmarks.servers import free_port

MODEL = "models/lenet.safetensors"


@pytest.fixture(scope="module")
def full(two_results: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A committed result, an experiment's, and one that is neither, and a DVC remote that has them all."""
    parent = tmp_path_factory.mktemp("full")
    project = copy(two_results, parent)
    project.run("git", "checkout", "-q", "params.yaml", "dvc.lock")
    (parent / "remote").mkdir()
    found_team(project, Remote(str(parent / "remote"), {}, {}), parent)
    project.set("evaluate.batch_size", 50)
    assert project.repro() == ["evaluate"]
    project.run("git", "checkout", "-q", "params.yaml", "dvc.lock")
    assert project.repro() == []
    project.command("share", "push")
    return project


@pytest.fixture
def project(full: Project, tmp_path: Path) -> Project:
    """A copy of that, with a remote of its own."""
    project = copy(full, tmp_path)
    shutil.copytree(full.folder.parent / "remote", tmp_path / "remote")
    project.dvc("remote", "modify", "--local", "team", "url", str(tmp_path / "remote"))
    return project


def note(project: Project) -> str:
    """What lineage adds to the experiment's model."""
    run = Store(project).runs("train")[0]
    assert run.data.tags["dvc.exp_name"] == "slow"
    (line,) = [one for one in project.command("lineage", run.info.run_id).stdout.splitlines() if f"  {MODEL}" in one]
    return line.partition(MODEL)[2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--all-experiments", ""),
        ("--all-commits --all-experiments", ""),
        ("--all-branches --all-tags", "  (not here; the remote team has it)"),
        ("--workspace", "  (not here; the remote team has it)"),
        ("--workspace --not-in-remote", "  (not here; the remote team has it)"),
        ("--workspace --cloud", "  (gone: neither here nor in the remote team)"),
    ],
)
def test_after_gc_sync_and_audit_are_clean_and_lineage_says_where_bytes_are(
    options: str, expected: str, project: Project
) -> None:
    project.dvc("gc", "--force", *options.split())
    ends = project.commands("sync --all", "audit --all")
    assert {end.returncode for end in ends.values()} == {0}, ends
    assert note(project) == expected


def test_a_remote_that_cannot_be_asked_is_named_by_lineage(project: Project) -> None:
    project.dvc("gc", "--force", "--workspace")
    project.dvc("remote", "modify", "--local", "team", "url", "s3://team/results")
    project.dvc("remote", "modify", "--local", "team", "endpointurl", f"http://127.0.0.1:{free_port()}")
    key = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    run = Store(project).runs("train")[0]
    shown = project.command("lineage", run.info.run_id, check=True, **key).stdout
    assert f"{MODEL}  (not here; the remote team cannot be asked: Could not connect to the endpoint URL: " in shown


def test_what_is_gone_everywhere_is_made_again_by_a_restore(project: Project, tmp_path: Path) -> None:
    project.dvc("gc", "--force", "--workspace", "--cloud")
    run = Store(project).runs("train")[0]
    shown = project.command("lineage", run.info.run_id, "--restore", str(tmp_path / "again")).stdout
    assert f"verified {run.data.tags[f'dvc.outs.{MODEL}']}  {MODEL}" in shown
