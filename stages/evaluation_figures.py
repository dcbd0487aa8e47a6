"""The figures of evaluate."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from stages.figure import DARK, LIGHT, MIDDLE, make_figure

MISTAKES = 36


def plot_confusion(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> Figure:
    """The percentage of each class's images predicted as each class; labels and predictions (N,)."""
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (labels, predicted), 1)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = make_figure(7.5, 6.5)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        if share:
            text = f"{share:.0f}" if share >= 1 else "<1"
            axes.text(column, row, text, ha="center", va="center", color="white" if share > 50 else DARK, fontsize=9)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.set(xlabel="predicted", ylabel="actual", title="Of each class's test images, taken for … (%)")
    return figure


def plot_per_class(rows: Sequence[Mapping[str, float | str]]) -> Figure:
    """Precision, recall and F1 of each class, the class with the lowest F1 on top."""
    ordered = sorted(rows, key=lambda row: float(row["f1"]), reverse=True)
    figure = make_figure(7.5, 6)
    axes = figure.subplots()
    places = np.arange(len(ordered))
    for offset, metric, colour in ((-0.27, "f1", DARK), (0, "recall", MIDDLE), (0.27, "precision", LIGHT)):
        values = [float(row[metric]) for row in ordered]
        axes.barh(places + offset, values, 0.25, color=colour, edgecolor=DARK, linewidth=0.5, label=metric)
        if metric == "f1":
            for place, value in zip(places, values, strict=True):
                axes.text(value + 0.01, place + offset, f"{value:.3f}", va="center", fontsize=8)
    axes.set_yticks(places, [str(row["class"]) for row in ordered], parse_math=False)
    axes.set(xlim=(0, 1.08), title="Precision, recall and F1 of each class (test set)")
    axes.set_xticks(np.linspace(0, 1, 6))
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)
    return figure


def plot_reliability(bins: Sequence[Mapping[str, float]], ece: float) -> Figure:
    """Accuracy against confidence, in bins of confidence, and the number of images in each."""
    figure = make_figure(6, 6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = 1 / len(bins)
    places = (np.arange(len(bins)) + 0.5) * width
    filled = np.array([row["images"] > 0 for row in bins])
    accuracies = np.array([row["accuracy"] for row in bins])
    confidences = np.array([row["confidence"] for row in bins])
    upper.bar(places[filled], accuracies[filled], width, color=LIGHT, edgecolor=DARK, label="accuracy")
    upper.plot(confidences[filled], accuracies[filled], "o", color=DARK, markersize=4, label="at the mean confidence")
    upper.plot([0, 1], [0, 1], "--", color=DARK, linewidth=1, label="calibrated")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"Reliability (test set): ECE {ece:.4f}")
    upper.legend(frameon=False, loc="upper left")
    lower.bar(places, [row["images"] for row in bins], width, color=MIDDLE, edgecolor=DARK)
    lower.set(xlabel="confidence: probability of the predicted class", ylabel="images", yscale="symlog", ylim=(0, None))
    return figure


def plot_mistakes(images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> Figure:
    """The most confident mistakes: images uint8 (N, H, W[, 3]), labels (N,), probabilities (N, C)."""
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    shown = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    height, width, *colours = images.shape[1:]  # in pixels, like the sizes below
    columns, gap, room = 6, round(width * 10 / 28), round(height * 13 / 28)
    rows = -(-MISTAKES // columns)
    canvas = np.full((rows * (height + room), columns * (width + gap), *colours), 255, np.uint8)
    figure = make_figure(columns * 1.75, rows * 1.95)
    axes = figure.subplots()
    for number, index in enumerate(shown):
        row, column = divmod(number, columns)
        top, left = row * (height + room), column * (width + gap) + gap // 2
        canvas[top : top + height, left : left + width] = images[index]
        actual, guess = classes[labels[index]], classes[predicted[index]]
        text = f"{actual}, not\n{guess} ({confidence[index]:.1%})"
        axes.text(
            left + width / 2, top + height, text, ha="center", va="top", fontsize=8, linespacing=1.1, parse_math=False
        )
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=255)
    axes.set_title(
        f"The {len(shown)} most confident of {len(wrong):,} mistakes (test set): what it is, not what was said"
    )
    axes.axis("off")
    return figure
