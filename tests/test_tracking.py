"""MLflow shows what DVC did: its content equals the files, and a run's final status is correct."""

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
from dvc.utils.serialize import load_yaml, modify_yaml
from safetensors import safe_open
from support.commands import environment
from support.data import SHAPE, TEST_SIZE
from support.project import PIPELINE, ROOT, STAGES, Project, ran
from support.store import Store

from dvc_mlflow.execution import flatten
from dvc_mlflow.store import own_tags
from dvc_mlflow.text import UserError
from stages.dataset import read_dataset
from stages.lenet import read_model
from stages.stage import md5


@pytest.fixture(scope="module")
def store(finished_project: Project) -> Store:
    return Store(finished_project)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_a_finished_run_with_what_dvc_lock_records(
    stage: str, store: Store, finished_project: Project
) -> None:
    run = store.run(stage)
    locked = load_yaml(finished_project.folder / "dvc.lock")["stages"][stage]
    tags = run.data.tags
    assert run.info.status == "FINISHED"
    assert tags["dvc.cmd"] == locked["cmd"]
    for kind in ("deps", "outs"):
        recorded = {
            key.removeprefix(f"dvc.{kind}."): value for key, value in tags.items() if key.startswith(f"dvc.{kind}.")
        }
        assert recorded == {entry["path"]: entry["md5"] for entry in locked[kind]}
    params = {key: value for key, value in run.data.params.items() if key.startswith(f"{stage}.")}
    expected = flatten(locked.get("params", {}).get("params.yaml", {}))
    assert params == {key: value if isinstance(value, str) else json.dumps(value) for key, value in expected.items()}
    commits = finished_project.run("git", "rev-list", "HEAD").stdout.split()
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (commits[1], "false")
    assert 0 < run.info.end_time - run.info.start_time < 60_000


def test_a_train_run_has_the_params_of_its_stage_and_of_those_before_it(store: Store) -> None:
    sections = {key.split(".")[0] for key in store.run("train").data.params}
    assert sections == {"train", *PIPELINE.upstream("train")} & {*load_yaml(ROOT / "params.yaml")}


def test_the_curves_are_those_of_the_history_file(store: Store, finished_project: Project) -> None:
    with (finished_project.folder / "metrics/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in set(rows[0]) - {"epoch"}:
        expected = [(int(row["epoch"]), float(row[name])) for row in rows]
        assert store.curve(store.run("train"), name) == expected


def test_the_metrics_are_those_of_the_metrics_files(store: Store, finished_project: Project) -> None:
    metrics = finished_project.folder / "metrics"
    evaluated = json.loads((metrics / "evaluate.json").read_text())
    evaluation, training = store.run("evaluate").data.metrics, store.run("train").data.metrics
    assert {key: evaluation[key] for key in evaluated} == evaluated
    assert {key: training[key] for key in evaluated} == evaluated
    trained = json.loads((metrics / "train.json").read_text())
    assert {key: training[key] for key in trained} == trained
    per_class = flatten(json.loads((metrics / "per_class.json").read_text()))
    assert {key: evaluation[key] for key in per_class} == per_class


def test_an_evaluate_run_is_the_child_of_the_run_that_made_its_model(store: Store) -> None:
    assert store.run("evaluate").data.tags["mlflow.parentRunId"] == store.run("train").info.run_id
    assert "mlflow.parentRunId" not in store.run("train").data.tags


def test_the_data_sets_are_inputs_with_dvc_s_hash(store: Store, finished_project: Project) -> None:
    md5s = finished_project.md5s()
    declared = {name: entry["path"] for name, entry in PIPELINE.artifacts.items() if entry["type"] == "dataset"}
    assert declared
    for stage in STAGES:
        files = {*PIPELINE.deps(stage), *PIPELINE.outs(stage)}
        inputs = store.run(stage).inputs
        found = {entry.dataset.name: entry.dataset.digest for entry in inputs.dataset_inputs} if inputs else {}
        assert found == {name: md5s[path] for name, path in declared.items() if path in files}


def test_the_model_is_logged_without_a_pickle_and_predicts_like_evaluate(
    store: Store, finished_project: Project
) -> None:
    (model,) = store.client.search_logged_models([store.experiment_id])
    path = "models/lenet.safetensors"
    assert model.tags[f"dvc.outs.{path}"] == finished_project.md5s()[path]
    assert model.source_run_id == store.run("train").info.run_id
    scores = {metric.key: (metric.value, metric.dataset_digest) for metric in model.metrics or []}
    evaluated = json.loads((finished_project.folder / "metrics/evaluate.json").read_text())
    digest = finished_project.md5s()["data/fashion-mnist/test.safetensors"]
    assert scores["test_accuracy"] == (evaluated["test_accuracy"], digest)

    mlflow.set_tracking_uri(store.uri)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{model.model_id}"))
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    assert not [file for file in files if file.read_bytes()[:1] == b"\x80"]  # how a pickle begins
    (weights,) = folder.rglob("*.safetensors")
    assert md5(weights) == finished_project.md5s()[path]
    with safe_open(weights, "numpy") as opened:
        assert {*opened.keys()} == {*read_model(weights).state_dict()}

    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    dataset = read_dataset(finished_project.folder / "data/fashion-mnist/test.safetensors")
    answer = loaded.predict(dataset.images)
    assert list(answer.columns) == ["class", *dataset.classes]
    assert len(answer) == TEST_SIZE
    probabilities = answer[dataset.classes].to_numpy()
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert answer["class"].tolist() == [dataset.classes[label] for label in probabilities.argmax(1)]
    accuracy = float((answer["class"] == [dataset.classes[label] for label in dataset.labels]).mean())
    assert accuracy == pytest.approx(evaluated["test_accuracy"])
    for size in (1, 7):
        few = loaded.predict(dataset.images[:size])[dataset.classes].to_numpy()
        assert np.allclose(few, probabilities[:size], atol=1e-6)
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, *SHAPE)


def start(project: Project, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=project.folder,
        env=environment() | {"DVC_STAGE": "train"},  # as DVC starts it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stage_that_is_ended_by_a_signal_has_a_killed_run(number: signal.Signals, project: Project) -> None:
    project.set("train.epochs", 1000)
    project.set("train.batch_size", 1)  # an epoch takes long enough for MLflow to keep up
    command = load_yaml(project.folder / "dvc.yaml")["stages"]["train"]["cmd"].split()
    process = start(project, *command)
    assert process.stdout
    line = process.stdout.readline()
    if line.startswith("waiting for 1 CPU core"):  # which a training outside the tests uses
        line = process.stdout.readline()
    assert line.startswith("epoch 1/")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert "warning" not in errors
    store, deadline = Store(project), time.monotonic() + 60
    while store.runs("train")[0].info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.1)  # after SIGKILL, only the recorder is left to close the run
    newest, first = store.runs("train")
    assert (newest.info.status, first.info.status) == ("KILLED", "FINISHED")
    assert store.curve(newest, "train_loss")


def test_a_stage_that_fails_has_a_failed_run(project: Project) -> None:
    data = read_dataset(project.folder / PIPELINE.command("train")[3])
    most = len(data.images) - 100  # those of the validation split
    project.set("train.batch_size", most + 1)
    result = project.dvc("repro", check=False)
    assert result.returncode != 0
    assert f"error: train.batch_size: expected at most {most:,} images, found {most + 1:,}" in result.stderr
    assert "Traceback" not in result.stderr
    assert [run.info.status for run in Store(project).runs("train")] == ["FAILED", "FINISHED"]


UNUSABLE = "sqlite:///{}/params.yaml/mlflow.db"  # below a file: no user, not even root, can write there


def test_a_store_that_cannot_be_used_costs_a_warning_and_nothing_else(project: Project) -> None:
    project.set("evaluate.batch_size", 50)
    result = project.dvc("repro", warns=True, MLFLOW_TRACKING_URI=UNUSABLE.format(project.folder))
    (line,) = [line for line in result.stderr.splitlines() if "MLflow" in line]
    assert line.startswith(f"warning: MLflow cannot use {UNUSABLE.format(project.folder)} (")
    assert "Traceback" not in result.stderr
    assert ran(result.stdout) == ["evaluate"]
    assert project.repro() == []


def test_strict_tracking_fails_before_anything_is_done_and_loses_nothing(project: Project) -> None:
    before = {path: (project.folder / path).read_bytes() for path in project.md5s()}
    project.set("train.lr", 0.02)
    strict = {"MLFLOW_TRACKING_URI": UNUSABLE.format(project.folder), "TRACKING_STRICT": "1"}
    result = project.dvc("repro", check=False, warns=False, **strict)
    assert result.returncode != 0
    assert "error: MLflow cannot record this run, and TRACKING_STRICT is set" in result.stderr
    assert "records this later" not in result.stderr
    assert "epoch" not in result.stdout
    assert "Traceback" not in result.stderr
    assert {path: (project.folder / path).read_bytes() for path in before} == before
    assert project.repro("--dry", "--single-item", "train") == ["train"]


def test_the_environment_selects_the_store_and_the_experiment(project: Project, tmp_path: Path) -> None:
    project.set("evaluate.batch_size", 50)
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    assert project.repro(MLFLOW_TRACKING_URI=uri, MLFLOW_EXPERIMENT_NAME="mine", MLFLOW_RUN_ID="0" * 32) == ["evaluate"]
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("mine")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["stage"]: run.info.status for run in runs} == dict.fromkeys(STAGES, "FINISHED")
    assert {run.data.tags["stage"] for run in runs if "restored" in run.data.tags} == PIPELINE.upstream("evaluate")
    assert len(Store(project).runs("evaluate")) == 1


def test_a_tree_is_dirty_only_if_its_own_files_changed(project: Project) -> None:
    project.set("evaluate.batch_size", 50)
    project.commit("Change the batch size")
    (project.folder / "metrics/train.json").write_text("{}")  # DVC restores it
    assert project.repro() == ["evaluate"]
    assert Store(project).runs("evaluate")[0].data.tags["git.dirty"] == "false"
    (project.folder / "stages/evaluate.py").open("a").write("# changed\n")
    assert project.repro() == ["evaluate"]
    assert Store(project).runs("evaluate")[0].data.tags["git.dirty"] == "true"


def test_added_stages_and_other_forms_of_a_stage_are_recorded(project: Project) -> None:
    with modify_yaml(project.folder / "dvc.yaml") as content:
        stages = content["stages"]
        stages["count"] = {"cmd": "wc -c data/fashion-mnist/train.safetensors > data/count", "outs": ["data/count"]}
        stages["count"]["deps"] = ["data/fashion-mnist/train.safetensors"]
        stages["train"]["deps"].append("data/count")  # between two others
        stages["evaluate"]["params"] = ["evaluate.batch_size", "evaluate.device", "evaluate.threads"]
        stages["evaluate"]["cmd"] = ["true", stages["evaluate"]["cmd"]]
        stages["stamp"] = {"cmd": "dvc-mlflow run touch data/stamp", "outs": ["data/stamp"]}
    result = project.dvc("repro")
    assert ran(result.stdout) == ["count", "train", "evaluate", "stamp"]
    assert "warning" not in result.stderr
    run = Store(project).runs("evaluate")[0]
    assert run.data.params["evaluate.batch_size"] == "1000"
    assert run.data.tags["dvc.cmd"].startswith("true\ndvc-mlflow run python -m stages.evaluate ")
    assert Store(project).run("stamp").info.status == "FINISHED"
    project.command("sync")  # the only one that no launcher records
    project.command("audit")
    (project.folder / "mlflow.db").unlink()
    assert len(project.command("sync").stdout.splitlines()) == len(STAGES) + 2
    project.command("audit")


def test_long_values_and_names_that_mlflow_refuses_are_recorded(project: Project) -> None:
    project.set(
        "fetch.classes", ["Shirt & tie", "Shirt + tie", "a//b", "a/../b", *(f"Class {n} " + "x" * 30 for n in range(6))]
    )
    project.set(
        "fetch.mirrors",
        [f"http://127.0.0.1/{'x' * 200}/", *load_yaml(project.folder / "params.yaml")["fetch"]["mirrors"]],
    )
    assert set(project.repro()) == {*STAGES}
    run = Store(project).runs("evaluate")[0]
    names = sorted(name.rpartition("-")[0] for name in run.data.metrics if name.startswith("f1.") and "-" in name)
    assert names == ["f1.Shirt _ tie", "f1.Shirt _ tie", "f1.a____b", "f1.a__b"]
    assert all(len(run.info.run_name or "") <= 250 for stage in STAGES for run in Store(project).runs(stage))
    project.command("audit")


def test_a_relative_address_of_the_store_is_the_projects_own(project: Project) -> None:
    uri = "sqlite:///mlflow.db"
    project.dvc("exp", "run", "--temp", "--set-param", "evaluate.batch_size=50", MLFLOW_TRACKING_URI=uri)
    assert len(Store(project).runs("evaluate")) == 2


def test_a_training_to_the_same_bytes_gets_the_evaluation_that_dvc_skips(project: Project) -> None:
    project.set("train.checkpoint_epochs", 2)
    assert project.repro() == ["train"]
    again, first = Store(project).runs("train")
    assert again.data.metrics == first.data.metrics
    evaluation = Store(project).runs("evaluate")[0]
    assert evaluation.data.tags["mlflow.parentRunId"] == again.info.run_id
    assert evaluation.data.tags["restored"] == "true"
    assert evaluation.data.params["train.checkpoint_epochs"] == "2", (
        "the params of this training, not of the earlier one"
    )
    assert evaluation.data.tags["mlflow.source.git.commit"] == again.data.tags["mlflow.source.git.commit"]
    project.command("audit")


def test_tags_of_the_user_are_on_the_rows_of_what_runs(project: Project) -> None:
    project.set("evaluate.batch_size", 50)
    assert project.repro(MLFLOW_TAGS='{"team": "vision"}') == ["evaluate"]
    store = Store(project)
    assert [run.data.tags.get("team") for run in store.runs("evaluate")] == ["vision", None]


@pytest.mark.parametrize("text", ["team=vision", "[]", '{"stage": "train"}', '{"dvc.execution": "0"}'])
def test_tags_that_are_no_object_or_use_reserved_names_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TAGS", text)
    with pytest.raises(UserError, match="MLFLOW_TAGS"):
        own_tags()
