"""Ray clusters of two nodes, with the servers that the nodes reach: on this machine, or each in a network namespace."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.servers import LOOPBACK, S3, STORE_BYTES, free_port, ray_cluster
from support.commands import environment

BRIDGE, NETWORK = "sweeps", "10.231.77"  # of the namespaces; this machine is .1
RAY = Path(sys.executable).with_name("ray")


class Site(NamedTuple):
    """A Ray cluster of two nodes with one CPU each, and what they reach."""

    address: str  # Ray's
    host: str  # this machine's address
    git: str  # what stands before the path of a git repository
    s3: S3
    lose_a_node: Callable[[], None]


@contextlib.contextmanager
def site_here(folder: Path, s3: S3) -> Iterator[Site]:
    """Nodes on this machine, which find git repositories in `folder`."""
    with ray_cluster(2) as cluster:

        def lose_a_node() -> None:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

        yield Site(cluster.address, LOOPBACK, str(folder), s3, lose_a_node)


@contextlib.contextmanager
def site_in_namespaces(folder: Path) -> Iterator[Site]:
    """Nodes that share no address and no temporary files with this machine, only the environment. Needs root.

    Git repositories in `folder` are served.
    """
    temporary = shlex.quote(tempfile.gettempdir())
    with contextlib.ExitStack() as ends:

        def ip(command: str) -> str:
            return subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True).stdout

        def start(*command: str | Path) -> None:
            with (folder / "log").open("ab") as log:
                process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            ends.callback(process.wait)
            ends.callback(process.kill)

        def end(namespace: str) -> None:
            for pid in ip(f"netns pids {namespace}").split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

        host, port, git_port = f"{NETWORK}.1", free_port(), free_port()
        ip(f"link add {BRIDGE} type bridge")
        ends.callback(ip, f"link delete {BRIDGE}")
        ip(f"address add {host}/24 dev {BRIDGE}")
        ip(f"link set {BRIDGE} up")
        (folder / "s3").mkdir()
        s3 = S3(folder / "s3", environment(), host)
        ends.callback(s3.stop)
        env = dict(os.environ)
        daemon = ("git", "daemon", f"--listen={host}", f"--port={git_port}", f"--base-path={folder}")
        start(*daemon, "--export-all", "--enable=receive-pack", "--reuseaddr")
        ray = (RAY, "start", "--block", f"--object-store-memory={STORE_BYTES}")
        start(
            *ray, "--head", f"--node-ip-address={host}", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"
        )
        for number in (2, 3):
            name, address = f"{BRIDGE}-{number}", f"{NETWORK}.{number}"
            ip(f"netns add {name}")
            ends.callback(ip, f"netns delete {name}")
            ends.callback(end, name)
            ip(f"link add {name} type veth peer name eth0 netns {name}")
            ip(f"link set {name} up master {BRIDGE}")
            for command in ("link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up"):
                ip(f"-n {name} {command}")
            node = shlex.join(map(str, (*ray, f"--address={host}:{port}", f"--node-ip-address={address}")))
            mounts = f"mount -t tmpfs none /dev/shm && mount -t tmpfs none {temporary} && cd {temporary}"
            start("ip", "netns", "exec", name, "sh", "-c", f"{mounts} && TMPDIR={temporary} exec {node} --num-cpus=1")
        wait_for_nodes(f"{host}:{port}", 3)
        yield Site(f"{host}:{port}", host, f"git://{host}:{git_port}", s3, lambda: end(f"{BRIDGE}-2"))


def wait_for_nodes(address: str, number: int) -> None:
    program = f"""
import ray, time
ray.init({address!r}, log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < {number}:
    time.sleep(0.2)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=90)
