"""Servers on loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.commands import environment
from support.project import Project


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Served(NamedTuple):
    project: Project
    port: int
    pid: int  # of make


def wait_for_server(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until MLflow's server answers on this port of 127.0.0.1; where it does not, show its log."""
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


@contextlib.contextmanager
def serve(project: Project, port: int, *command: str, **env: str) -> Iterator[int]:
    """Run a command that serves MLflow's UI on this port of 127.0.0.1, and yield its process once the UI answers."""
    log = project.folder / "ui.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=project.folder, env=environment() | env, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_for_server(process, port, log)
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
