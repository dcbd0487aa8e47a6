"""The CPU: which bits PyTorch computes on it, and which of its cores this process may use.

PyTorch's libraries choose their kernels by the CPU's instruction set and vendor, once, unless environment variables
select them. So these are set before PyTorch is imported.
"""

import os
import sys
from pathlib import Path

# The same bits on every x86-64 CPU with AVX2.
PORTABLE = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # oneDNN: convolutions
    "ATEN_CPU_CAPABILITY": "avx2",  # PyTorch's own kernels
    "MKL_CBWR": "COMPATIBLE",  # MKL: matrix products; its other modes give Intel and AMD different bits
}
# These affect bits too: kernels, their precision, and the actual number of threads.
UNSET = (
    "DNNL_MAX_CPU_ISA",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_ENABLE_INSTRUCTIONS",
    "OMP_DYNAMIC",
    "OMP_THREAD_LIMIT",
    "ONEDNN_DEFAULT_FPMATH_MODE",
)
ALLOWED: set[int] = set()  # the cores of this process, before OpenMP binds each thread to one
OWN_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def import_torch(section: str) -> None:
    """Import PyTorch, set up for the CPU by `bits` and `threads` in this section of params.yaml.

    `bits` overrides the environment, with a warning, since the params must decide the bits.
    """
    values = _read(section)
    portable = values.get("bits") != "native"
    if portable and not has_avx2():
        print(
            f"warning: {section}.bits: portable needs an x86-64 CPU with AVX2, which this is not; "
            "its results have other bits than in dvc.lock",
            file=sys.stderr,
        )
        portable = False
    wanted = PORTABLE if portable else {}
    for name in (*PORTABLE, *UNSET):
        found, value = os.environ.pop(name, None), wanted.get(name)
        if found not in (None, value):
            print(f"warning: {name}={found} in the environment is ignored: {section}.bits decides", file=sys.stderr)
        if value is not None:
            os.environ[name] = value
    # Beside a busy process, threads that spin while they wait, or that share a core, halve the rate.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    ALLOWED.update(affinity())
    threads = values.get("threads")
    if ALLOWED and isinstance(threads, int) and threads >= len(ALLOWED):
        os.environ.setdefault("OMP_PROC_BIND", "true")
    import torch  # noqa: F401  # OpenMP binds this thread, too: it would share a core with one that it waits for


def has_avx2() -> bool:
    """Whether this is an x86-64 CPU with AVX2 and FMA, as the CPU itself reports."""
    from numpy._core._multiarray_umath import __cpu_features__ as features  # type: ignore[import-not-found]

    return bool(features.get("AVX2") and features.get("FMA3"))


def _read(section: str) -> dict[str, object]:
    """The section as it stands, unchecked; {} if there is none: the stage reports what is wrong."""
    from stages.params import StageError, read_values

    try:
        return dict(read_values()[section])
    except (StageError, KeyError, TypeError, ValueError):
        return {}


def affinity() -> set[int]:
    """The cores that the system lets this thread use; empty if the system cannot say, as macOS cannot."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def cores() -> list[int]:
    """The numbers of the cores that this process may use: its affinity, limited to its cgroup's quota."""
    allowed = sorted(ALLOWED or affinity() or range(os.cpu_count() or 1))
    return allowed[: _quota(len(allowed))]


def _quota(most: int) -> int:
    """The whole cores, at least 1 and at most `most`, that cgroups (version 2) allow, as containers set them.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    try:
        (own,) = [line for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::/")]
    except (OSError, ValueError):
        return most
    folder = CGROUPS / own.removeprefix("0::/")
    for place in (folder, *folder.parents):
        try:
            quota, period = (place / "cpu.max").read_text().split()
            most = min(most, max(1, -(-int(quota) // int(period))))
        except (OSError, ValueError):  # no limit ("max"), or no such file
            continue
    return most
