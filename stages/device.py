"""The device that computes, set up so that the same inputs give the same bits on it."""

import ctypes
import os
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from stages.cpu import cores
from stages.stage import StageError

# glibc's mallopt(3), from malloc.h: numbers of the parameters, and the maximum of the first.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
MMAP_THRESHOLD_MAX = 32 * 2**20


def set_up_device(name: str, threads: int) -> torch.device:
    """Make PyTorch deterministic, with `threads` CPU threads; return the device that auto, cuda or cpu stands for.

    Raises StageError for cuda if there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise StageError("expected a CUDA GPU (device: cuda), found none; set device: auto or cpu in params.yaml")
    if threads > len(cores()):
        print(f"{threads} threads share {len(cores())} CPU core(s): slower, but with the same bits", file=sys.stderr)
    torch.set_num_threads(threads)  # the bits of a sum on CPU depend on how many threads share it
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms(True), but imports no compiler: 0.8 s
    # Nothing here reads memory before it is written: filling it costs 6 % of the step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions do by default: the step is an eighth faster
    # Read by cuBLAS when it starts. Source: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_freed_memory()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def rng_states() -> dict[str, Tensor]:
    """The state of PyTorch's random number generator on each device, uint8 (N,) on the CPU, by name."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"rng.cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_states(states: Mapping[str, Tensor]) -> None:
    """Set the generators to what `rng_states` returned; ignore other names."""
    torch.set_rng_state(states["rng.cpu"])
    if torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all([states[f"rng.cuda{n}"] for n in range(torch.cuda.device_count())])


def keep_freed_memory() -> None:
    """Keep freed blocks of up to 32 MiB for the next step, if the C library is glibc.

    It would return them to the system and then wait for fresh pages, for a quarter of each step on 1,000 images.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
