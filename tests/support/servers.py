"""Servers on loopback."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from support.commands import environment, home
from support.project import Project


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def listens(port: int) -> bool:
    """Whether something accepts connections on this port of 127.0.0.1."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


class Service:
    """A process that listens on a port of 127.0.0.1, which can be stopped and started again."""

    def __init__(self, command: Sequence[str], port: int, log: Path, ready: Callable[[], bool], **env: str) -> None:
        """`ready` says whether it serves; its output goes to `log`."""
        self.port = port
        self._command, self._log, self._ready, self._env = command, log, ready, environment() | env
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._log.parent, env=self._env, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while not self._ready():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it now, with the processes that it has started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class S3(Service):
    """A real S3 server, SeaweedFS, which has the bucket `team`."""

    def __init__(self, folder: Path) -> None:
        self.env = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}  # of those who may read and write
        parts = ("master", "volume", "filer", "s3", "admin")
        self._ports = {part: _free_port_pair() for part in parts}
        command = ["weed", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-bucket=team"]
        command += [f"-{part}.port={port}" for part, port in self._ports.items()]
        command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.telemetry=false"]
        self.uri = f"http://127.0.0.1:{self._ports['s3']}"
        super().__init__(command, self._ports["s3"], folder / "log", self._has_bucket, **self.env)

    def _has_bucket(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{self._ports['filer']}/buckets/team/", timeout=5).close()
            return listens(self.port)
        return False

    def stop(self) -> None:
        super().stop()
        for port in self._ports.values():
            for number in (port, port + 10_000):
                for socket_of_it in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    socket_of_it.unlink()


def _free_port_pair() -> int:
    """A free port whose partner is free, too: SeaweedFS talks to itself on the port that is 10,000 higher."""
    while True:
        port = free_port() - 10_000
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


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
        super().__init__(command, port, folder / "log", lambda: listens(port))


class Served(NamedTuple):
    project: Project
    port: int
    pid: int  # of make


def wait_for_server(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until MLflow's server answers on this port of 127.0.0.1; if it does not, fail with its log."""
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


class Server:
    """A real `mlflow server` on loopback, in a folder of its own, that can be stopped, hung and started again."""

    def __init__(self, folder: Path, store: str) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts"), "--workers", "1"),
        ]
        self.folder = folder
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=environment(),
            stdout=(self.folder / "log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_for_server(self.process, self.port, self.folder / "log")

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)  # its session, and so its workers as well

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()


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
