"""The data set's files: safetensors with `images` and `labels`, and the names of the classes as metadata."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from stages.stage import StageError, shorten, write


class Dataset(NamedTuple):
    images: np.ndarray  # uint8 (N, 28, 28), 0 is background
    labels: np.ndarray  # uint8 (N,), 0..9
    classes: list[str]  # 10 names


def write_dataset(path: Path, dataset: Dataset) -> None:
    """Write a data set; the same data give the same bytes. Raises StageError where it cannot be written."""
    # One metadata key: safetensors does not keep the order of several.
    metadata = {"classes": json.dumps(dataset.classes)}
    write(path, save({"images": dataset.images, "labels": dataset.labels}, metadata))


def read_dataset(path: Path) -> Dataset:
    """Read a data set. Raises StageError where the file is not one of ours."""
    try:
        with safe_open(path, framework="numpy") as file:
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
            classes = json.loads(file.metadata()["classes"])
            check_classes(classes)
    # NumPy has not all types of safetensors (AttributeError), and json.loads not all depths (RecursionError).
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = shorten(error)
        raise StageError(f"{path} is not a data set that fetch wrote ({reason}); run `dvc repro fetch`") from None
    check_dataset(path, images, labels)
    return Dataset(images, labels, classes)


def check_classes(classes: object) -> None:
    """Raise ValueError unless these are the names of 10 classes."""
    if not isinstance(classes, list) or len(classes) != 10 or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are not 10 names")


def check_dataset(name: object, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise StageError unless images are uint8 (N, 28, 28), N > 0, and labels uint8 (N,) below 10."""
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
        raise StageError(f"{name}: expected images uint8 (N, 28, 28), found {images.dtype} {images.shape}")
    if labels.dtype != np.uint8 or labels.shape != (len(images),):
        raise StageError(f"{name}: expected labels uint8 ({len(images)},), found {labels.dtype} {labels.shape}")
    if labels.max() > 9:
        raise StageError(f"{name}: expected labels 0 to 9, found {labels.max()}")
