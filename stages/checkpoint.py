"""The checkpoint of a training: a file outside the outs, from which only the very same training continues.

It holds everything that decides the rest of the training: what `Step.state` names, and the state of each device's
random number generator. It is in .dvc/tmp/checkpoints of the project, named by a hash of everything that decides the
result: data, params, code, versions and hardware. So no other training ever uses it, and the folder may be deleted at
any time.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stages.dataset import Dataset
from stages.device import rng_states, set_rng_states
from stages.stage import StageError, write

if TYPE_CHECKING:
    from stages.params import Train

# The modules that decide the result: those in train's deps.
CODE = (
    "checkpoint.py",
    "cpu.py",
    "dataset.py",
    "device.py",
    "figure.py",
    "lenet.py",
    "stage.py",
    "train.py",
    "training.py",
    "training_step.py",
    "turns.py",
)
HERE = Path(__file__).parent
FOLDER = Path(".dvc", "tmp", "checkpoints")  # DVC keeps this .dvc/tmp out of git


class Checkpoint:
    """The state of one training after an epoch, and the metrics of each epoch so far."""

    def __init__(self, params: "Train", dataset: Dataset, device: torch.device) -> None:
        self.key = _key(params, dataset, device)
        # In `dvc exp run --temp` the working folder is a copy that DVC deletes; DVC_ROOT names the real project.
        self.path = Path(os.environ.get("DVC_ROOT", ".")) / FOLDER / f"{self.key[:16]}.safetensors"
        self._warned = False

    def save(self, state: Mapping[str, Tensor], history: list[dict[str, Any]]) -> None:
        """Write the file. If that fails, warn once: the training itself can continue."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()} | rng_states()
        content = {"key": self.key, "history": history, "sha256": _sha256(tensors)}
        try:
            # One metadata key: safetensors does not keep the order of several.
            write(self.path, save(tensors, {"checkpoint": json.dumps(content)}))
        except StageError as error:
            if not self._warned:
                print(f"warning: no checkpoint of epoch {len(history)}: {error}", file=sys.stderr)
            self._warned = True

    def load(self, state: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Copy the file's state into these tensors, and return the history; [] if there is no file.

        Also restores the random number generators. A file that is damaged, or belongs to another training, is ignored
        with a warning.
        """
        if not self.path.exists():
            return []
        try:
            with safe_open(self.path, framework="pt") as file:
                content = json.loads(file.metadata()["checkpoint"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if content["key"] != self.key or content["sha256"] != _sha256(tensors):
                raise ValueError("it differs from what this training wrote")
            if _shapes(tensors) != _shapes({**state, **rng_states()}):
                raise ValueError("its tensors do not fit this training")
            history = list(content["history"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            print(f"warning: {self.path} is ignored: {str(error).splitlines()[0]}", file=sys.stderr)
            return []
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])
        set_rng_states(tensors)
        return history

    def remove(self) -> None:
        """Remove the file, as the training is done."""
        with contextlib.suppress(OSError):  # a leftover does no harm
            self.path.unlink()


def _key(params: "Train", dataset: Dataset, device: torch.device) -> str:
    """SHA-256 of everything that decides the result."""
    hardware: object = dict(torch.cpu.get_capabilities())  # PyTorch chooses its kernels by these
    if device.type == "cuda":
        hardware = [torch.cuda.get_device_name(device), torch.version.cuda, torch.backends.cudnn.version()]
    parts = {
        "params": {key: value for key, value in vars(params).items() if key != "checkpoint_epochs"},
        "data": [hashlib.sha256(part.tobytes()).hexdigest() for part in (dataset.images, dataset.labels)],
        "classes": dataset.classes,
        "code": {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in CODE},
        "versions": [torch.__version__, np.__version__],
        "hardware": hardware,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and values of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
