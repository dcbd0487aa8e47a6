"""Train LeNet.

python -m stages.train data/fashion-mnist/train.safetensors --model models/lenet.safetensors
--metrics metrics/train.json --history metrics/history.csv --plots metrics/plots
"""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages import cpu, stage

if __name__ == "__main__":
    stage.prepare()
    cpu.import_torch("train")

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stages.checkpoint import Checkpoint
from stages.dataset import read_dataset
from stages.device import set_up_device
from stages.figure import DARK, LIGHT, MIDDLE, make_figure, write_png
from stages.lenet import write_model
from stages.params import read_params
from stages.stage import check_inputs, write_csv, write_json
from stages.training import train
from stages.turns import turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="training set (safetensors)")
    parser.add_argument("--model", type=Path, required=True, help="weights to write (safetensors)")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics of the last epoch to write (JSON)")
    parser.add_argument("--history", type=Path, required=True, help="metrics of each epoch to write as it ends (CSV)")
    parser.add_argument("--plots", type=Path, required=True, help="folder for the figures to write (PNG)")
    args = parser.parse_args()
    params = read_params()
    check_inputs(args.dataset)

    device = set_up_device(params.train.device, params.train.threads)
    dataset = read_dataset(args.dataset)
    checkpoint = Checkpoint(params.train, dataset, device)
    with turn(params.train.threads) if device.type == "cpu" else contextlib.nullcontext():
        model, history = train(dataset, params.train, device, checkpoint, lambda rows: write_csv(args.history, rows))
    write_model(args.model, model)
    write_csv(args.history, history)  # again: a training that was killed after its last epoch has none left to report
    write_json(args.metrics, {key: value for key, value in history[-1].items() if key not in ("epoch", "train_lr")})
    write_png(args.plots / "curves.png", plot_curves(history))
    checkpoint.remove()


def plot_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss and accuracy of each epoch, on the training split and, if there is one, the validation split."""
    figure = make_figure(9, 3.8)
    epochs = [row["epoch"] for row in history]
    for axes, metric, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("cross entropy", "accuracy"), strict=True
    ):
        for part, colour, style in (("train", DARK, "o-"), ("validation", MIDDLE, "s--")):
            if f"{part}_{metric}" in history[0]:
                values = [row[f"{part}_{metric}"] for row in history]
                name = "training, while it learns" if part == "train" else "validation, after each epoch"
                axes.plot(epochs, values, style, color=colour, label=name, markersize=4)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=LIGHT, linewidth=0.5)
        axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    stage.run(main)
