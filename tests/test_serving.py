"""The model gives the predictions of evaluate: served, promoted, and as ONNX."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
from PIL import Image
from support.commands import environment
from support.data import SHAPE
from support.project import Project, copy
from support.store import Store

from benchmarks.servers import free_port
from commands import export
from commands.compare import WORSE
from stages.dataset import read_dataset
from stages.stage import StageError

CHAMPION = "models:/fashion-mnist-lenet@champion"


def promote(project: Project, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return project.command("promote", *arguments, check=check)


@pytest.fixture(scope="module")
def promoted_project(two_results: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project whose first result is promoted."""
    project = copy(two_results, tmp_path_factory.mktemp("promoted"))
    _, first = Store(project).runs("train")
    promote(project, first.info.run_id)
    return project


def champion(project: Project) -> str | None:
    """The run of the model that has the alias."""
    return Store(project).client.get_model_version_by_alias("fashion-mnist-lenet", "champion").run_id


def test_a_worse_model_is_promoted_only_by_force(promoted_project: Project, tmp_path: Path) -> None:
    project = copy(promoted_project, tmp_path)
    slow, first = Store(project).runs("train")
    refused = promote(project, check=False)  # the workspace has the slow one
    assert refused.returncode == WORSE
    assert " is worse than " in refused.stdout
    assert refused.stderr == "error: not promoted; version 1 stays the champion. --force promotes it anyway\n"
    assert champion(project) == first.info.run_id
    assert "version 2 is the champion now" in promote(project, "--force", slow.info.run_id).stdout
    assert champion(project) == slow.info.run_id
    assert " is better than " in promote(project, first.info.run_id).stdout
    assert champion(project) == first.info.run_id
    assert "is the champion already" in promote(project, first.info.run_id).stdout
    for run in Store(project).runs("evaluate"):  # without an evaluation, nothing can be compared
        Store(project).client.delete_run(run.info.run_id)
    assert (
        "it has no evaluation; `dvc repro` and `make sync` make one"
        in promote(project, slow.info.run_id, check=False).stderr
    )
    assert "version 2 is the champion now" in promote(project, "--force", slow.info.run_id).stdout
    versions = Store(project).client.search_model_versions("name = 'fashion-mnist-lenet'")
    assert {version.run_id for version in versions} == {slow.info.run_id, first.info.run_id}


def test_the_version_s_tags_say_who_promoted_it_instead_of_what_and_with_which_verdict(
    promoted_project: Project, tmp_path: Path
) -> None:
    project = copy(promoted_project, tmp_path)
    slow, first = Store(project).runs("train")

    def tags() -> dict[str, str]:
        return Store(project).client.get_model_version_by_alias("fashion-mnist-lenet", "champion").tags

    before = tags()
    assert before["promoted.by"] == "Test <test@example.org>"
    assert abs(datetime.now(UTC) - datetime.fromisoformat(before["promoted.at"])).days == 0
    assert before["promoted.instead_of"] == "none"
    assert before["promoted.verdict"] == "not compared: there was no other"
    promote(project, "--force", slow.info.run_id)
    assert tags()["promoted.instead_of"] == f"version 1, run {first.info.run_id}"
    assert tags()["promoted.verdict"] == "not compared: --force"
    said = promote(project, first.info.run_id).stdout
    assert tags()["promoted.verdict"] == said.splitlines()[0]
    assert " is better than " in tags()["promoted.verdict"]


def test_an_unknown_run_is_reported_in_one_line(promoted_project: Project) -> None:
    for run_id in ("deadbeef", "0123456789abcdef" * 2):
        failed = promote(promoted_project, run_id, check=False)
        assert failed.returncode == 1
        assert failed.stderr == f"error: expected the id of a run, found {run_id}; `make ui` shows the runs\n"


def test_identical_weights_are_one_version(promoted_project: Project, tmp_path: Path) -> None:
    project = copy(promoted_project, tmp_path)
    project.run("git", "checkout", "-q", ".")
    project.dvc("checkout", "-q")
    project.set("train.checkpoint_epochs", 2)  # other params, the same weights
    project.repro()
    project.command("sync")
    assert "is the champion already: fashion-mnist-lenet version 1" in promote(project).stdout
    slow = Store(project).runs("train")[1]
    promote(project, "--force", slow.info.run_id)
    assert "version 1 is the champion now" in promote(project).stdout
    assert len(Store(project).client.search_model_versions("name = 'fashion-mnist-lenet'")) == 2


def test_a_clone_without_the_model_or_with_other_code_promotes_nothing_unasked(
    promoted_project: Project, tmp_path: Path
) -> None:
    project = copy(promoted_project, tmp_path)
    slow, first = Store(project).runs("train")
    (project.folder / "models/lenet.safetensors").unlink()
    failed = promote(project, "--force", check=False)
    assert failed.stderr == (
        "error: expected models/lenet.safetensors as in dvc.lock, found none; `dvc pull` gets it, or name a run\n"
    )
    with (project.folder / "stages/lenet.py").open("a") as file:
        file.write("# changed\n")
    failed = promote(project, "--force", check=False)
    assert failed.stderr.startswith("error: expected dvc.lock to match code, params and data, found stages/lenet.py: ")
    assert champion(project) == first.info.run_id
    promote(project, "--force", slow.info.run_id)
    assert champion(project) == slow.info.run_id


def test_the_served_model_gives_the_predictions_of_evaluate(promoted_project: Project) -> None:
    _, first = Store(promoted_project).runs("evaluate")
    table = pd.read_parquet(
        Store(promoted_project).client.download_artifacts(first.info.run_id, "metrics/predictions.parquet")
    )
    images = read_dataset(promoted_project.folder / "data/fashion-mnist/test.safetensors").images
    port = free_port()
    log = (promoted_project.folder / "serve.log").open("wb")
    process = subprocess.Popen(
        ["mlflow", "models", "serve", "-m", CHAMPION, "--env-manager", "local", "--port", str(port)],
        cwd=promoted_project.folder,
        env=environment() | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        for inputs in (images[:1], np.concatenate([images] * 5)):
            answers = ask(process, port, inputs)
            expected = pd.concat([table] * 5)[: len(inputs)]
            classes = list(table.columns[3:])
            assert [answer["class"] for answer in answers] == [classes[label] for label in expected["predicted"]]
            probabilities = np.array([[answer[name] for name in classes] for answer in answers])
            assert np.abs(probabilities - expected[classes].to_numpy()).max() < 1e-5
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(process: subprocess.Popen[bytes], port: int, images: np.ndarray) -> list[dict]:
    """The server's answers, once it is up."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps({"inputs": images.tolist()}).encode(),
        {"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.loads(response.read())["predictions"]
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_signature_of_another_shape_is_named(finished_project: Project, tmp_path: Path) -> None:
    project, picture = copy(finished_project, tmp_path), tmp_path / "picture.png"
    text = (project.folder / "dvc.yaml").read_text()
    (project.folder / "dvc.yaml").write_text(text.replace(json.dumps([-1, *SHAPE]), "[-1, 20, 24]"))
    for path in project.folder.glob("mlflow.db*"):
        path.unlink()
    project.command("sync")
    promote(project)
    Image.new("L", (20, 24)).save(picture)
    failed = project.command("predict", "--model", CHAMPION, str(picture), check=False)
    assert "cannot classify images (20, 24), the shape of its signature in dvc.yaml: " in failed.stderr
    assert "defect" not in failed.stderr


def test_predict_uses_the_promoted_model(promoted_project: Project, tmp_path: Path) -> None:
    dataset = read_dataset(promoted_project.folder / "data/fashion-mnist/test.safetensors")
    Image.fromarray(dataset.images[0]).save(tmp_path / "first.png")
    command = ["predict", "--json", str(tmp_path / "first.png")]
    (slow,) = json.loads(promoted_project.command(*command).stdout)
    (best,) = json.loads(promoted_project.command(*command, "--model", CHAMPION).stdout)
    assert best["class"] == dataset.classes[dataset.labels[0]]
    assert best["probability"] > slow["probability"]


def test_the_onnx_file_gives_the_predictions_of_evaluate(finished_project: Project, tmp_path: Path) -> None:
    path = tmp_path / "lenet.onnx"
    shown = finished_project.command("export", str(path))
    assert "matches PyTorch on all 200 test images" in shown.stdout
    assert shown.stderr == ""
    table = pd.read_parquet(finished_project.folder / "metrics/predictions.parquet")
    images = read_dataset(finished_project.folder / "data/fashion-mnist/test.safetensors").images
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (images[:1], images):
        (probabilities,) = session.run(None, {"images": batch})
        assert np.abs(probabilities - table.iloc[: len(batch), 3:].to_numpy()).max() < 1e-5
    classes = {entry.key: entry.value for entry in onnx.load(path).metadata_props}["classes"]
    assert json.loads(classes) == list(table.columns[3:])


def test_an_onnx_file_that_disagrees_is_not_written(
    finished_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished_project.folder
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(StageError, match="nothing is written"):
        export.export(
            tmp_path / "x.onnx",
            folder / "models/lenet.safetensors",
            folder / "data/fashion-mnist/test.safetensors",
        )
    assert list(tmp_path.iterdir()) == []
