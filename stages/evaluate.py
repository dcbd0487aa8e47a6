"""Evaluate the model on every test image, once.

python -m stages.evaluate data/fashion-mnist/test.safetensors models/lenet.safetensors
--metrics metrics/evaluate.json --per-class metrics/per_class.csv --predictions metrics/predictions.csv
"""

import argparse
import gc
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages import stage, tracking

if __name__ == "__main__":
    gc.disable()  # what is imported stays: nothing of it is garbage
    tracking.start_recorder()  # its imports take as long as those that follow

import numpy as np
import torch
import torch.nn.functional as F

from stages.dataset import read_dataset
from stages.device import set_up_device
from stages.lenet import predict, read_model
from stages.params import read_params
from stages.stage import write_csv, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="test set (safetensors)")
    parser.add_argument("model", type=Path, help="weights (safetensors)")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics to write (JSON)")
    parser.add_argument("--per-class", type=Path, required=True, help="metrics of each class to write (CSV)")
    parser.add_argument("--predictions", type=Path, required=True, help="class names of each image to write (CSV)")
    args = parser.parse_args()
    params = read_params()

    with tracking.run("evaluate") as run:
        device = set_up_device(params.evaluate.device, params.evaluate.threads)
        run.set_tag("device", str(device))
        dataset, model = read_dataset(args.dataset), read_model(args.model)
        images = torch.from_numpy(dataset.images).to(device)
        logits = predict(model.to(device), images, params.evaluate.batch_size).cpu()
        predicted = logits.argmax(1).numpy()
        losses = F.cross_entropy(logits, torch.from_numpy(dataset.labels).long(), reduction="none")

        scores = {"test_loss": losses.double().mean().item(), **score(dataset.labels, predicted)}
        write_json(args.metrics, scores)
        write_csv(args.per_class, score_classes(dataset.labels, predicted, model.classes))
        pairs = zip(dataset.labels, predicted, strict=True)
        write_csv(args.predictions, [{"actual": model.classes[a], "predicted": model.classes[p]} for a, p in pairs])
        print(f"test accuracy {scores['test_accuracy']:.4f} on {len(dataset.labels):,} images")


def score(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1, 0..1, of labels and predictions (N,)."""
    f1 = [row["f1"] for row in score_classes(labels, predicted, range(10))]
    return {
        "test_accuracy": float((labels == predicted).mean()),
        "test_macro_f1": math.fsum(f1) / len(f1),
    }  # sum() rounds otherwise from Python 3.12 on


def score_classes(labels: np.ndarray, predicted: np.ndarray, classes: Iterable[object]) -> list[dict[str, Any]]:
    """Precision, recall and F1, 0..1, of each class, of labels and predictions (N,).

    A ratio with nothing below the line is 0, as in scikit-learn's classification_report(zero_division=0).
    """
    rows = []
    for label, name in enumerate(classes):
        actual, guessed = labels == label, predicted == label
        hits, actuals, guesses = int((actual & guessed).sum()), int(actual.sum()), int(guessed.sum())
        precision, recall = hits / max(guesses, 1), hits / max(actuals, 1)
        f1 = 2 * hits / max(actuals + guesses, 1)
        rows.append({"class": name, "precision": precision, "recall": recall, "f1": f1})
    return rows


if __name__ == "__main__":
    stage.run(main)
