"""A tiny data set, whose images show their labels."""

import functools

import numpy as np

TRAIN_SIZE, TEST_SIZE = 600, 200


def make_idx(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def make_images(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images uint8 (N, 28, 28) that show their labels: a bright square, at a place of its own for each, in noise."""
    images = rng.integers(0, 60, (len(labels), 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 + 10 * (label // 5), 1 + 5 * (label % 5)
        image[row : row + 8, column : column + 5] += 180
    return images


@functools.cache
def make_tiny_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for part, size in (("train", TRAIN_SIZE), ("test", TEST_SIZE)):
        labels = rng.permutation(np.arange(size, dtype=np.uint8) % 10)
        files[f"{part}_images"] = make_idx(make_images(labels, rng))
        files[f"{part}_labels"] = make_idx(labels)
    return files
