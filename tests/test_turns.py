"""Trainings on one host take turns for the cores that they need, and a failure of the lock stops none."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.commands import environment
from support.project import ROOT, Pipeline, Project

HOLD = """
import sys
from stages.turns import turn
with turn(int(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
FORK_AND_HOLD = HOLD.replace(
    "    print", "    import os, time\n    if not os.fork():\n        time.sleep(60)\n    print"
)

Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts a process that takes a turn with so many threads, and ends when its input does."""
    processes: list[subprocess.Popen[str]] = []

    def start(threads: int, code: str = HOLD, cores: set[int] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(threads)],
            cwd=ROOT,
            env=environment() | {"TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdin and not process.stdin.closed:
            process.communicate()


def says(process: subprocess.Popen[str]) -> str:
    """The next line that the process prints."""
    assert process.stdout
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read()
    return line.rstrip("\n")


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
WAITS = f"waiting for {len(CORES)} CPU core(s), which other trainings use"
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two CPU cores")


def test_a_training_waits_for_another_until_that_is_killed(hold: Hold, project: Project, tmp_path: Path) -> None:
    first = hold(len(CORES))
    assert says(first) == "held"
    project.set("train.threads", len(CORES))
    command = Pipeline(project.folder).command("train")
    training = subprocess.Popen(
        command,
        cwd=project.folder,
        env=environment() | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert says(training) == WAITS
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(training.stdout or ()))
    reader.start()
    reader.join(2)
    assert lines == [], "it trained while the other had the cores"
    first.kill()
    reader.join(60)
    assert training.wait(60) == 0
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]


def test_a_child_that_outlives_a_killed_training_does_not_keep_its_cores(hold: Hold) -> None:
    first = hold(len(CORES), FORK_AND_HOLD)
    assert says(first) == "held"
    second = hold(len(CORES))
    assert says(second) == WAITS
    first.kill()
    assert says(second) == "held"


@two_cores
def test_trainings_with_enough_cores_do_not_wait(hold: Hold) -> None:
    assert [says(hold(1)) for _ in CORES] == ["held"] * len(CORES)
    assert says(hold(1)) == "waiting for 1 CPU core(s), which other trainings use"


@two_cores
def test_trainings_that_taskset_separates_do_not_wait(hold: Hold) -> None:
    assert says(hold(8, cores={CORES[0]})) == "held"
    assert says(hold(8, cores={CORES[1]})) == "held"
    assert says(hold(8, cores={CORES[1]})) == "waiting for 1 CPU core(s), which other trainings use"


@two_cores
def test_a_training_that_waits_for_several_cores_holds_none(hold: Hold) -> None:
    one = hold(1)
    assert says(one) == "held"
    all_of_them = hold(len(CORES))
    assert says(all_of_them) == WAITS
    other = hold(1)
    assert says(other) in ("held", "waiting for 1 CPU core(s), which other trainings use")
    for process in (one, other):
        process.communicate(timeout=30)
    assert says(all_of_them) == "held"


def stale(path: Path) -> None:
    path.write_text("of a process that is long gone")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def another_user_s(path: Path) -> None:
    path.touch()
    try:
        os.chown(path, os.getuid() + 1, -1)
    except PermissionError:
        pytest.skip("needs root, to make another user's file")


def no_folder(path: Path) -> None:
    path.parent.rmdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (stale, None),
        (a_folder, "Is a directory"),
        (a_link, "Too many levels of symbolic links"),
        (a_pipe, "it is not a file of this user"),
        (another_user_s, "it is not a file of this user"),
        (no_folder, "No such file or directory"),
    ],
)
def test_if_the_lock_file_cannot_be_used_a_warning_says_so_and_nobody_waits(
    damage: Callable[[Path], None], reason: str | None, hold: Hold, tmp_path: Path
) -> None:
    path = tmp_path / f"training-cores-{os.getuid()}"
    damage(path)
    process = hold(1)
    assert says(process) == "held"
    _, errors = process.communicate(timeout=30)
    expected = f"warning: cannot lock {path} ({reason}): trainings do not take turns\n" if reason else ""
    assert errors == expected
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to mount a file system")
@pytest.mark.parametrize("how", ["read-only", "full"])
def test_a_read_only_or_full_temporary_folder_stops_no_training(how: str, hold: Hold, tmp_path: Path) -> None:
    options = "size=4k,nr_inodes=1" if how == "full" else "ro"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        process = hold(1)
        assert says(process) == "held"
        _, errors = process.communicate(timeout=30)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    reason = "No space left on device" if how == "full" else "Read-only file system"
    path = tmp_path / f"training-cores-{os.getuid()}"
    assert errors == f"warning: cannot lock {path} ({reason}): trainings do not take turns\n"
