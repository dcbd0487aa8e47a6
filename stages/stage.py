"""What all stages do: write whole files or none, and end with one clear line."""

import contextlib
import csv
import gc
import hashlib
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StageError(Exception):
    """A user's mistake or an environment failure, in one line: expected, found, what to do."""


def shorten(text: object, limit: int = 300) -> str:
    """At most `limit` characters of an external text, on one line and printable."""
    line = "".join(char if char.isprintable() else " " for char in str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def hide_credentials(text: str) -> str:
    """The text without users and passwords in its URLs: some libraries' errors show them."""
    text = re.sub(r"'.*' is not a valid host or port", "no valid host or port", text)  # a password with a slash
    return re.sub(r"(?<!/)//(?!/)\S*@", "//…@", text)  # up to the last @: a password may contain one


def write(path: Path, data: bytes) -> None:
    """Write a whole file: under a temporary name beside it, flushed to disk, then renamed.

    Raises StageError if the file cannot be written; the former file then stays.
    """
    temporary = path.with_name(path.name + ".tmp")  # a fixed name: the next run overwrites a leftover
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StageError(f"cannot write {path}: {error.strerror}; free the space or the folder and run again") from None


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON. Raises StageError if it cannot be written."""
    write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows, at least one and all of the same keys, as CSV. Raises StageError if they cannot be written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())


def check_inputs(*paths: Path) -> None:
    """Raise StageError if DVC runs the stage on a file that differs from what another stage made, as dvc.lock has it.

    DVC does not read what it takes from its cache, so it does not notice a file that was damaged there.
    """
    lock = Path("dvc.lock")
    if "DVC_STAGE" not in os.environ or not lock.exists():
        return
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(lock)["stages"].values()
    locked = {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}
    for path in paths:
        expected = locked.get(path.as_posix())
        found = md5(path) if path.exists() else "nothing"
        if expected not in (None, found):
            cached = cache_path(expected)
            cure = removal_command(path, cached) if is_damaged(cached) else removal_command(path)
            raise StageError(
                f"{path}: expected MD5 {expected}, as dvc.lock says, found {found}; `{cure}`, then `dvc repro`"
            )


def md5(path: Path) -> str:
    """MD5 of a file, in hexadecimal, as DVC records it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def cache_path(digest: str) -> Path:
    """Where DVC's cache keeps the file with this MD5, if it has one."""
    from dvc.repo import Repo

    with Repo() as repo:
        return Path(repo.cache.local.oid_to_path(digest))


def is_damaged(cached: Path) -> bool:
    """Whether the file is in DVC's cache, but its MD5 is not the one that it is named for."""
    return cached.exists() and md5(cached) != cached.parent.name + cached.name


def removal_command(*paths: Path) -> str:
    """The command that removes these files."""
    return shlex.join(["rm", "-f", *map(str, paths)])


def prepare() -> None:
    """Before imports that take a second: pause the garbage collector, and hold signals back, until `run`.

    Imports stay alive, so none of them is garbage; and a signal during an import would end in a traceback.
    """
    gc.disable()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage's main function and exit: 0, 1 after a StageError's line, or 128 + the signal that ended it.

    SIGTERM and SIGHUP end a stage as Ctrl-C does, through KeyboardInterrupt, so that its MLflow run is closed.
    If DVC started the stage and it failed, the outs that DVC removed beforehand are restored.
    """
    received = [signal.SIGINT]

    def interrupt(number: int, frame: FrameType | None) -> None:
        received[0] = signal.Signals(number)
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, interrupt)
    gc.freeze()
    gc.enable()
    succeeded = False
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        main()
        succeeded = True
    except StageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"stopped by {received[0].name}", file=sys.stderr)
        sys.exit(128 + received[0])
    finally:
        if not succeeded and "DVC_STAGE" in os.environ:
            _restore_outs(os.environ["DVC_STAGE"])
    leave()


def leave() -> NoReturn:
    """Exit with 0 at once. Python would take 0.2 s to tear PyTorch down, when a kill could still undo the success."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(0)


def _restore_outs(name: str) -> None:
    """Copy the outs that dvc.lock records for the stage from DVC's cache, if they are whole there, to their places.

    DVC removes a stage's outs before it runs the stage. After a mistake in params.yaml the last good model
    should not be gone. `dvc checkout` would also copy what is damaged.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            for stage in repo.stage.collect(name):
                for out in stage.outs:
                    cached = out.hash_info and Path(repo.cache.local.oid_to_path(out.hash_info.value))
                    if cached and is_damaged(cached):
                        print(
                            f"{out} was not restored: DVC's copy is damaged; `{removal_command(cached)}`",
                            file=sys.stderr,
                        )
                    elif cached and cached.exists():
                        write(Path(out.fs_path), cached.read_bytes())
    except (DvcException, OSError, StageError) as error:
        print(f"the former outs were not restored ({error}); `dvc checkout {name}` restores them", file=sys.stderr)
