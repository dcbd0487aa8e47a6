"""Metrics equal an independent computation: scikit-learn's, from the written predictions."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, classification_report, f1_score, log_loss
from support.data import TEST_SIZE
from support.project import Project

from stages.dataset import read_dataset
from stages.evaluate import bin_confidence, ece, score, score_classes
from stages.evaluation_figures import plot_confusion, plot_mistakes, plot_per_class, plot_reliability
from stages.figure import write_png
from stages.lenet import predict, read_model


@pytest.mark.parametrize("missing", [None, 3], ids=["all classes", "a class never seen nor predicted"])
def test_scores_equal_scikit_learn_s(missing: int | None) -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 10, (2, 1000), dtype=np.uint8)
    agree = rng.random(1000) < 0.7
    predicted[agree] = labels[agree]
    if missing is not None:
        labels[labels == missing] = missing + 1
        predicted[predicted == missing] = missing + 1
    all_labels = list(range(10))
    scores = score(labels, predicted, all_labels)
    assert scores["test_accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert scores["test_macro_f1"] == pytest.approx(
        f1_score(labels, predicted, labels=all_labels, average="macro", zero_division=0)
    )
    report = classification_report(labels, predicted, labels=all_labels, output_dict=True, zero_division=0)
    for row in score_classes(labels, predicted, all_labels):
        expected = report[str(row["class"])]
        assert row["precision"] == pytest.approx(expected["precision"])
        assert row["recall"] == pytest.approx(expected["recall"])
        assert row["f1"] == pytest.approx(expected["f1-score"])


def test_the_files_equal_a_computation_from_the_model_and_the_data(finished_project: Project) -> None:
    folder = finished_project.folder
    dataset = read_dataset(folder / "data/fashion-mnist/test.safetensors")
    model = read_model(folder / "models/lenet.safetensors")
    probabilities = predict(model, torch.from_numpy(dataset.images), TEST_SIZE).double().softmax(1).numpy()
    metrics = json.loads((folder / "metrics/evaluate.json").read_text())
    assert metrics["test_accuracy"] == pytest.approx(accuracy_score(dataset.labels, probabilities.argmax(1)))
    assert metrics["test_loss"] == pytest.approx(
        log_loss(dataset.labels, probabilities, labels=range(len(dataset.classes))), rel=1e-5
    )
    table = pd.read_parquet(folder / "metrics/predictions.parquet")
    assert list(table.columns) == ["index", "label", "predicted", *model.classes]
    assert table["index"].tolist() == list(range(TEST_SIZE))
    assert table["label"].tolist() == dataset.labels.tolist()
    assert table["predicted"].tolist() == probabilities.argmax(1).tolist()
    assert np.abs(table[model.classes].to_numpy() - probabilities).max() < 1e-6


def test_the_calibration_error_is_that_of_an_independent_computation() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(10, 0.2), 5000).astype(np.float32)
    labels = rng.integers(0, 10, 5000, dtype=np.uint8)
    likely = rng.random(5000) < 0.6
    labels[likely] = probabilities.argmax(1)[likely]
    table = pd.DataFrame({"confidence": probabilities.max(1), "hit": probabilities.argmax(1) == labels})
    groups = table.groupby(pd.cut(table["confidence"], np.linspace(0, 1, 16), right=False), observed=True)
    expected = sum(len(group) * abs(group["hit"].mean() - group["confidence"].mean()) for _, group in groups) / 5000
    bins = bin_confidence(labels, probabilities)
    assert ece(bins) == pytest.approx(expected, rel=1e-5)
    assert sum(row["images"] for row in bins) == 5000
    certain = np.eye(10, dtype=np.float32)[labels]
    assert ece(bin_confidence(labels, certain)) == 0


def test_the_figure_shows_the_most_confident_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 28, 28), dtype=np.uint8)
    probabilities = rng.dirichlet(np.ones(10), 200).astype(np.float32)
    labels = rng.integers(0, 10, 200)
    classes = [f"class {label}" for label in range(10)]
    (axes,) = plot_mistakes(images, labels, probabilities, classes).axes
    said = [text.get_text() for text in axes.texts]
    wrong = [index for index in np.argsort(-probabilities.max(1)) if probabilities[index].argmax() != labels[index]]
    assert said == [
        f"class {labels[i]}, not\nclass {probabilities[i].argmax()} ({probabilities[i].max():.1%})" for i in wrong[:36]
    ]
    canvas = np.asarray(axes.images[0].get_array())
    for number in (0, 7, 35):
        row, column = divmod(number, 6)
        left = column * 38 + 5
        assert (canvas[row * 41 : row * 41 + 28, left : left + 28] == images[wrong[number]]).all()


def test_figures_are_drawn_if_there_is_little_to_show(tmp_path: Path) -> None:
    """A perfect model, and a class without images: no mistakes, empty bins."""
    labels = np.array([0, 1, 1, 2], np.uint8)
    probabilities = np.eye(10, dtype=np.float32)[labels]
    classes = [f"class {label}" for label in range(10)]
    rows, bins = score_classes(labels, labels, classes), bin_confidence(labels, probabilities)
    images = np.zeros((4, 28, 28), np.uint8)
    for number, figure in enumerate(
        [
            plot_confusion(labels, labels, classes),
            plot_per_class(rows),
            plot_reliability(bins, ece(bins)),
            plot_mistakes(images, labels, probabilities, classes),
        ]
    ):
        write_png(tmp_path / f"{number}.png", figure)
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert min(picture.size) >= 300
