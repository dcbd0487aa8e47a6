"""Figures as PNG: legible in black and white, and the same bytes each time."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from stages.stage import write

DARK, MIDDLE, LIGHT = "#222222", "#7f7f7f", "#cfcfcf"


def make_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, in matplotlib's default style whatever the user's, since its bytes are an out."""
    matplotlib.rcdefaults()
    return Figure((width, height), layout="constrained")


def write_png(path: Path, figure: Figure) -> None:
    """Write a figure. Raises StageError if the file cannot be written."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100, metadata={"Software": None})
    write(path, stream.getvalue())
