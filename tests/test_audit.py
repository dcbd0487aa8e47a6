"""Audit names each kind of planted disagreement in one line."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.utils.serialize import modify_yaml
from support.project import Project
from support.store import Store

from dvc_mlflow.audit import audit_files, audit_store
from dvc_mlflow.project import Project as DVCProject
from dvc_mlflow.store import Store as MLflowStore
from dvc_mlflow.store import hardware_tags


@pytest.fixture
def audit(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A function that returns audit's lines about the project."""
    monkeypatch.chdir(project.folder)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)

    def lines() -> list[str]:
        there = DVCProject(project.folder)
        return [*audit_files(there), *audit_store(MLflowStore(there))]

    return lines


def test_after_repro_all_agree(project: Project) -> None:
    result = project.command("audit")
    assert result.stdout == "dvc.yaml, the params, dvc.lock, the files and MLflow agree\n"


def test_a_disagreement_is_a_failure(project: Project) -> None:
    change_params(project)
    result = project.command("audit", check=False)
    assert result.returncode == 1
    assert result.stdout == "train.lr: params.yaml has 0.5, dvc.lock 0.01\n"


def test_another_mirror_of_the_same_bytes_is_no_disagreement(
    project: Project, mirror: str, audit: Callable[[], list[str]]
) -> None:
    """Only fetch reruns: the inputs of train and evaluate are unchanged."""
    project.set("fetch.mirrors", [mirror, mirror])
    assert project.repro() == ["fetch"]
    assert audit() == []


def change_params(project: Project) -> None:
    project.set("train.lr", 0.5)


def change_command(project: Project) -> None:
    with modify_yaml(project.folder / "dvc.yaml") as pipeline:
        pipeline["stages"]["fetch"]["cmd"] += " "
        pipeline["stages"]["fetch"]["cmd"] += "--again"


def change_deps(project: Project) -> None:
    with modify_yaml(project.folder / "dvc.yaml") as pipeline:
        pipeline["stages"]["evaluate"]["deps"].remove("stages/device.py")


def change_code(project: Project) -> None:
    with (project.folder / "stages/evaluate.py").open("a") as file:
        file.write("# changed\n")


def change_metrics_file(project: Project) -> None:
    (project.folder / "metrics/train.json").write_text("{}")


def remove_model(project: Project) -> None:
    (project.folder / "models/lenet.safetensors").unlink()


def remove_run(project: Project) -> None:
    mlflow = Store(project)
    mlflow.client.delete_run(mlflow.run("evaluate").info.run_id)


def change_headline(project: Project) -> None:
    mlflow = Store(project)
    mlflow.client.log_metric(mlflow.run("train").info.run_id, "test_accuracy", 0.123)


def change_metric(project: Project) -> None:
    mlflow = Store(project)
    mlflow.client.log_metric(mlflow.run("evaluate").info.run_id, "f1.Bag", 0.123)


def change_curve(project: Project) -> None:
    mlflow = Store(project)
    mlflow.client.log_metric(mlflow.run("train").info.run_id, "train_loss", 0.123, step=2)


def add_param(project: Project) -> None:
    mlflow = Store(project)
    mlflow.client.log_param(mlflow.run("train").info.run_id, "train.no_such_param", "0.9")


def change_parent(project: Project) -> None:
    mlflow = Store(project)
    mlflow.client.set_tag(mlflow.run("evaluate").info.run_id, "mlflow.parentRunId", mlflow.run("fetch").info.run_id)


def change_artifact(project: Project) -> None:
    (artifact,) = (project.folder / "mlartifacts").rglob("predictions.parquet")
    artifact.write_text("actual,predicted\n")


def change_weights(project: Project) -> None:
    (weights,) = (project.folder / "mlartifacts").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x00")


def leave_run(project: Project) -> None:
    mlflow = Store(project)
    process = {key: value for key, value in mlflow.run("train").data.tags.items() if key.startswith("process.")}
    mlflow.client.create_run(mlflow.experiment_id, tags={"stage": "train", **process})


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (change_params, "train.lr: params.yaml has 0.5, dvc.lock 0.01"),
        (change_command, "fetch: the command in dvc.yaml differs from dvc.lock"),
        (change_deps, "evaluate: stages/device.py: dvc.lock has it, dvc.yaml does not"),
        (change_code, "stages/evaluate.py: dvc.lock (evaluate) has MD5 "),
        (change_metrics_file, "metrics/train.json: dvc.lock (train) has MD5 "),
        (remove_model, "models/lenet.safetensors: dvc.lock (train) has MD5 "),
        (remove_run, "evaluate: MLflow has no finished run for the execution in dvc.lock"),
        (change_headline, "metrics test_accuracy: MLflow has 0.123; expected "),
        (change_metric, "metrics f1.Bag: MLflow has 0.123; expected "),
        (change_curve, "curve train_loss at step 2: MLflow has 0.123; expected "),
        (add_param, 'params train.no_such_param: MLflow has "0.9"; expected nothing'),
        (change_parent, "its parent is not "),
        (change_artifact, 'artifacts metrics/predictions.parquet: MLflow has "other bytes"'),
        (change_weights, 'model models/lenet.safetensors: MLflow has "other bytes"'),
        (leave_run, "MLflow has it RUNNING, but its process is gone"),
    ],
)
def test_each_disagreement_is_named(
    plant: Callable[[Project], None], expected: str, project: Project, audit: Callable[[], list[str]]
) -> None:
    plant(project)
    lines = audit()
    assert any(expected in line for line in lines), lines


def test_a_mistake_in_params_is_a_disagreement(project: Project) -> None:
    project.set("train.lr", -1)
    result = project.command("audit", check=False)
    assert result.returncode == 1
    assert result.stdout == "train.lr: params.yaml has -1, dvc.lock 0.01\n"


def test_other_bits_from_other_hardware_are_a_note_and_no_failure(project: Project) -> None:
    with modify_yaml(project.folder / "dvc.yaml") as pipeline:
        pipeline["stages"] = {"say": {"cmd": "dvc-mlflow run sh -c 'echo $WORD > said'", "outs": ["said"]}}
    project.dvc("repro", WORD="one")
    store = Store(project)
    first = store.run("say")
    assert first.data.tags["hardware.cpu"]
    assert first.data.tags["hardware.instruction_set"].startswith(platform.machine())
    project.dvc("repro", "--force", WORD="two")
    second, _ = store.runs("say")
    assert "note: " not in project.command("audit").stdout, "the hardware is the same, so it is not the reason"
    store.client.set_tag(first.info.run_id, "hardware.cpu", "Another CPU")
    (line,) = [line for line in project.command("audit").stdout.splitlines() if line.startswith("note: ")]
    assert line.startswith(f"note: say: run {first.info.run_id} made different bytes from the same command")
    assert " on Another CPU, " in line
    assert f"; run {second.info.run_id} was on {second.data.tags['hardware.cpu']}, " in line


def test_gpus_and_their_driver_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 570.86'\necho 'NVIDIA L4, 570.86'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert hardware_tags()["hardware.gpu"] == "NVIDIA H100, driver 570.86; NVIDIA L4, driver 570.86"
    program.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert "hardware.gpu" not in hardware_tags()
