"""The loop learns, its bits repeat, and its numbers are right."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.training import Listener, bits, fit, make_dataset, make_params

from stages.device import set_up_device
from stages.lenet import predict, read_model, write_model
from stages.stage import StageError
from stages.training import lr_at, mean_and_std


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # checkpoints are in the current folder


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "relu"}, {"activation": "relu", "init": "default", "schedule": "constant", "lr": 0.003}],
)
def test_the_loop_learns(changes: dict) -> None:
    model, history = fit(epochs=4, **changes)
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[-1]["validation_accuracy"] > 0.9
    unseen = make_dataset(200)
    predicted = predict(model, torch.from_numpy(unseen.images), 64).argmax(1).numpy()
    assert (predicted == unseen.labels).mean() > 0.9


def test_the_same_params_give_the_same_bits_and_others_do_not() -> None:
    first, again, other_seed = (fit(epochs=1, seed=seed)[0] for seed in (7, 7, 8))
    assert bits(first) == bits(again)
    assert bits(first) != bits(other_seed)


def test_the_order_of_an_epoch_does_not_depend_on_what_ran_before() -> None:
    torch.rand(3)
    np.random.default_rng().random(3)
    first = bits(fit(epochs=2)[0])
    torch.manual_seed(123)
    assert bits(fit(epochs=2)[0]) == first


def test_after_each_epoch_the_history_up_to_it_is_reported() -> None:
    listener = Listener()
    _, history = fit(listener=listener)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert listener.reports == [history[:1], history[:2], history]
    assert list(history[0]) == [
        "epoch",
        "train_lr",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
    ]


def test_without_a_validation_split_all_images_are_trained_on() -> None:
    _, history = fit(validation_size=0, epochs=1)
    assert "validation_loss" not in history[0]


def test_train_metrics_count_every_image_once_and_a_short_batch_by_its_size() -> None:
    """With a learning rate too small to change a float32 weight, the running loss is the model's mean loss."""
    dataset = make_dataset(130)
    model, (metrics,) = fit(dataset, validation_size=0, batch_size=64, epochs=1, lr=1e-30)
    logits = predict(model, torch.from_numpy(dataset.images), 130)
    labels = torch.from_numpy(dataset.labels).long()
    assert metrics["train_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["train_accuracy"] == (logits.argmax(1) == labels).sum().item() / 130


def test_one_cycle_rises_to_lr_and_falls_to_nothing() -> None:
    params = make_params(schedule="one_cycle", warmup_fraction=0.2, lr=0.01)
    lrs = [lr_at(step, 1000, params) for step in range(1000)]
    assert np.argmax(lrs) in (199, 200)
    assert max(lrs) == pytest.approx(0.01, rel=0.01)
    assert 0 < lrs[0] < 1e-4
    assert 0 < lrs[-1] < 1e-4
    assert all(np.diff(lrs[:199]) > 0)
    assert all(np.diff(lrs[200:]) < 0)


@pytest.mark.parametrize("warmup_fraction", [0.0, 1.0])
def test_one_cycle_may_only_fall_or_only_rise(warmup_fraction: float) -> None:
    params = make_params(schedule="one_cycle", warmup_fraction=warmup_fraction)
    lrs = [lr_at(step, 10, params) for step in range(10)]
    assert all(np.diff(lrs) < 0) if warmup_fraction == 0 else all(np.diff(lrs) > 0)
    assert all(0 < lr < 0.01 for lr in lrs)


def test_constant_is_constant() -> None:
    assert {lr_at(step, 10, make_params(schedule="constant")) for step in range(10)} == {0.01}


def test_mean_and_std_are_those_of_the_chosen_pixels() -> None:
    images = torch.from_numpy(make_dataset(50).images)
    chosen = torch.arange(0, 50, 3)
    mean, std = mean_and_std(images, chosen)
    pixels = images[chosen].double()
    assert mean == pytest.approx(pixels.mean().item(), rel=1e-12)
    assert std == pytest.approx(pixels.std(correction=0).item(), rel=1e-9)
    assert mean_and_std(torch.full((2, 28, 28), 7, dtype=torch.uint8), torch.arange(2)) == (7.0, 255.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 501}, "train.batch_size: expected at most 500 images, found 501"),
        ({"validation_size": 600}, "train.validation_size: expected less than 600 images, found 600"),
        (
            {"lr": 1e38, "activation": "relu"},
            "expected a finite loss, found (nan|inf) in epoch 1; try a train.lr",
        ),
    ],
)
def test_params_that_do_not_fit_the_data_are_refused_in_one_line(changes: dict, message: str) -> None:
    with pytest.raises(StageError, match=message):
        fit(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused_in_one_line() -> None:
    with pytest.raises(StageError, match=r"expected a CUDA GPU .*found none; set device: auto or cpu"):
        set_up_device("cuda", 1)


def test_a_model_file_holds_the_whole_model_in_the_same_bytes_each_time(tmp_path: Path) -> None:
    model, _ = fit(epochs=1)
    write_model(tmp_path / "one.safetensors", model)
    write_model(tmp_path / "two.safetensors", model)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    again = read_model(tmp_path / "one.safetensors")
    assert (bits(again), again.activation, again.classes) == (bits(model), model.activation, model.classes)
