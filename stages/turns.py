"""Trainings of one user on one host take turns for the CPU cores that they need.

If two share cores, each takes many times as long: at every operation, the threads of one wait for each other while
the other has the cores.
"""

import contextlib
import fcntl
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from stages.cpu import cores

POLL_SECONDS = 0.1


@contextlib.contextmanager
def turn(threads: int) -> Iterator[None]:
    """Hold a core for each thread, or all cores if there are fewer, while the block runs; wait until they are free.

    A lock on byte N of a file in the temporary folder stands for core N. The kernel frees it when the process ends,
    however it ends, and children do not inherit it. If the file cannot be used, a warning says so and nobody waits.
    """
    path = Path(os.environ.get("TMPDIR") or "/tmp", f"training-cores-{os.getuid()}")
    with contextlib.ExitStack() as stack:
        try:
            file = _open(path)
            stack.callback(os.close, file)
            if not _take(file, threads):
                print(f"waiting for {min(threads, len(cores()))} CPU core(s), which other trainings use", flush=True)
                while not _take(file, threads):
                    time.sleep(POLL_SECONDS)
        except OSError as error:
            print(f"warning: cannot lock {path} ({error.strerror}): trainings do not take turns", file=sys.stderr)
        yield


def _open(path: Path) -> int:
    """Open the lock file. Raises OSError if it cannot be opened, or is not a file of this user."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        os.close(file)
        raise OSError(0, "it is not a file of this user")
    return file


def _take(file: int, threads: int) -> bool:
    """Lock as many cores as there are threads, or all, and return True; else lock none, so that no two can deadlock."""
    allowed, taken = cores(), list[int]()
    for core in allowed:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, core)
            taken.append(core)
        except (BlockingIOError, PermissionError):  # another has it
            continue
        if len(taken) == threads:
            return True
    if len(taken) == len(allowed):
        return True
    for core in taken:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, core)
    return False
