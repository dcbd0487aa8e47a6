"""A stage's side of its MLflow run: what happens is sent to a recorder process, so that MLflow costs no time.

The recorder (stages/recorder.py) imports MLflow and talks to the store while the stage works. It outlives a stage
that is killed, and then closes the run as KILLED.

No stage names this module or the recorder in its deps. That is sound because nothing of them reaches an out.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.params import Params
from stages.stage import StageError


class Run:
    """The MLflow run of a stage that is at work. Its methods do not wait; each raises StageError once MLflow failed."""

    def __init__(self, stage: str, params: Params) -> None:
        # A session of its own keeps Ctrl-C, which goes to the whole foreground, from the recorder.
        self._recorder = subprocess.Popen(
            [sys.executable, "-m", "stages.recorder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            start_new_session=True,
            text=True,
        )
        now = int(time.time() * 1000)
        self._send(event="start", stage=stage, folder=str(Path.cwd()), params=params.model_dump(), time=now)

    def set_tag(self, key: str, value: str) -> None:
        self._send(event="tag", key=key, value=value)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._send(event="metrics", metrics=dict(metrics), step=step)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED, and wait until the store has all of it."""
        self._send(event="end", status=status)
        assert self._recorder.stdin
        self._recorder.stdin.close()
        if self._recorder.wait() != 0:
            self._raise_failure()

    def _send(self, **event: Any) -> None:
        assert self._recorder.stdin
        try:
            self._recorder.stdin.write(json.dumps(event) + "\n")
            self._recorder.stdin.flush()
        except BrokenPipeError:
            self._recorder.wait()
            self._raise_failure()

    def _raise_failure(self) -> None:
        assert self._recorder.stdout
        reason = self._recorder.stdout.read().strip()
        raise StageError(reason or f"the MLflow recorder ended with {self._recorder.returncode}")


@contextlib.contextmanager
def run(stage: str, params: Params) -> Iterator[Run]:
    """Record in MLflow what the stage does in this context, and how it ends.

    Raises StageError where the store cannot be used: soon, when that is known soon, else at the end.
    """
    current = Run(stage, params)
    try:
        yield current
    except BaseException as error:
        with contextlib.suppress(StageError):  # the first failure is the one to tell
            current.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    current.end("FINISHED")
