"""The process that records a running command; dvc_mlflow/launcher.py starts it.

Reads events from standard input, one JSON object a line: the start, the command's final status, and that the launcher
has seen it succeed. Answers on standard output: `ready` when there is a run, `complete` when everything is in it,
`closed` when it has ended. If the events end early, the launcher was killed, and the run ends as KILLED. If the store
fails, prints one line and exits with 1.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvc_mlflow.command import configure

configure()

import psutil
from dvc.exceptions import DvcException

from dvc_mlflow.execution import Curves, Execution, MissingBytes, curve_name, read_curves, tables
from dvc_mlflow.launcher import is_strict
from dvc_mlflow.project import Git, Owners, Project, Unprovable
from dvc_mlflow.store import Conflict, Store, describe, mistaken
from dvc_mlflow.text import UserError

POLL_SECONDS = 0.5  # between two reads of a file of curves
REREAD_SECONDS = 3  # how long to reread a dvc.yaml that lacks the stage


class Events:
    """The lines of standard input, as they arrive."""

    def __init__(self) -> None:
        self._buffer = b""

    def next(self, seconds: float | None) -> dict[str, Any] | None:
        """The next event; {} on timeout, None at the end of input."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._buffer:
            rest = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([0], [], [], rest)[0]:
                return {}
            data = os.read(0, 65536)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


class LiveCurves:
    """The points of the declared files, logged as the files grow."""

    def __init__(self, store: Store, run_id: str, execution: Execution, start_time: int, resumed: bool) -> None:
        """`start_time`, in milliseconds since 1970: an older file, such as a kept out, does not belong to this run."""
        self._store, self._run_id, self._start_time = store, run_id, start_time
        self._curves = execution.declared.curves
        self._seen: dict[Curves, tuple[int, int]] = {}
        run = store.client.get_run(run_id)
        self.logged = store.points(run, [*run.data.metrics]) if resumed else {}

    def look(self) -> None:
        """Log the points added since the last call."""
        for plot in self._curves:
            for table in tables(plot, self._files(plot.path)):
                path = self._store.project.folder / table.path
                try:
                    status = path.stat()
                    stamp = (status.st_mtime_ns, status.st_size)
                    if self._seen.get(table) == stamp or status.st_mtime * 1000 < self._start_time:
                        continue
                    found, _ = read_curves(table, path.read_bytes())
                except OSError:  # it is not there yet
                    continue
                self._seen[table] = stamp
                new = []
                for column, points in found.items():
                    name = curve_name(plot, table, column)
                    logged = self.logged.setdefault(name, {})
                    new += [(name, value, step) for step, value in points.items() if step not in logged]
                    logged |= {step: value for step, value in points.items() if step not in logged}
                if new:
                    self._store.log_points(self._run_id, new, int(time.time() * 1000))

    def _files(self, path: str) -> list[str]:
        """The file at this path, or the files in this folder."""
        folder = self._store.project.folder
        if not (folder / path).is_dir():
            return [path] if (folder / path).is_file() else []
        return sorted(file.relative_to(folder).as_posix() for file in (folder / path).rglob("*") if file.is_file())


def record(events: Events) -> None:
    """Process the events until the run ends."""
    start = events.next(None)
    if not start:
        return
    project, address = find(start["stage"])
    commands = project.stages[address].cmd
    if isinstance(commands, list) and not _is_last(commands, start["command"]):
        say("ready complete closed")  # the last command of the list writes the record
        return
    store = Store(project)
    experiment = os.environ.get("DVC_EXP_NAME")
    owners = Owners(project, experiment)
    for run in store.dead():
        store.close(run)
    execution = project.starting(address)
    for other in execution.upstream:
        locked = project.locked(other.stage)
        if locked and not store.find(locked, owners.of(locked)):
            store.record(locked, owners.of(locked))
    git, pid = project.git(project.written()), start["pid"]
    run_id, resumed = store.begin(execution, experiment, pid, start["time"], git, live=True)
    curves = LiveCurves(store, run_id, execution, start["time"], resumed)
    say("ready")
    while (ended := events.next(POLL_SECONDS)) == {}:
        curves.look()
    if ended is None or ended["status"] != "FINISHED":
        curves.look()
        end(store, run_id, ended["status"] if ended else "KILLED", pid)
        return
    try:
        execution = project.ended(execution)
    except UserError as error:
        killed = events.next(0) is None or is_orphan(pid, start["parent"])  # the next `dvc repro` removed the outs
        if not killed:
            warn(str(error))
        say("complete")
        end(store, run_id, "KILLED" if killed else "FAILED", pid)
        return
    try:
        store.complete(run_id, execution, curves.logged)
    except Conflict as error:  # the run has steps that these files lack: of an earlier attempt, or rewritten since
        end(store, run_id, "KILLED", pid, tell=False)
        run_id = begin_again(store, execution, experiment, pid, start["time"], git)
        store.complete(run_id, execution, {})
        warn(f"the earlier points of {error} differ from this run's, which gets a row of its own")
    for problem in store.problems:
        warn(problem)
    say("complete")
    if not events.next(None):  # the launcher was killed: DVC has not seen the command succeed, and runs it again
        end(store, run_id, "KILLED", pid)
        return
    run_id = store.publish(run_id, execution, experiment).info.run_id
    with contextlib.suppress(DvcException, OSError):  # a dep is gone: DVC reports it
        locked = replace(project.starting(address), outs=execution.outs)  # as DVC is about to write it
        if locked.id != execution.id:
            store.mark_mistaken(run_id, locked)
            warn(f"{mistaken(locked)}; the run shows the ones it started with")
            say("closed")
            return
    project.add(execution)
    for later in project.after(address):
        if project.would_skip(later):  # DVC will not run it: record it now
            try:
                if locked := project.locked(later):
                    store.record(locked, experiment)
            except (Unprovable, MissingBytes):
                pass  # sync reports it
    say("closed")


def find(name: str) -> tuple[Project, str]:
    """The project, and the address of the stage that DVC runs as `name`. Raises UserError.

    DVC has found the stage, so it exists, unless the command is writing dvc.yaml right now, as DVCLive does.
    """
    deadline = time.monotonic() + REREAD_SECONDS
    while True:
        project = Project(Path.cwd())
        try:
            return project, project.find_stage(name, Path.cwd())
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def is_orphan(pid: int, parent: int) -> bool:
    """Whether the process, or its parent, which is DVC or its shell, is gone."""
    try:
        return psutil.Process(pid).ppid() != parent
    except psutil.NoSuchProcess:
        return True


def begin_again(store: Store, execution: Execution, experiment: str | None, pid: int, start_time: int, git: Git) -> str:
    """Start a run beside the abandoned one; it must not be found as one to continue."""
    run_id, resumed = store.begin(execution, experiment, pid, start_time, git, live=False)
    assert not resumed
    store.client.delete_tag(run_id, "restored")
    return run_id


def put_back() -> None:
    """Restore the outs that DVC removed, unless new ones exist: the launcher will not run the command."""
    try:
        project = Project(Path.cwd())
        project.put_back(project.find_stage(os.environ["DVC_STAGE"], Path.cwd()))
    except Exception as error:  # only the first failure matters to the user
        warn(f"the outs were not restored ({describe(error)}); `dvc checkout` restores them")


def end(store: Store, run_id: str, status: str, pid: int, tell: bool = True) -> None:
    """End the run, unless a later process continues it."""
    if store.client.get_run(run_id).data.tags["process.pid"] == str(pid):
        store.terminate(run_id, status)
    if tell:
        say("closed")


def _is_last(commands: list[str], command: list[str]) -> bool:
    """Whether this is, or may be, the last of a list of commands."""
    import shlex

    def has(line: str) -> bool:
        try:
            words = shlex.split(line)
        except ValueError:
            return False
        size = len(command)
        return any(words[place : place + size] == command for place in range(len(words) - size + 1))

    return has(commands[-1]) or not any(has(line) for line in commands)


def say(words: str) -> None:
    """Write to the launcher, which may be dead by now."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{words}\n".encode())


def warn(line: str) -> None:
    """Print a one-line warning and continue."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Record; any failure prints one line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when the command does
        signal.signal(number, signal.SIG_IGN)
    try:
        record(Events())
    except Exception as error:  # of any kind: the user gets one line
        if is_strict():
            put_back()
            warn(describe(error))
        else:
            warn(f"{describe(error)}; `dvc-mlflow sync` records this later")
        os._exit(1)
    os._exit(0)  # Python would take 0.1 s to tear MLflow down


if __name__ == "__main__":
    main()
