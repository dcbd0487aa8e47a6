"""Run a stage's command and record it: `dvc-mlflow run COMMAND…` in front of the command in dvc.yaml.

Only the standard library is imported here: the recorder, a separate process, imports DVC and MLflow while the command
does its own imports. The launcher forwards its signals to the command, and exits as the command does. If the launcher
is killed, so is the command (on Linux), and the recorder closes the run as KILLED.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

END_SECONDS = 60  # how long to wait for the record of a command that has ended
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
SI_KERNEL = 0x80  # Linux: from the terminal, which also sends it to the command
PR_SET_PDEATHSIG = 1  # Linux: prctl(2)


def run(command: Sequence[str]) -> NoReturn:
    """Run the command, record it, and exit as it does. With TRACKING_STRICT=1, fail if it cannot be recorded."""
    if "DVC_STAGE" not in os.environ:  # by hand: there is no execution to record
        _execute(command)
    strict = is_strict()
    recorder = subprocess.Popen(
        [sys.executable, "-m", "dvc_mlflow.recorder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # keeps Ctrl-C, which goes to the whole foreground, from the recorder
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, (*FORWARDED, signal.SIGCHLD))
    start = {"stage": os.environ["DVC_STAGE"], "command": list(command), "time": int(time.time() * 1000)}
    told = _tell(recorder, **start, pid=os.getpid(), parent=os.getppid())
    if strict and not (told and _hears(recorder, "ready", time.monotonic() + END_SECONDS)):
        sys.exit("error: MLflow cannot record this run, and TRACKING_STRICT is set; `dvc checkout` restores the outs")
    pid = _start(command)
    stopped_by, status = _wait(pid)
    code = os.waitstatus_to_exitcode(status)
    deadline = time.monotonic() + END_SECONDS
    killed = code < 0 or (stopped_by and code == 128 + stopped_by) or code in (130, 143)
    _tell(recorder, status="FINISHED" if code == 0 else "KILLED" if killed else "FAILED")
    recorded = _hears(recorder, "complete", deadline) if code == 0 else True
    if code == 0 and recorded:
        _tell(recorder, succeeded=True)
    recorded = _hears(recorder, "closed", deadline) and recorded
    if not recorded and time.monotonic() >= deadline:
        recorder.kill()
        print(f"warning: MLflow took over {END_SECONDS} s; `dvc-mlflow sync` completes the record", file=sys.stderr)
    if strict and not recorded and code == 0:
        sys.exit("error: MLflow has not recorded this run, and TRACKING_STRICT is set")
    if code < 0:  # killed by a signal: the parent must see that
        with contextlib.suppress(OSError):  # of SIGKILL, which is never handled
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)


def is_strict() -> bool:
    """Whether a stage that cannot be recorded should fail."""
    return os.environ.get("TRACKING_STRICT", "") not in ("", "0", "false")


def _execute(command: Sequence[str]) -> NoReturn:
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        print(f"error: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _start(command: Sequence[str]) -> int:
    """Start the command so that it does not outlive the launcher; return its process id."""
    launcher = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    pid = os.fork()
    if pid:
        return pid
    if libc:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # which was killed meanwhile
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*FORWARDED, signal.SIGCHLD))
    _execute(command)


def _wait(pid: int) -> tuple[int, int]:
    """Wait for the command and forward signals; return the last signal meant to stop it, and its status."""
    stopped_by = 0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return stopped_by, status
        number, from_terminal = _next_signal()
        if number == signal.SIGCHLD:
            continue
        if number in STOPS:
            stopped_by = number
        if not from_terminal:
            os.kill(pid, number)


def _next_signal() -> tuple[int, bool]:
    """The next signal, and whether it came from the terminal, which also sends it to the command."""
    if hasattr(signal, "sigwaitinfo"):
        info = signal.sigwaitinfo((*FORWARDED, signal.SIGCHLD))
        return info.si_signo, info.si_code == SI_KERNEL
    number = signal.sigwait((*FORWARDED, signal.SIGCHLD))  # macOS
    return number, number in (signal.SIGINT, signal.SIGQUIT) and sys.stdin.isatty()


def _tell(recorder: subprocess.Popen[bytes], **event: object) -> bool:
    """Send the recorder a line; False if it has ended."""
    assert recorder.stdin
    try:
        recorder.stdin.write(json.dumps(event).encode() + b"\n")
        recorder.stdin.flush()
    except OSError:
        return False
    return True


def _hears(recorder: subprocess.Popen[bytes], word: str, deadline: float) -> bool:
    """Wait for a word from the recorder; False if the recorder ends or the deadline passes first."""
    assert recorder.stdout
    said = b""
    while word.encode() not in said:
        if not select.select([recorder.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
            return False
        more = os.read(recorder.stdout.fileno(), 1)  # nothing after the word: the next one is read later
        if not more:
            return False
        said += more
    return True
