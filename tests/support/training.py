"""Trainings in the test's own process."""

from typing import Any

import numpy as np
import torch

from stages.checkpoint import Checkpoint
from stages.dataset import Dataset
from stages.device import set_up_device
from stages.lenet import LeNet
from stages.params import Train, read_params
from stages.training import train
from support.data import make_images
from support.project import ROOT

CLASSES = [f"class {label}" for label in range(10)]
CPU = torch.device("cpu")


class Listener:
    """Keeps copies of what train reports."""

    def __init__(self) -> None:
        self.reports: list[list[dict[str, Any]]] = []

    def __call__(self, history: list[dict[str, Any]]) -> None:
        self.reports.append([dict(row) for row in history])


def make_dataset(size: int) -> Dataset:
    labels = np.arange(size, dtype=np.uint8) % 10
    return Dataset(make_images(labels, np.random.default_rng(size)), labels, CLASSES)


def make_params(**changes: Any) -> Train:
    defaults = read_params(ROOT / "params.yaml").train
    return defaults.model_copy(
        update={
            "validation_size": 100,
            "lr": 0.01,
            "batch_size": 16,
            "epochs": 3,
            "checkpoint_epochs": 0,
            "threads": 1,  # threads that spin while they wait take the cores from other processes
            **changes,
        }
    )


def fit(dataset: Dataset | None = None, listener: Listener | None = None, **changes: Any) -> tuple[LeNet, list[dict]]:
    params, dataset = make_params(**changes), dataset or make_dataset(600)
    set_up_device("cpu", params.threads)
    return train(dataset, params, CPU, Checkpoint(params, dataset, CPU), listener or Listener())


def bits(model: LeNet) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
