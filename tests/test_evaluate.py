"""Metrics equal an independent computation: scikit-learn's, from the written predictions."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TEST_SIZE, Project
from sklearn.metrics import accuracy_score, classification_report, f1_score, log_loss

from stages.dataset import read_dataset
from stages.evaluate import score, score_classes
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
    scores = score(labels, predicted)
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
    assert metrics["test_loss"] == pytest.approx(log_loss(dataset.labels, probabilities, labels=range(10)), rel=1e-5)
    rows = pd.read_csv(folder / "metrics/predictions.csv")
    assert rows["actual"].tolist() == [model.classes[label] for label in dataset.labels]
    assert rows["predicted"].tolist() == [model.classes[label] for label in probabilities.argmax(1)]
    assert len(rows) == TEST_SIZE
