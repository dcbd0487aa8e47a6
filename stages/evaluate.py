"""Evaluate the model on every test image, once.

python -m stages.evaluate data/fashion-mnist/test.safetensors models/lenet.safetensors
--metrics metrics/evaluate.json --per-class metrics/per_class.json --predictions metrics/predictions.parquet
--plots metrics/plots
"""

import argparse
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages import cpu, stage

if __name__ == "__main__":
    stage.prepare()
    cpu.import_torch("evaluate")

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from stages.dataset import read_dataset
from stages.device import set_up_device
from stages.evaluation_figures import plot_confusion, plot_mistakes, plot_per_class, plot_reliability
from stages.figure import write_png
from stages.lenet import predict, read_model
from stages.params import read_params
from stages.stage import StageError, check_inputs, write, write_json

ECE_BINS = 15  # as in the source
PER_CLASS = ("precision", "recall", "f1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="test set (safetensors)")
    parser.add_argument("model", type=Path, help="weights (safetensors)")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics to write (JSON)")
    parser.add_argument("--per-class", type=Path, required=True, help="metrics per class to write (JSON)")
    parser.add_argument("--predictions", type=Path, required=True, help="predictions to write (Parquet)")
    parser.add_argument("--plots", type=Path, required=True, help="folder for the figures to write (PNG)")
    args = parser.parse_args()
    params = read_params()
    check_inputs(args.dataset, args.model)

    device = set_up_device(params.evaluate.device, params.evaluate.threads)
    dataset, model = read_dataset(args.dataset), read_model(args.model)
    if (model.classes, model.shape) != (dataset.classes, dataset.images.shape[1:]):
        raise StageError(
            f"expected {args.model} to have the classes and shape of {args.dataset}, found others; run `dvc repro`"
        )
    images = torch.from_numpy(dataset.images).to(device)
    logits = predict(model.to(device), images, params.evaluate.batch_size).cpu()
    labels, predicted, probabilities = dataset.labels, logits.argmax(1).numpy(), logits.softmax(1).numpy()
    losses = F.cross_entropy(logits, torch.from_numpy(labels).long(), reduction="none")
    rows, bins = score_classes(labels, predicted, model.classes), bin_confidence(labels, probabilities)

    scores = {
        "test_loss": losses.double().mean().item(),
        **score(labels, predicted, model.classes),
        "test_ece": ece(bins),
    }
    write_json(args.metrics, scores)
    write_json(args.per_class, {key: {row["class"]: row[key] for row in rows} for key in PER_CLASS})
    write_predictions(args.predictions, labels, predicted, probabilities, model.classes)
    write_png(args.plots / "confusion.png", plot_confusion(labels, predicted, model.classes))
    write_png(args.plots / "per_class.png", plot_per_class(rows))
    write_png(args.plots / "reliability.png", plot_reliability(bins, scores["test_ece"]))
    write_png(args.plots / "mistakes.png", plot_mistakes(dataset.images, labels, probabilities, model.classes))
    print(f"test accuracy {scores['test_accuracy']:.4f} on {len(labels):,} images")


def score(labels: np.ndarray, predicted: np.ndarray, classes: Iterable[object]) -> dict[str, float]:
    """Accuracy and macro-F1, 0..1, of labels and predictions (N,)."""
    f1 = [row["f1"] for row in score_classes(labels, predicted, classes)]
    return {
        "test_accuracy": float((labels == predicted).mean()),
        "test_macro_f1": math.fsum(f1) / len(f1),  # sum() rounds differently from Python 3.12 on
    }


def score_classes(labels: np.ndarray, predicted: np.ndarray, classes: Iterable[object]) -> list[dict[str, Any]]:
    """Precision, recall and F1, 0..1, of each class, of labels and predictions (N,).

    A ratio with denominator 0 is 0, as in scikit-learn's classification_report(zero_division=0).
    """
    rows = []
    for label, name in enumerate(classes):
        actual, guessed = labels == label, predicted == label
        hits, actuals, guesses = int((actual & guessed).sum()), int(actual.sum()), int(guessed.sum())
        precision, recall = hits / max(guesses, 1), hits / max(actuals, 1)
        f1 = 2 * hits / max(actuals + guesses, 1)
        rows.append({"class": name, "precision": precision, "recall": recall, "f1": f1})
    return rows


def bin_confidence(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, float]]:
    """Images, accuracy and mean confidence in ECE_BINS equal bins of confidence; labels (N,), probabilities (N, C).

    Confidence is the probability of the predicted class. An empty bin has accuracy and confidence 0.
    """
    confidences, hits = probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels
    places = np.minimum((confidences * ECE_BINS).astype(int), ECE_BINS - 1)
    rows = []
    for number in range(ECE_BINS):
        inside = places == number
        images = int(inside.sum())
        accuracy, confidence = int(hits[inside].sum()) / max(images, 1), math.fsum(confidences[inside]) / max(images, 1)
        rows.append({"images": images, "accuracy": accuracy, "confidence": confidence})
    return rows


def ece(bins: list[dict[str, float]]) -> float:
    """Expected calibration error, 0..1: the distance of confidence from accuracy, averaged over all images.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599.
    """
    total = sum(row["images"] for row in bins)
    return math.fsum(row["images"] / total * abs(row["accuracy"] - row["confidence"]) for row in bins)


def write_predictions(
    path: Path, labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray, classes: Iterable[str]
) -> None:
    """Write a table with a row per image: index, label and predicted, and the probability of each class.

    Raises StageError if it cannot be written.
    """
    table = pd.DataFrame({"index": np.arange(len(labels)), "label": labels, "predicted": predicted.astype(np.uint8)})
    content = io.BytesIO()
    table.join(pd.DataFrame(probabilities, columns=list(classes))).to_parquet(content, index=False)
    write(path, content.getvalue())


if __name__ == "__main__":
    stage.run(main)
