"""MLflow is a view of what DVC keeps: however DVC got its results, sync makes the right record, once."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.entities import Run
from support.project import PIPELINE, STAGES, Project, copy
from support.store import Store

from dvc_mlflow.project import Project as DVCProject
from dvc_mlflow.store import process_tags
from stages.params import read_params


def content(store: Store, run: Run) -> dict[str, Any]:
    """The parts of a run that must not depend on how it was recorded."""
    own = {"restored", "mlflow.parentRunId", "mlflow.source.git.commit", "git.dirty", "mlflow.user"}
    tags = {
        key: value
        for key, value in run.data.tags.items()
        if key not in own and not key.startswith(("process.", "version.", "hardware."))
    }
    curves = {key: store.curve(run, key) for key in run.data.metrics}
    datasets = [entry.dataset for entry in run.inputs.dataset_inputs] if run.inputs else []
    artifacts = {file.path for file in store.client.list_artifacts(run.info.run_id)}
    models = len(run.outputs.model_outputs) if run.outputs else 0
    return {
        "tags": tags,
        "params": run.data.params,
        "curves": curves,
        "datasets": {(dataset.name, dataset.digest) for dataset in datasets},
        "artifacts": artifacts,
        "models": models,
        "status": run.info.status,
    }


def everything(store: Store) -> dict[str, Any]:
    """All runs with their content, by their ids."""
    runs = store.client.search_runs([store.experiment_id])
    return {run.info.run_id: (content(store, run), run.data.tags, run.info.end_time) for run in runs}


def sync(project: Project) -> list[str]:
    return project.command("sync").stdout.splitlines()


@pytest.fixture(scope="module")
def restored(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after `dvc repro`, with a new store that sync filled."""
    project = copy(finished_project, tmp_path_factory.mktemp("restored"))
    (project.folder / "mlflow.db").unlink()
    lines = sync(project)
    assert [line.partition(" as run")[0] for line in lines] == [f"{stage}: recorded" for stage in STAGES]
    return project


def test_of_two_runs_of_an_execution_later_stages_belong_to_the_one_that_stays(project: Project) -> None:
    """A recorder that is about to drop its run for another's has it finished for a moment."""
    store = Store(project)
    train, evaluate = store.run("train"), store.run("evaluate")
    store.client.delete_run(evaluate.info.run_id)
    tags, dropped = dict(train.data.tags), ""
    while dropped <= train.info.run_id:
        if dropped:
            store.client.delete_run(dropped)
        start_time = train.info.start_time - 1000
        dropped = store.client.create_run(store.experiment_id, start_time, tags).info.run_id
    store.client.set_terminated(dropped, "FINISHED")
    sync(project)
    assert store.run("evaluate").data.tags["mlflow.parentRunId"] == train.info.run_id


@pytest.mark.parametrize("stage", STAGES)
def test_sync_makes_the_very_run_that_the_stage_made(stage: str, finished_project: Project, restored: Project) -> None:
    live, made = Store(finished_project), Store(restored)
    assert content(made, made.run(stage)) == content(live, live.run(stage))
    assert made.run(stage).data.tags["restored"] == "true"
    assert "restored" not in live.run(stage).data.tags


def test_sync_puts_evaluate_below_train_and_its_scores_on_the_model(restored: Project) -> None:
    store = Store(restored)
    train = store.run("train")
    assert store.run("evaluate").data.tags["mlflow.parentRunId"] == train.info.run_id
    (model,) = store.client.search_logged_models([store.experiment_id])
    assert model.source_run_id == train.info.run_id
    assert "test_accuracy" in {metric.key for metric in model.metrics or []}


def test_a_second_sync_changes_nothing(restored: Project) -> None:
    before = everything(Store(restored))
    assert sync(restored) == [f"{stage}: recorded before" for stage in STAGES]
    assert everything(Store(restored)) == before


def test_sync_changes_nothing_after_repro(finished_project: Project, tmp_path: Path) -> None:
    project = copy(finished_project, tmp_path)
    before = everything(Store(project))
    assert sync(project) == [f"{stage}: recorded before" for stage in STAGES]
    assert everything(Store(project)) == before


def test_sync_does_not_record_missing_outs(finished_project: Project, tmp_path: Path) -> None:
    project = copy(finished_project, tmp_path)
    (project.folder / "mlflow.db").unlink()
    path = "models/lenet.safetensors"
    digest = project.md5s()[path]
    (project.folder / path).unlink()
    (project.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()
    result = project.command("sync", check=False)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[STAGES.index("train")] == (
        "train: not recorded: models/lenet.safetensors does not match dvc.lock and is not in DVC's cache; "
        "`dvc checkout` or `dvc pull` first"
    )
    assert Store(project).runs("train") == []


def test_sync_reads_numbers_as_the_stage_did(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lr: 1` is an integer to dvc.lock, though the schema makes it a float."""
    project.set("train.lr", 1)
    project.dvc("commit", "--force", "train")
    monkeypatch.chdir(project.folder)
    opened = DVCProject(project.folder)
    locked = opened.locked("train")
    assert locked
    assert locked.params["params.yaml"]["train"]["lr"] == read_params().train.lr
    assert opened.starting("train").fingerprint == locked.fingerprint


def test_runs_of_dead_processes_are_closed_and_those_of_living_ones_are_not(project: Project) -> None:
    store = Store(project)
    living = store.run("train").data.tags
    process = {"stage": "train", "process.host": living["process.host"]}

    def begin(**tags: str) -> str:
        run = store.client.create_run(store.experiment_id, tags=process | tags)
        return run.info.run_id

    dead = begin(**{"process.pid": living["process.pid"], "process.created": living["process.created"]})
    reused = begin(**{"process.pid": str(os.getpid()), "process.created": "1.0"})
    alive = begin(**process_tags(os.getpid()))
    ended = subprocess.Popen(["sleep", "60"])
    zombie = begin(**process_tags(ended.pid))
    ended.kill()
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    elsewhere = begin(**{"process.host": "another-host", "process.pid": "1", "process.created": "1.0"})
    lines = sync(project)
    assert sorted(lines[: -len(STAGES)]) == sorted(
        f"closed run {run_id}, whose process is gone" for run_id in (dead, reused, zombie)
    )
    status = {run_id: store.client.get_run(run_id).info.status for run_id in (dead, reused, zombie, alive, elsewhere)}
    killed = {dead: "KILLED", reused: "KILLED", zombie: "KILLED"}
    assert status == {**killed, alive: "RUNNING", elsewhere: "RUNNING"}
    ended.wait()


def test_sync_without_a_store_says_so_in_one_line(project: Project) -> None:
    uri = f"sqlite:///{project.folder}/params.yaml/mlflow.db"
    result = project.command("sync", check=False, MLFLOW_TRACKING_URI=uri)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: MLflow cannot use {uri} (")


def test_credentials_in_the_store_s_address_are_not_shown(project: Project) -> None:
    uri = "http://user:secret@127.0.0.1:1"
    result = project.command("sync", check=False, MLFLOW_TRACKING_URI=uri)
    assert result.returncode == 1
    assert "127.0.0.1" in result.stderr
    assert "secret" not in result.stderr + result.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_cut_off_right_after_it_was_created_is_completed(stage: str, project: Project) -> None:
    store = Store(project)
    whole = store.run(stage)
    expected = content(store, whole)
    begun = {key: value for key, value in whole.data.tags.items() if not key.startswith("dvc.outs.")}
    store.client.delete_run(whole.info.run_id)
    cut = store.client.create_run(store.experiment_id, tags=begun, run_name=whole.info.run_name)
    sync(project)
    completed = store.run(stage)
    assert completed.info.run_id == cut.info.run_id
    assert content(store, completed) == expected


def test_a_restored_run_has_no_commit_if_the_tree_differs(project: Project) -> None:
    (project.folder / "mlflow.db").unlink()
    project.set("train.lr", 0.02)  # without running it
    sync(project)
    runs = {stage: Store(project).run(stage).data for stage in STAGES}
    assert {stage for stage, data in runs.items() if "mlflow.source.git.commit" in data.tags} == {
        stage for stage in STAGES if "train" not in {stage, *PIPELINE.upstream(stage)}
    }
    assert runs["train"].params["train.lr"] == "0.01"


def test_outs_that_are_symlinks_into_the_cache_are_recorded(project: Project) -> None:
    project.dvc("config", "cache.type", "symlink")
    project.dvc("checkout", "--relink")
    assert (project.folder / "models/lenet.safetensors").is_symlink()
    (project.folder / "mlflow.db").unlink()
    sync(project)
    project.command("audit")


def test_a_record_made_from_dvc_lock_names_who_committed_the_result_not_who_synced(
    finished_project: Project, tmp_path: Path
) -> None:
    project = copy(finished_project, tmp_path)
    (project.folder / "mlflow.db").unlink()
    project.set("evaluate.batch_size", 50)
    project.repro(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/other.db")
    project.run("git", "commit", "-qam", "Evaluate 50 images at a time", "--author", "Ada <ada@example.org>")
    project.command("sync")
    authors = {stage: Store(project).run(stage).data.tags["git.author"] for stage in ("train", "evaluate")}
    assert authors == {"train": "Test <test@example.org>", "evaluate": "Ada <ada@example.org>"}
    assert Store(project).run("evaluate").data.tags["mlflow.user"] == "Ada"

    project.set("evaluate.batch_size", 40)
    project.repro(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/other.db")
    project.command("sync")
    assert Store(project).runs("evaluate")[0].data.tags["git.author"] == "Test <test@example.org>", "not committed"

    clone = tmp_path / "shallow"
    project.run("git", "clone", "-q", "--depth", "1", project.folder.as_uri(), str(clone))
    shallow = DVCProject(clone)
    found = {stage: shallow.locked(stage) for stage in ("train", "evaluate")}
    assert {stage: shallow.author_of(one) for stage, one in found.items() if one} == dict.fromkeys(found, "unknown")
