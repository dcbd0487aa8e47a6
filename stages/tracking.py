"""A stage's side of its MLflow run: what happens is sent to a recorder process, so that MLflow costs no time.

The recorder (stages/recorder.py) imports MLflow and talks to the store while the stage works. It outlives a stage
that is killed, and then closes the run as KILLED. A stage does not fail because MLflow does: it warns once and goes on,
and `make sync` records later what is missing. With TRACKING_STRICT=1 it fails instead, before it does anything.

No stage names this module or the recorder in its deps. That is sound because nothing of them reaches an out.
"""

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.stage import SIGNALS, StageError

END_SECONDS = 60  # how long a stage that is done waits for its recorder


@functools.cache
def start_recorder() -> subprocess.Popen[bytes]:
    """Start the recorder of this process, once: its imports take as long as PyTorch's, so do both at once."""
    return subprocess.Popen(
        [sys.executable, "-m", "stages.recorder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        start_new_session=True,  # keeps Ctrl-C, which goes to the whole foreground, from the recorder
    )


class Run:
    """The MLflow run of a stage that is at work. Its methods do not wait for MLflow."""

    def __init__(self, stage: str) -> None:
        """Begin the run. Raises StageError where tracking is strict and the store cannot be used."""
        from stages.params import read_values  # here, so that start_recorder need not wait for its imports

        self._strict = os.environ.get("TRACKING_STRICT", "") not in ("", "0", "false")
        self._lost = False
        self._recorder = start_recorder()
        assert self._recorder.stdin
        assert self._recorder.stdout
        self._events = self._recorder.stdin
        folder, now = str(Path.cwd()), int(time.time() * 1000)
        self._send(event="start", stage=stage, folder=folder, params=read_values(), time=now, pid=os.getpid())
        os.set_blocking(self._events.fileno(), False)  # a recorder that hangs must not stop the stage
        if self._strict and not self._hears("ready", time.monotonic() + END_SECONDS):
            raise StageError("MLflow cannot record this run, and TRACKING_STRICT is set")

    def set_tag(self, key: str, value: str) -> None:
        self._send(event="tag", key=key, value=value)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._send(event="metrics", metrics=dict(metrics), step=step)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED, and wait until the store has all of it.

        Raises StageError where tracking is strict and the store does not get it.
        """
        deadline = time.monotonic() + END_SECONDS
        self._send(event="end", status=status)
        if status == "FINISHED" and self._hears("complete", deadline):
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the stage has succeeded: a signal is too late now
            self._send(event="succeeded")
        if self._lost:
            self._recorder.kill()  # it must not take the missing end for a killed stage
        recorded = self._hears("closed", deadline)
        if not recorded and time.monotonic() >= deadline:
            self._recorder.kill()
            print(f"warning: MLflow took over {END_SECONDS} s; `make sync` completes the record", file=sys.stderr)
        if self._strict and not recorded:
            raise StageError("MLflow has not recorded this run, and TRACKING_STRICT is set")

    def _hears(self, word: str, deadline: float) -> bool:
        """Wait for a word of the recorder; False where it ends, or it is too late, without."""
        assert self._recorder.stdout
        said = b""
        while word.encode() not in said:
            if not select.select([self._recorder.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                return False
            if not (more := os.read(self._recorder.stdout.fileno(), 1024)):
                return False
            said += more
        return True

    def _send(self, **event: Any) -> None:
        """Send an event, unless one before was lost. What is lost here stands in the stage's files."""
        if not self._lost:
            try:
                self._events.write(json.dumps(event).encode() + b"\n")
                self._events.flush()
            except OSError:  # the recorder has ended, or hangs and the pipe is full
                self._lost = True


@contextlib.contextmanager
def run(stage: str) -> Iterator[Run]:
    """Record in MLflow what the stage does in this context, and how it ends.

    Raises StageError where tracking is strict (TRACKING_STRICT=1) and the store cannot be used.
    """
    current = Run(stage)
    try:
        yield current
    except BaseException as error:
        with contextlib.suppress(StageError):  # the first failure is the one to tell
            current.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    current.end("FINISHED")
