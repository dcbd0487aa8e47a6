"""Servers of the tests on loopback; benchmarks/servers.py has those that the benchmarks use, too."""

import contextlib
import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.servers import LOOPBACK, Service, answers, free_port, listens
from support.commands import environment, home
from support.project import Project


class SSH(Service):
    """A real OpenSSH server that admits the user of the tests, by a key, in a home folder that knows the server."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError if OpenSSH's server is not installed."""
        program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")  # it wants to be run by its whole path
        if program is None:
            raise FileNotFoundError("OpenSSH's server is not installed (Debian: apt-get install openssh-server)")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # as Debian's service does
        port, keys = free_port(), folder / ".ssh"
        keys.mkdir(mode=0o700)
        shutil.copy(Path(home().name) / ".gitconfig", folder)
        for key in (keys / "id_ed25519", folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        host_key = (folder / "host_key.pub").read_text()
        (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
        settings = {
            "Port": port,
            "ListenAddress": "127.0.0.1",
            "HostKey": folder / "host_key",
            "AuthorizedKeysFile": keys / "id_ed25519.pub",
            "PidFile": "none",
            "StrictModes": "no",  # pytest's folders are below /tmp
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "Subsystem": "sftp internal-sftp",
        }
        (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        self.address = f"ssh://{getpass.getuser()}@127.0.0.1:{port}"
        self.env = {"HOME": str(folder)}
        command = [program, "-D", "-e", "-f", str(folder / "sshd_config")]
        super().__init__(command, port, folder / "log", lambda: listens(port), environment() | self.env)


class Served(NamedTuple):
    project: Project
    port: int
    pid: int  # of make


@contextlib.contextmanager
def serve(project: Project, port: int, *command: str, **env: str) -> Iterator[int]:
    """Run a command that serves MLflow's UI on this port of 127.0.0.1, and yield its process once the UI answers."""
    health = f"http://{LOOPBACK}:{port}/health"
    server = Service(command, port, project.folder / "ui.log", lambda: answers(health), environment() | env)
    try:
        yield server.process.pid
    finally:
        server.stop()
