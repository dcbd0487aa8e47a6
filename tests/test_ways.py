"""However DVC got its results, MLflow shows the right record: a test for each row of the table in docs/mlflow.md."""

import json
import time
from pathlib import Path

import pytest
from mlflow.entities import Run
from support.project import ROOT, Project, copy, ran
from support.store import Store

from stages.stage import md5

WAYS = {
    "`dvc repro`": "a run for each stage that ran",
    "`dvc repro` after a revert, from the run cache": "no new run: existing runs cover these outputs",
    "`dvc repro` after a kill": "the killed run continues, with the tag `resumed`",  # tests/test_kills.py
    "`dvc exp run`": "a run for each stage that ran, under the experiment's name, with its baseline commit",
    "`dvc exp run --temp`, `--queue` with `dvc queue start -j 4`": "the same, in the real project's store",
    "`dvc exp apply`": "no new run: the experiment's runs cover these outputs",
    "`dvc pull` in a fresh clone": "a `restored` run for each stage, at the next stage that runs or `make sync`",
    "anything, then a new store": "a `restored` run for each stage, at the next stage that runs or `make sync`",
}


def test_the_docs_have_this_table() -> None:
    page = (ROOT / "docs/mlflow.md").read_text(encoding="utf-8")
    for way, shown in WAYS.items():
        assert f"| {way} | {shown} |" in page


def agree(project: Project) -> bool:
    return project.command("audit", check=False).returncode == 0


def all_runs(store: Store) -> list[str]:
    return sorted(run.info.run_id for run in store.client.search_runs([store.experiment_id]))


def is_complete(store: Store, train: Run) -> bool:
    """Whether a train run has its params, curves, model and test metrics, and the evaluate run below it."""
    children = [run for run in store.runs("evaluate") if run.data.tags["mlflow.parentRunId"] == train.info.run_id]
    return (
        train.info.status == "FINISHED"
        and len(store.curve(train, "train_loss")) == int(train.data.params["train.epochs"])
        and len(train.outputs.model_outputs if train.outputs else []) == 1
        and [run.data.metrics["test_accuracy"] for run in children] == [train.data.metrics["test_accuracy"]]
        and [run.info.status for run in children] == ["FINISHED"]
    )


def test_repro_and_repro_after_a_revert(project: Project) -> None:
    """Another rate retrains, and DVC's diffs show it; going back restores the former bytes without training."""
    store, metrics_file = Store(project), project.folder / "metrics/evaluate.json"
    first, before = project.md5s(), json.loads(metrics_file.read_text())
    project.set("train.lr", 1e-5)
    assert project.repro() == ["train", "evaluate"]
    assert [run.data.params["train.lr"] for run in store.runs("train")] == ["1e-05", "0.01"]
    assert all(is_complete(store, run) for run in store.runs("train"))
    assert agree(project)
    rows = all_runs(store)

    after = json.loads(metrics_file.read_text())
    assert after["test_accuracy"] < before["test_accuracy"]
    (changes,) = json.loads(project.dvc("params", "diff", "--json").stdout).values()
    assert changes == {"train.lr": {"old": 0.01, "new": 1e-5, "diff": pytest.approx(-0.00999)}}
    changes = json.loads(project.dvc("metrics", "diff", "--json").stdout)["metrics/evaluate.json"]
    assert (changes["test_loss"]["old"], changes["test_loss"]["new"]) == (before["test_loss"], after["test_loss"])

    project.set("train.lr", 0.01)
    assert project.repro() == []
    assert project.md5s() == first
    assert all(md5(project.folder / path) == digest for path, digest in first.items())
    assert agree(project)
    assert all_runs(store) == rows


def test_experiments_in_the_workspace_and_in_a_temporary_folder(project: Project) -> None:
    head = project.run("git", "rev-parse", "HEAD").stdout.strip()
    project.dvc("exp", "run", "--name", "here", "-S", "evaluate.batch_size=50")
    project.dvc("exp", "run", "--temp", "--name", "elsewhere", "-S", "evaluate.batch_size=40")
    store = Store(project)
    elsewhere, here, _ = store.runs("evaluate")
    for run, name, size in ((here, "here", "50"), (elsewhere, "elsewhere", "40")):
        assert run.info.run_name == f"evaluate {name} batch_size={size}"
        assert (run.data.tags["dvc.exp_name"], run.data.tags["dvc.exp_baseline_rev"]) == (name, head)
        assert (run.data.params["evaluate.batch_size"], run.info.status) == (size, "FINISHED")
        assert run.data.tags["mlflow.parentRunId"] == store.run("train").info.run_id
        assert (project.folder / "mlartifacts" / run.info.run_id / "artifacts/metrics/evaluate.json").exists()


def test_five_queued_experiments_on_four_workers_and_a_new_store(project: Project) -> None:
    (project.folder / "mlflow.db").unlink()
    sizes = range(11, 16)
    names = [f"size-{number}" for number in range(1, 6)]
    sweep = f"evaluate.batch_size={','.join(map(str, sizes))}"
    project.dvc("exp", "run", "--queue", "--name", "size", "-S", sweep)
    project.dvc("queue", "start", "--jobs", "4")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        status = project.dvc("queue", "status").stdout
        if status.count("Success") + status.count("Failed") == len(names):
            break
        time.sleep(3)  # each look takes half a second of a worker's CPU
    assert status.count("Success") == len(names), status
    assert "warning" not in "".join(project.dvc("queue", "logs", name).stdout for name in names)
    store = Store(project)
    by_name = {run.data.tags["dvc.exp_name"]: run for run in store.runs("evaluate")}
    assert sorted(by_name) == names
    assert sorted(int(run.data.params["evaluate.batch_size"]) for run in by_name.values()) == list(sizes)
    train, fetch = store.run("train"), store.run("fetch")  # recorded once, by whichever was first
    assert train.data.tags["restored"] == fetch.data.tags["restored"] == "true"
    for run in by_name.values():
        assert (run.info.status, run.data.tags["mlflow.parentRunId"]) == ("FINISHED", train.info.run_id)
        assert run.data.metrics["test_accuracy"] == train.data.metrics["test_accuracy"]
        assert run.inputs
        assert len(run.inputs.dataset_inputs) == 1
        assert (project.folder / "mlartifacts" / run.info.run_id / "artifacts/metrics/evaluate.json").exists()

    before = all_runs(store)
    project.dvc("exp", "apply", "size-3")
    assert agree(project)
    assert all_runs(store) == before


def test_a_pull_in_a_fresh_clone(project: Project, tmp_path: Path) -> None:
    project.dvc("remote", "add", "--default", "--local", "storage", str(tmp_path / "storage"))
    project.dvc("push")
    clone = Project(tmp_path / "clone")
    project.run("git", "clone", "-q", ".", str(clone.folder))
    clone.dvc("remote", "add", "--default", "--local", "storage", str(tmp_path / "storage"))
    clone.dvc("pull")
    assert ran(clone.dvc("repro").stdout) == []
    assert not (clone.folder / "mlflow.db").exists()
    clone.command("sync")
    store = Store(clone)
    assert is_complete(store, store.run("train"))
    assert store.run("train").data.tags["restored"] == "true"
    assert agree(clone)


def test_a_new_store(finished_project: Project, tmp_path: Path) -> None:
    project = copy(finished_project, tmp_path)
    (project.folder / "mlflow.db").unlink()
    project.set("evaluate.batch_size", 50)
    assert project.repro() == ["evaluate"]
    store = Store(project)
    assert is_complete(store, store.run("train"))
    assert [store.run(stage).data.tags.get("restored") for stage in ("fetch", "train")] == ["true", "true"]
    assert agree(project)
