"""Trials: runs of the pipeline as DVC experiments, several at a time. replicate and sweep share this module."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from filelock import FileLock

LOCKS = Path(".dvc", "tmp", "trials")  # DVC keeps .dvc/tmp out of git


@dataclass(frozen=True)
class Trial:
    """One run of the pipeline: its experiment's name, changes as in `dvc exp run -S`, tags of its rows in MLflow."""

    name: str
    changes: tuple[str, ...]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """What the experiments start from: a commit of the project in this folder, and the uncommitted changes to it."""

    folder: Path
    rev: str
    patch: bytes


def read_baseline() -> Baseline:
    """The baseline in the current folder. Exits if there is none, or if DVC could not commit an experiment."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    try:
        with Repo() as repo:
            baseline = Baseline(Path(repo.root_dir), repo.scm.get_rev(), _git(Path(repo.root_dir), "diff", "HEAD"))
    except (DvcException, SCMError) as error:
        sys.exit(f"error: {error}")
    except FileNotFoundError as error:
        sys.exit(f"error: expected {error.filename}, found none; install it")
    for key in ("user.name", "user.email"):  # DVC commits each experiment
        if subprocess.run(["git", "config", key], cwd=baseline.folder, capture_output=True).returncode:
            sys.exit(f"error: expected {key} in git's configuration, found none; `git config --global {key} …` sets it")
    return baseline


def experiments(folder: Path, rev: str) -> dict[str, str]:
    """The commits of the experiments that start from this one, by name."""
    listed = _git(folder, "for-each-ref", "--format=%(objectname) %(refname)", _ref(rev, ""))
    return {line.rpartition("/")[2]: line.partition(" ")[0] for line in listed.decode().splitlines()}


def _ref(rev: str, name: str) -> str:
    """Where DVC keeps an experiment."""
    return f"refs/exps/{rev[:2]}/{rev[2:]}/{name}"


def _git(folder: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout


def run(folder: Path, rev: str, trial: Trial) -> str:
    """Run a trial in a temporary copy of the project, unless its experiment exists; return why it failed, or ""."""
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    with (folder / LOCKS / f"{trial.name}.lock").open("w") as own:
        fcntl.flock(own, fcntl.LOCK_EX)  # DVC holds it, too: it may still run a trial of a command that was killed
        if trial.name in experiments(folder, rev):
            return ""
        changes = [argument for change in trial.changes for argument in ("--set-param", change)]
        output: list[str] = []
        # DVC puts each experiment on a stash, and takes the first one from it: one of two that start at once may take
        # the other's.
        with FileLock(folder / LOCKS / "start"):
            process = subprocess.Popen(
                [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", trial.name, *changes],
                cwd=folder,
                env=os.environ | _environment(trial),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                pass_fds=[own.fileno()],
            )
            assert process.stdout
            for line in process.stdout:
                output.append(line)
                if line.startswith("Reproducing experiment"):
                    break
        output += process.stdout
        process.wait()
        return "" if trial.name in experiments(folder, rev) else _reason(output)


def _environment(trial: Trial) -> dict[str, str]:
    tags = {"MLFLOW_TAGS": json.dumps(trial.tags)} if trial.tags else {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "PYTHONUNBUFFERED": "1", **tags}  # so that DVC says at once that it has started


def _reason(output: list[str]) -> str:
    """Why DVC failed: what the stage says, else what DVC says."""
    lines = [line.strip() for line in output if line.strip()]
    for pattern in (r"error: ", r"ERROR: (?!failed to reproduce)", ""):
        for number, line in enumerate(lines):
            if re.match(pattern, line):
                rest = lines[number + 1 :]
                more = [] if not line.endswith(":") else [next(iter(rest), "")]
                return " ".join([re.sub("^(error|ERROR): ", "", line), *more])[:500]
    return "it was killed"


class Here:
    """Runs trials on this machine, at most `jobs` at a time."""

    def __init__(self, baseline: Baseline, jobs: int) -> None:
        self.slots, self._baseline, self._pool = jobs, baseline, ThreadPoolExecutor(jobs)

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, _exit)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if kind:
            import psutil

            for process in psutil.Process().children(recursive=True):
                process.terminate()
        self._pool.shutdown()

    def run(self, trials: Iterator[Trial]) -> Iterator[tuple[Trial, str]]:
        """Yield each trial as it ends, with the reason if it failed; take the next one if a slot is free."""
        running: dict[Future[str], Trial] = {}
        while True:
            while len(running) < self.slots and (trial := next(trials, None)):
                running[self._pool.submit(run, self._baseline.folder, self._baseline.rev, trial)] = trial
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()


def _exit(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)
