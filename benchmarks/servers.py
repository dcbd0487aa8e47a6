"""Real servers on this machine, for the benchmarks and the tests: PostgreSQL, MLflow, S3 and a Ray cluster."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
STORE_BYTES = 80 << 20  # of each Ray node
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}  # the environment for Ray


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return listener.getsockname()[1]


def listens(port: int, host: str = LOOPBACK) -> bool:
    """Whether something accepts connections on this port."""
    with socket.socket() as caller:
        return caller.connect_ex((host, port)) == 0


class Service:
    """A process that serves, with its log, which can be stopped, hung and started again."""

    def __init__(
        self, command: Sequence[str], port: int, log: Path, ready: Callable[[], bool], env: Mapping[str, str]
    ) -> None:
        """It runs in the folder of the file `log`, which gets its output; `ready` says whether it serves."""
        self.port, self.log = port, log
        self._command, self._ready, self._env = command, ready, env
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=self.log.parent, env=self._env, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while not self._ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)  # its session, and so the processes that it has started

    def stop(self) -> None:
        """Stop it now."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()


class MLflow(Service):
    """A real `mlflow server`, which keeps artifacts in its folder."""

    def __init__(self, folder: Path, store: str, env: Mapping[str, str], host: str = LOOPBACK) -> None:
        """`store` is the address of its database."""
        port = free_port()
        self.uri = f"http://{host}:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
        super().__init__(command, port, folder / "log", lambda: answers(f"{self.uri}/health"), env)


class S3(Service):
    """A real S3 server, SeaweedFS, which has the bucket `team`."""

    def __init__(self, folder: Path, env: Mapping[str, str], host: str = LOOPBACK) -> None:
        self.env = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}  # of those who may read and write
        parts = ("master", "volume", "filer", "s3", "admin")
        self._ports = {part: _free_port_pair() for part in parts}
        self._metrics = free_port()
        command = ["weed", f"-logdir={folder}", "mini", f"-dir={folder}", f"-ip={host}", f"-ip.bind={host}"]
        command += [f"-{part}.port={port}" for part, port in self._ports.items()]
        command += ["-bucket=team", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.telemetry=false", f"-metricsPort={self._metrics}"]
        self._host, self.uri = host, f"http://{host}:{self._ports['s3']}"
        super().__init__(command, self._ports["s3"], folder / "log", self._has_bucket, {**env, **self.env})

    def _has_bucket(self) -> bool:
        return answers(f"http://{self._host}:{self._ports['filer']}/buckets/team/") and listens(self.port, self._host)

    def metrics(self) -> str:
        """What it says of itself, in Prometheus' format."""
        with urllib.request.urlopen(f"http://{self._host}:{self._metrics}/metrics") as answer:
            return answer.read().decode()

    def stop(self) -> None:
        super().stop()
        for port in self._ports.values():
            for number in (port, port + 10_000):
                for socket_of_it in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    socket_of_it.unlink()


def answers(url: str) -> bool:
    """Whether there is an answer to a request for this address."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(url, timeout=5).close()
        return True
    return False


def _free_port_pair() -> int:
    """A free port whose partner is free, too: SeaweedFS talks to itself on the port that is 10,000 higher."""
    while True:
        port = free_port() - 10_000
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)):
            return port


@contextlib.contextmanager
def postgres(*settings: str) -> Iterator[Callable[..., str]]:
    """A PostgreSQL of its own on loopback: a function that makes a database and returns its address.

    `settings` are of postgresql.conf, NAME=VALUE. The function's arguments are those of createdb. Raises
    FileNotFoundError if PostgreSQL is not installed.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        raise FileNotFoundError("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    port = free_port()
    # Not below pytest's folder, which each start of pytest closes to other users.
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user)

        def run(program: str, *arguments: str) -> None:
            command = [str(found[-1].parent / program), *arguments]
            nowhere = subprocess.DEVNULL
            subprocess.run(command, check=True, cwd=folder, user=user, stdout=nowhere, stderr=nowhere)

        def create(*arguments: str) -> str:
            run("createdb", "-h", LOOPBACK, "-p", str(port), "-U", "mlflow", *arguments)
            return f"postgresql://mlflow@{LOOPBACK}:{port}/{arguments[-1]}"

        data = f"{folder}/data"
        run("initdb", "-D", data, "-U", "mlflow", "--auth", "trust")
        own = (f"listen_addresses={LOOPBACK}", f"port={port}", "unix_socket_directories=''", "fsync=off")
        options = " ".join(f"-c {setting}" for setting in (*own, *settings))
        run("pg_ctl", "-D", data, "-l", f"{folder}/log", "-o", options, "--wait", "start")
        try:
            yield create
        finally:
            run("pg_ctl", "-D", data, "--mode", "immediate", "stop")


@contextlib.contextmanager
def ray_cluster(nodes: int) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` of a head that runs nothing, and of nodes with one CPU each.

    They have the environment of this process. Its TMPDIR should be short, since Ray has sockets in it.
    """
    from ray.cluster_utils import Cluster

    store: Any = {"object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, **store)
        yield cluster
    finally:
        cluster.shutdown()
