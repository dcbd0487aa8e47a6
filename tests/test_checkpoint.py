"""A training that was cut off continues from its own checkpoint only, and to the same bits."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.project import ROOT, Pipeline, Project
from support.training import CPU, Listener, bits, fit, make_dataset, make_params
from torch import Tensor, nn

from stages import checkpoint as module
from stages.checkpoint import CODE, Checkpoint
from stages.lenet import LeNet

EPOCHS = 4


class CutOff(Listener):
    """Ends the training, as Ctrl-C does, once this epoch is reported."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def __call__(self, history: list[dict[str, Any]]) -> None:
        super().__call__(history)
        if len(history) == self.epoch:
            raise KeyboardInterrupt


def steps(listener: Listener) -> list[int]:
    """The epochs after which train reported, each with all epochs up to it."""
    for history in listener.reports:
        assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    return [len(history) for history in listener.reports]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def path() -> Path:
    """The checkpoint of a training that was cut off after epoch 2 of EPOCHS."""
    with pytest.raises(KeyboardInterrupt):
        fit(listener=CutOff(2), epochs=EPOCHS, checkpoint_epochs=1)
    (path,) = Path(".dvc/tmp/checkpoints").iterdir()
    return path


@pytest.mark.parametrize(
    ("changes", "cut", "every", "left"),
    [
        ({}, 1, 1, [2, 3, 4]),
        ({}, 4, 1, []),
        ({}, 3, 2, [3, 4]),
        ({}, 3, 0, [1, 2, 3, 4]),
        ({"validation_size": 0, "activation": "relu", "schedule": "constant"}, 2, 1, [3, 4]),
    ],
)
def test_a_training_continues_to_the_bits_of_one_that_was_not_cut_off(
    changes: dict, cut: int, every: int, left: list[int]
) -> None:
    whole, history = fit(epochs=EPOCHS, **changes)
    with pytest.raises(KeyboardInterrupt):
        fit(listener=CutOff(cut), epochs=EPOCHS, checkpoint_epochs=every, **changes)
    rest = Listener()
    resumed, resumed_history = fit(listener=rest, epochs=EPOCHS, checkpoint_epochs=every, **changes)
    assert steps(rest) == left
    assert resumed_history == history
    assert bits(resumed) == bits(whole)


def test_a_checkpoint_is_valid_for_any_interval_of_checkpoints(path: Path) -> None:
    rest = Listener()
    fit(listener=rest, epochs=EPOCHS, checkpoint_epochs=3)
    assert steps(rest) == [3, 4]


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 0.02}, {"epochs": 5}, {"threads": 2}, {"batch_size": 17}])
def test_other_params_start_again(change: dict, path: Path) -> None:
    rest = Listener()
    fit(listener=rest, **{"epochs": EPOCHS, **change})
    assert steps(rest)[0] == 1


def test_other_data_code_versions_and_hardware_start_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    params, dataset = make_params(), make_dataset(600)

    def key() -> str:
        return Checkpoint(params, dataset, CPU).key

    before = key()
    assert key() == before
    dataset.images[0, 0, 0] ^= 1
    assert key() != before
    dataset.images[0, 0, 0] ^= 1
    dataset.labels[0] ^= 1
    assert key() != before
    dataset.labels[0] ^= 1
    dataset.classes[0] = "other"
    assert key() != before
    dataset.classes[0] = "class 0"
    assert key() == before
    for target, value in (
        ("torch.__version__", "2.0.0"),
        ("numpy.__version__", "2.0.0"),
        ("torch.cpu.get_capabilities", lambda: {"avx2": True}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            assert key() != before
    for name in CODE:
        folder = tmp_path / name
        shutil.copytree(module.HERE, folder)
        (folder / name).write_text("# changed\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "HERE", folder)
            assert key() != before
    assert key() == before


class Marker:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch unpickled",)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change the file's metadata and its tensors."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["checkpoint"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(content, tensors)
    save_file(tensors, path, {"checkpoint": json.dumps(content)})


def another_shape(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["param.fc3.bias"] = torch.zeros(11)
    content["sha256"] = module._sha256(tensors)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "torn in its header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1000] + b"x" + path.read_bytes()[-999:]),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Marker())),
    "PyTorch's pickle": lambda path: torch.save({"key": Marker()}, path),
    "another training's": lambda path: rewrite(path, lambda content, _: content.update(key="0" * 64)),
    "without a history": lambda path: rewrite(path, lambda content, _: content.pop("history")),
    "other tensors": lambda path: rewrite(path, another_shape),
    "a folder": a_folder,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_unrelated_file_is_ignored_with_a_warning(
    damage: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](path)
    capsys.readouterr()
    rest = Listener()
    model, _ = fit(listener=rest, epochs=EPOCHS)
    assert steps(rest) == [1, 2, 3, 4]
    assert bits(model) == bits(fit(epochs=EPOCHS)[0])
    assert capsys.readouterr().err.splitlines()[0].startswith(f"warning: {path} is ignored: ")
    assert not Path("unpickled").exists()


def test_a_checkpoint_that_cannot_be_written_costs_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".dvc").write_text("in the way")
    rest = Listener()
    fit(listener=rest, epochs=2, checkpoint_epochs=1)
    assert steps(rest) == [1, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no checkpoint of epoch 1: cannot write ")


def test_a_training_that_was_cut_off_after_its_last_epoch_writes_its_history(project: Project) -> None:
    command = Pipeline(project.folder).command("train")
    model, history = project.folder / "models/lenet.safetensors", project.folder / "metrics/history.csv"
    expected = model.read_bytes(), history.read_bytes()
    model.unlink()
    model.mkdir()  # no file can replace it: the training ends before it has written its model
    assert "cannot write models/lenet.safetensors" in project.run(*command, check=False).stderr
    model.rmdir()
    history.unlink()
    assert "continuing after epoch 3/3, from a checkpoint" in project.run(*command).stdout
    assert (model.read_bytes(), history.read_bytes()) == expected


class BatchNormLeNet(LeNet):
    """LeNet with batch normalisation, whose running mean and variance are buffers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.added_norm = nn.BatchNorm1d(1)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1).unsqueeze(1).float()  # of images in grey or in colour
        return super().forward(self.added_norm(pixels).view(images.shape))


class DropoutLeNet(LeNet):
    """LeNet with dropout, which draws random numbers at each step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.added_dropout = nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.added_dropout(images.float()))


@pytest.mark.parametrize("network", [BatchNormLeNet, DropoutLeNet])
def test_a_network_with_buffers_or_random_numbers_continues_to_the_same_bits(
    network: type[LeNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.training.LeNet", network)
    whole, history = fit(epochs=EPOCHS)
    with pytest.raises(KeyboardInterrupt):
        fit(listener=CutOff(2), epochs=EPOCHS, checkpoint_epochs=1)
    torch.rand(3)  # what the process drew before does not matter
    rest = Listener()
    resumed, resumed_history = fit(listener=rest, epochs=EPOCHS)
    assert steps(rest) == [3, 4]
    assert resumed_history == history
    assert bits(resumed) == bits(whole)


def test_the_modules_that_decide_the_result_are_train_s_deps() -> None:
    deps = Pipeline(ROOT).deps("train")
    assert [f"stages/{name}" for name in CODE] == sorted(dep for dep in deps if dep.startswith("stages/"))
