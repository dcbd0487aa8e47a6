"""A tiny data set, whose images show their labels."""

import functools

import numpy as np

TRAIN_SIZE, TEST_SIZE = 600, 200
SHAPE = (28, 28)
CLASSES = [f"T-shirt/top {label}" for label in range(10)]


def make_idx(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def make_images(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images uint8 (N, *SHAPE) that show their labels: a bright rectangle in noise, at a different place for each."""
    images = rng.integers(0, 60, (len(labels), *SHAPE), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 + 10 * (label // 5), 1 + 5 * (label % 5)
        image[row : row + 8, column : column + 5] += 180
    return images


@functools.cache
def make_tiny_files() -> dict[str, bytes]:
    """The content of the four IDX files, by their keys in params.yaml. One image is in both sets."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in (("train", TRAIN_SIZE), ("test", TEST_SIZE)):
        labels = rng.permutation(np.arange(size, dtype=np.uint8) % len(CLASSES))
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = make_images(labels, rng), labels
    for kind in ("images", "labels"):
        arrays[f"train_{kind}"][0] = arrays[f"test_{kind}"][0]
    return {key: make_idx(array) for key, array in arrays.items()}
