"""A step of training: plain PyTorch, and on a GPU the same as a CUDA graph."""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from stages.device import rng_states, set_rng_states
from stages.lenet import LeNet

WARM_UP_STEPS = 3  # before a capture, as https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs has it


class Step:
    """A step of Adam on a batch; also adds up the loss and the correct predictions.

    Adam is PyTorch's functional form, with the class's defaults: building a torch.optim.Optimizer imports
    torch._dynamo, which takes a second, and its bookkeeping is 8 % of a step this small.
    """

    def __init__(self, model: LeNet, images: Tensor, labels: Tensor) -> None:
        """Train `model` on images uint8 (N, *shape) with labels int64 (N,), all on one device."""
        self.model, self.images, self.labels = model, images, labels
        device = images.device
        # A tensor, so that a CUDA graph can read it: float32 there, float64 on CPU, as if it were a Python number.
        self.lr = torch.zeros((), dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)
        self.params: list[Tensor] = list(model.parameters())
        self.exp_avgs = [torch.zeros_like(param) for param in self.params]  # Adam's mean of the gradient
        self.exp_avg_sqs = [torch.zeros_like(param) for param in self.params]  # ... and of its square
        self.steps = [torch.zeros((), device=device) for _ in self.params]
        self.loss_sum = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self._batch = torch.zeros(0, dtype=torch.int64, device=device)  # what the graph reads, if there is one
        self._replay: Callable[[], None] | None = None

    def state(self) -> dict[str, Tensor]:
        """What a step changes and the next one depends on, by name: the tensors themselves, not copies.

        The random number generators are not in it: PyTorch keeps them.
        """
        names = [name for name, _ in self.model.named_parameters()]
        kinds = {"param": self.params, "exp_avg": self.exp_avgs, "exp_avg_sq": self.exp_avg_sqs, "step": self.steps}
        state = {f"{kind}.{name}": tensor for kind, of in kinds.items() for name, tensor in zip(names, of, strict=True)}
        return state | {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}

    def __call__(self, batch: Tensor, lr: float) -> None:
        """Learn from the images at the indices int64 (B,), at this learning rate."""
        self.lr.fill_(lr)
        if self._replay and len(batch) == len(self._batch):
            self._batch.copy_(batch)
            self._replay()
        else:
            self._run(batch)

    def _run(self, batch: Tensor) -> None:
        logits, targets = self.model(self.images[batch]), self.labels[batch]
        loss = F.cross_entropy(logits, targets)
        self.model.zero_grad()
        loss.backward()
        self._adam()
        self.loss_sum += loss.detach() * len(batch)
        self.correct += (logits.detach().argmax(1) == targets).sum()

    @torch.no_grad()
    def _adam(self) -> None:
        """Kingma and Ba 2015, https://arxiv.org/abs/1412.6980."""
        adam(
            self.params,
            [param.grad for param in self.params if param.grad is not None],
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            self.steps,
            fused=True,
            capturable=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def use_cuda_graph(self, batch_size: int) -> None:
        """From now on, launch a step on `batch_size` images as one CUDA graph instead of some hundred kernels.

        If the capture fails, warns and changes nothing: the same kernels are then launched one by one.
        """
        state = [*self.state().values(), self.loss_sum, self.correct]
        before, rng = [tensor.detach().clone() for tensor in state], rng_states()
        self._batch = self._batch.new_zeros(batch_size)
        try:
            self._replay = self._capture()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(f"warning: no CUDA graph ({reason}); training continues without it, more slowly", file=sys.stderr)
        with torch.no_grad():  # undo what the warm-up learned
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        set_rng_states(rng)

    def _capture(self) -> Callable[[], None]:
        """Run the step a few times, so that libraries initialise, and capture it. Raises RuntimeError."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._run(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.model.zero_grad()  # so that the graph makes the gradients, in memory of its own
        with torch.cuda.graph(graph):
            self._run(self._batch)
        return graph.replay
