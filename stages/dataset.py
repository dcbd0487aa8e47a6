"""The data set's files: safetensors with `images` and `labels`, and the names of the classes as metadata."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from stages.stage import StageError, shorten, write


class Dataset(NamedTuple):
    images: np.ndarray  # uint8 (N, H, W), or (N, H, W, 3) in colour
    labels: np.ndarray  # uint8 (N,), each the index of its class in `classes`
    classes: list[str]


def write_dataset(path: Path, dataset: Dataset) -> None:
    """Write a data set; the same data give the same bytes. Raises StageError if it cannot be written."""
    # One metadata key: safetensors does not keep the order of several.
    metadata = {"classes": json.dumps(dataset.classes)}
    write(path, save({"images": dataset.images, "labels": dataset.labels}, metadata))


def read_dataset(path: Path) -> Dataset:
    """Read a data set. Raises StageError if fetch did not write the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
            classes = json.loads(file.metadata()["classes"])
            check_classes(classes)
    # NumPy lacks some types of safetensors (AttributeError); JSON may be nested too deeply (RecursionError).
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = shorten(error)
        raise StageError(f"{path} is not a data set that fetch wrote ({reason}); run `dvc repro fetch`") from None
    check_dataset(path, images, labels, classes)
    return Dataset(images, labels, classes)


def check_classes(classes: object) -> None:
    """Raise ValueError unless these are the names of 2 to 256 classes."""
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are not a list of names")
    if not 2 <= len({*classes}) == len(classes) <= 256:
        raise ValueError("its classes are not 2 to 256 different names")


def check_dataset(name: object, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Raise StageError unless images are uint8 (N, H, W) or (N, H, W, 3), N > 0, and labels uint8 (N,) of classes."""
    if images.dtype != np.uint8 or not 3 <= images.ndim <= 4 or 0 in images.shape or images.shape[3:] not in ((), (3,)):
        raise StageError(
            f"{name}: expected images uint8 (N, H, W) or (N, H, W, 3), found {images.dtype} {images.shape}"
        )
    if labels.dtype != np.uint8 or labels.shape != (len(images),):
        raise StageError(f"{name}: expected labels uint8 ({len(images)},), found {labels.dtype} {labels.shape}")
    if labels.max() >= len(classes):
        raise StageError(f"{name}: expected labels 0 to {len(classes) - 1}, found {labels.max()}")
