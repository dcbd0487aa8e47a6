"""LeNet, its initial weights, its file, and its predictions."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from stages.dataset import check_classes
from stages.stage import StageError, shorten, write

ACTIVATIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu}

# Gains that keep the signal's size from layer to layer: 1 / sigmoid'(0), and √2 for ReLU
# (He et al. 2015, https://arxiv.org/abs/1502.01852).
GAINS = {"sigmoid": 4.0, "relu": 2.0**0.5}

MIN_SIDE, MAX_SIDE = 16, 256  # pixels: what the layers need, and the most that a model file may claim

DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # by the names of safetensors; int64 counts BatchNorm's batches


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998, http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf) with max-pooling.

    44,426 parameters for grey images of 28 by 28 and 10 classes. `mean` and `std`, in pixel values 0..255, standardise
    the input and travel with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, activation: str, classes: list[str], shape: Sequence[int], mean: float = 0.0, std: float = 255.0
    ) -> None:
        """`shape` is that of an image: (H, W), or (H, W, 3) in colour. Raises ValueError if it does not fit."""
        super().__init__()
        if len(shape) not in (2, 3) or not all(MIN_SIDE <= side <= MAX_SIDE for side in shape[:2]):
            raise ValueError(f"expected images of {MIN_SIDE} to {MAX_SIDE} pixels a side, found {tuple(shape)}")
        self.activation, self.classes, self.shape = activation, classes, tuple(shape)
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in shape[:2])
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.conv1 = nn.Conv2d(shape[2] if len(shape) == 3 else 1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * rows * columns, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, len(classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 (B, classes) of images uint8 (B, *shape). Sizes in comments are for 28 by 28."""
        activate = ACTIVATIONS[self.activation]
        pixels = images.permute(0, 3, 1, 2) if len(self.shape) == 3 else images.unsqueeze(1)
        x = (pixels.float() - self.mean) / self.std  # (B, 1, 28, 28)
        # Pooling first gives the same numbers, since both activations are monotonic, with a quarter of the work.
        x = activate(F.max_pool2d(convolve(self.conv1, x), 2))  # (B, 6, 12, 12)
        x = activate(F.max_pool2d(convolve(self.conv2, x), 2))  # (B, 16, 4, 4)
        x = activate(self.fc1(x.flatten(1)))  # (B, 120)
        x = activate(self.fc2(x))  # (B, 84)
        return self.fc3(x)

    def init_xavier(self) -> None:
        """Draw the weights Xavier-uniform with the activation's gain (1 for the last layer); biases 0.

        Source: Glorot and Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html
        """
        gain = GAINS[self.activation]
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight, gain=1.0 if layer is self.fc3 else gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer(x); on a GPU by a matrix product, as cuDNN's kernels for so few channels make a step a third longer."""
    return convolve_patches(layer, x) if x.is_cuda else layer(x)


def convolve_patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer(x) of x float32 (B, C, H, W), up to rounding, for a layer of stride 1 and no padding."""
    rows, columns = layer.kernel_size
    patches = x.permute(0, 2, 3, 1).unfold(1, rows, 1).unfold(2, columns, 1)  # (B, H', W', C, rows, columns)
    return F.linear(patches.flatten(3), layer.weight.flatten(1), layer.bias).permute(0, 3, 1, 2)


@torch.inference_mode()
def predict(model: LeNet, images: Tensor, batch_size: int) -> Tensor:
    """Logits float32 (N, classes) of images uint8 (N, *shape), `batch_size` images at a time.

    Raises StageError if they are not finite.
    """
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(batch_size)])
    if not logits.isfinite().all():
        raise StageError("expected finite numbers from the model, found others; train again with a lower train.lr")
    return logits


def write_model(path: Path, model: LeNet) -> None:
    """Write the weights and what else is needed to use them; the same model gives the same bytes.

    Raises StageError if the file cannot be written.
    """
    # One metadata key: safetensors does not keep the order of several.
    config = {"activation": model.activation, "classes": model.classes, "shape": model.shape}
    metadata = {"lenet": json.dumps(config, sort_keys=True)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    write(path, save(tensors, metadata))


def read_model(path: Path) -> LeNet:
    """Read a model, on the CPU, in channels-last. Raises StageError if train did not write the file."""
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["lenet"])
            if config["activation"] not in ACTIVATIONS:
                raise ValueError(f"its activation is {config['activation']!r}")
            check_classes(config["classes"])
            model = LeNet(config["activation"], config["classes"], config["shape"])
            expected = {name: (DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in model.state_dict().items()}
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (entry.get_dtype(), entry.get_shape()) for name, entry in entries.items()}
            if found != expected:
                name = min(name for name in expected | found if expected.get(name) != found.get(name))
                raise ValueError(f"its {name} is {found.get(name, 'missing')}, not {expected.get(name, 'there')}")
            tensors = {name: file.get_tensor(name) for name in expected}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("its weights are not finite")
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:  # also RecursionError
        raise StageError(f"{path} is not a model that train wrote ({shorten(error)}); run `dvc repro train`") from None
    return model.to(memory_format=torch.channels_last)
