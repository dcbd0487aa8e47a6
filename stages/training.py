"""Training: epochs of steps, from the first or from a checkpoint, with the metrics of each."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.checkpoint import Checkpoint
from stages.dataset import Dataset
from stages.lenet import LeNet, predict
from stages.stage import StageError
from stages.training_step import Step

if TYPE_CHECKING:
    from stages.params import Train

VALIDATION_BATCH_SIZE = 1000


def train(
    dataset: Dataset,
    params: "Train",
    device: torch.device,
    checkpoint: Checkpoint,
    report: Callable[[list[dict[str, Any]]], None],
) -> tuple[LeNet, list[dict[str, Any]]]:
    """Return the trained model and the metrics of each epoch; continue from the checkpoint if there is one.

    After each epoch, `report` gets the metrics of all epochs so far.

    Raises StageError if a size does not fit the data set, or if the loss is not finite.
    """
    step, training, validation = prepare(dataset, params, device)
    history = checkpoint.load(step.state())
    if history:
        print(f"continuing after epoch {len(history)}/{params.epochs}, from a checkpoint", flush=True)

    def at_end_of_epoch(metrics: dict[str, float], rate: float) -> None:
        history.append(metrics)
        if params.checkpoint_epochs and len(history) % params.checkpoint_epochs == 0:
            checkpoint.save(step.state(), history)
        report(history)
        print(describe(metrics, params.epochs, rate), flush=True)

    fit(step, training, validation, params, len(history), at_end_of_epoch)
    return step.model, history


def prepare(dataset: Dataset, params: "Train", device: torch.device) -> tuple[Step, Tensor, Tensor]:
    """Return the first step, and the indices int64 (N,) of the training and the validation images.

    Raises StageError if a size does not fit the data set.
    """
    total = len(dataset.images)
    if params.validation_size >= total:
        raise StageError(f"train.validation_size: expected less than {total:,} images, found {params.validation_size}")
    if params.batch_size > total - params.validation_size:
        available = total - params.validation_size
        raise StageError(f"train.batch_size: expected at most {available:,} images, found {params.batch_size}")
    split = torch.from_numpy(np.random.default_rng(params.seed).permutation(total))
    training, validation = split[params.validation_size :], split[: params.validation_size]
    images, labels = torch.from_numpy(dataset.images), torch.from_numpy(dataset.labels).long()
    mean, std = mean_and_std(images, training) if params.standardize else (0.0, 255.0)

    torch.manual_seed(params.seed)
    try:
        model = LeNet(params.activation, dataset.classes, dataset.images.shape[1:], mean, std)
    except ValueError as error:
        raise StageError(str(error)) from None
    if params.init == "xavier":
        model.init_xavier()
    model = model.to(memory_format=torch.channels_last).to(device)
    step = Step(model, images.to(device), labels.to(device))
    if device.type == "cuda":
        step.use_cuda_graph(params.batch_size)
    return step, training, validation


def fit(
    step: Step,
    training: Tensor,
    validation: Tensor,
    params: "Train",
    done: int,
    at_end_of_epoch: Callable[[dict[str, float], float], None],
) -> None:
    """Train on the images at these indices for the epochs after the first `done`.

    After each, the callback gets its metrics, and its rate in images a second. Raises StageError if the loss is not
    finite.
    """
    device = step.images.device
    steps = -(-len(training) // params.batch_size)  # an epoch's
    for epoch in range(done + 1, params.epochs + 1):
        start = time.perf_counter()
        # The order depends on (seed, epoch) alone, not on what ran before.
        order = training[np.random.default_rng((params.seed, epoch)).permutation(len(training))].to(device)
        lrs = [lr_at(number, params.epochs * steps, params) for number in range((epoch - 1) * steps, epoch * steps)]
        batches = order.split(params.batch_size)
        metrics = {"epoch": epoch, "train_lr": lrs[-1]} | train_epoch(step, batches, lrs)
        loss = metrics["train_loss"]
        if not np.isfinite(loss) or not all(param.isfinite().all() for param in step.params):
            found = "infinite weights" if np.isfinite(loss) else loss  # no loss has seen those of the last step yet
            raise StageError(
                f"expected a finite loss, found {found} in epoch {epoch}; try a train.lr below {params.lr}"
            )
        rate = len(training) / (time.perf_counter() - start)
        if params.validation_size:
            held_out = validation.to(device)
            metrics |= validate(step.model, step.images[held_out], step.labels[held_out])
        at_end_of_epoch(metrics, rate)


def train_epoch(step: Step, batches: Sequence[Tensor], lrs: Sequence[float]) -> dict[str, float]:
    """Take a step for each batch, at its learning rate; return the mean loss and accuracy while it learns.

    Batches are indices int64 (B,); the last may be shorter.
    """
    step.model.train()
    step.loss_sum.zero_()
    step.correct.zero_()
    for batch, lr in zip(batches, lrs, strict=True):
        step(batch, lr)
    seen = sum(len(batch) for batch in batches)
    return {"train_loss": step.loss_sum.item() / seen, "train_accuracy": step.correct.item() / seen}


def validate(model: LeNet, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean loss and accuracy on images uint8 (N, *shape) with labels int64 (N,)."""
    logits = predict(model, images, VALIDATION_BATCH_SIZE)
    return {
        "validation_loss": F.cross_entropy(logits, labels).item(),
        "validation_accuracy": (logits.argmax(1) == labels).sum().item() / len(labels),
    }


def lr_at(step: int, steps: int, params: "Train") -> float:
    """The learning rate of step 0..steps-1, from params alone, so that it needs no state.

    one_cycle is the linear form of Smith and Topin 2018, https://arxiv.org/abs/1708.07120, read at mid-step.
    """
    if params.schedule == "constant":
        return params.lr
    done = (step + 0.5) / steps
    rise = params.warmup_fraction
    return params.lr * (done / rise if done < rise else (1 - done) / (1 - rise))


def mean_and_std(images: Tensor, indices: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the pixels, 0..255, of images uint8 (N, *shape) at `indices`.

    Counted, not summed as floats, so that they are exact.
    """
    counts = torch.zeros(256, dtype=torch.int64)
    for chunk in indices.split(4096):
        counts += torch.bincount(images[chunk].flatten(), minlength=256)
    values, total = torch.arange(256), counts.sum().item()
    mean = (values * counts).sum().item() / total
    variance = (values**2 * counts).sum().item() / total - mean**2
    return mean, max(variance, 0.0) ** 0.5 or 255.0  # a set of one grey has no deviation to divide by


def describe(metrics: dict[str, float], epochs: int, rate: float) -> str:
    validation = f"  validation accuracy {metrics['validation_accuracy']:.4f}" if "validation_loss" in metrics else ""
    return f"epoch {metrics['epoch']}/{epochs}  loss {metrics['train_loss']:.4f}{validation}  {rate:,.0f} images/s"
