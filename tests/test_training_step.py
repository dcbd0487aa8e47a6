"""A step's CUDA graph learns the same as a step without one. Without a GPU, everything but the capture runs here."""

import platform
import resource
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stages.device import set_up_device
from stages.lenet import LeNet
from stages.training_step import WARM_UP_STEPS, Step

BATCH_SIZE = 8


def learn(device: torch.device, graph: bool) -> dict[str, Tensor]:
    """The weights and the sums after a few batches, of which the last is shorter."""
    torch.manual_seed(0)
    model = LeNet("sigmoid", list("0123456789"), (28, 28)).to(device)
    images = torch.randint(256, (30, 28, 28), dtype=torch.uint8).to(device)
    labels = (torch.arange(30) % 10).to(device)
    step = Step(model, images, labels)
    if graph:
        step.use_cuda_graph(BATCH_SIZE)
    for number, batch in enumerate(torch.arange(30, device=device).split(BATCH_SIZE)):
        step(batch, lr=0.01 * (number + 1))
    return {**model.state_dict(), "loss": step.loss_sum, "correct": step.correct}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(autouse=True)
def deterministic() -> None:
    set_up_device("cpu", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here, a capture succeeds")
def test_without_a_gpu_the_capture_fails_with_a_warning_and_changes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_same_bits(learn(torch.device("cpu"), graph=True), learn(torch.device("cpu"), graph=False))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no CUDA graph (")


def test_the_steps_before_a_capture_are_undone_and_each_batch_is_replayed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replays: list[Tensor] = []

    def capture(self: Step) -> Callable[[], None]:
        for _ in range(WARM_UP_STEPS):
            self._run(self._batch)

        def replay() -> None:
            replays.append(self._batch.clone())
            self._run(self._batch)

        return replay

    plain = learn(torch.device("cpu"), graph=False)
    monkeypatch.setattr(Step, "_capture", capture)
    assert_same_bits(learn(torch.device("cpu"), graph=True), plain)
    assert len(replays) == 3, "all but the last, which is shorter"
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_graph_gives_the_same_bits_as_no_graph(capsys: pytest.CaptureFixture[str]) -> None:
    device = set_up_device("cuda", 1)
    assert_same_bits(learn(device, graph=True), learn(device, graph=False))
    assert capsys.readouterr().err == "", "it was captured"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_on_a_large_batch_reuses_the_memory_of_the_step_before() -> None:
    images = torch.zeros(1000, 28, 28, dtype=torch.uint8)
    model = LeNet("sigmoid", list("0123456789"), (28, 28)).to(memory_format=torch.channels_last)
    step = Step(model, images, torch.arange(1000) % 10)

    def page_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step(torch.arange(1000), lr=0.01)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults = statistics.median([page_faults() for _ in range(15)][5:])
    assert faults < 100, "its tensors take over 10,000 pages"
