"""The fixtures: a local mirror of a tiny data set, and copies of the project that run on it."""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before MLflow is imported

import functools
import gzip
import hashlib
import http.server
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import load_yaml, modify_yaml
from filelock import FileLock
from support.commands import environment
from support.data import CLASSES, SHAPE, make_tiny_files
from support.project import ROOT, SMALL, Project, copy, forget_addresses, make_project
from support.servers import SSH, Served, serve

from benchmarks.servers import S3, free_port


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="run the long forms of the reliability tests")


@pytest.fixture(scope="session")
def stress(request: pytest.FixtureRequest) -> bool:
    """Whether to run the long form of a test."""
    return request.config.getoption("--stress")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures that tests recorded with `record_property`, such as the number of survived kills."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{value:>7,} {name} ({report.nodeid})")


@pytest.fixture(scope="session")
def tiny_files() -> dict[str, bytes]:
    """The unpacked content of the four files, by their keys in params.yaml."""
    return make_tiny_files()


# A shell that starts the tests in the background makes them, and all that they start, ignore SIGINT.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MIRROR = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Start the mirror in the process that outlives the workers of pytest-xdist, which share the data from it."""
    if hasattr(config, "workerinput"):
        config.stash[MIRROR] = config.workerinput["mirror"]
        return
    folder = tempfile.TemporaryDirectory()
    for key, entry in load_yaml(ROOT / "params.yaml")["fetch"].get("files", {}).items():
        (Path(folder.name) / entry["name"]).write_bytes(gzip.compress(make_tiny_files()[key], mtime=0))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Handler, directory=folder.name)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    config.stash[MIRROR] = f"http://127.0.0.1:{server.server_port}/"
    for end in (folder.cleanup, server.server_close, server.shutdown):  # the last is called first
        config.add_cleanup(end)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the test that mostly waits for DVC's queue, so that other tests use the processors meanwhile."""
    items.sort(key=lambda item: "queued_experiments" not in item.name)


def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist, which is about to start, where the mirror is."""
    node.workerinput["mirror"] = node.config.stash[MIRROR]


@pytest.fixture(scope="session")
def mirror(request: pytest.FixtureRequest) -> str:
    """The address of an HTTP server that has the tiny files, under the names that params.yaml gives them."""
    return request.config.stash[MIRROR]


@pytest.fixture(scope="session")
def fresh_project(tiny_files: dict[str, bytes], mirror: str, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project as cloned, but for the tiny data: nothing has run. Copy it before you change it."""
    project = Project(tmp_path_factory.mktemp("fresh") / "project")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).exists():
            (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project.folder / name)  # with its run bit
    forget_addresses(project.folder)
    project.set("fetch.mirrors", [mirror])
    project.set("fetch.classes", CLASSES)
    with modify_yaml(project.folder / "dvc.yaml") as pipeline:
        (served,) = pipeline["artifacts"]["lenet"]["meta"]["signature"]["inputs"]
        served["tensor-spec"]["shape"] = [-1, *SHAPE]
    for key, content in tiny_files.items():
        project.set(f"fetch.files.{key}.bytes", len(content))
        project.set(f"fetch.files.{key}.sha256", hashlib.sha256(content).hexdigest())
    project.set("train.seed", 0)
    project.set("train.validation_size", 100)
    project.set("train.lr", 0.01)
    project.set("train.epochs", 3)
    project.set("train.batch_size", 16)
    project.set("train.threads", 1)  # threads that spin while they wait take the cores from other processes
    project.set("evaluate.batch_size", 1000)
    project.set("evaluate.threads", 1)
    (project.folder / "dvc.lock").unlink(missing_ok=True)
    project.run("git", "init", "-q", "-b", "main")
    project.commit("The project on tiny data")
    return project


Once = Callable[[str, Project, Callable[[Project], object]], Project]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """Makes a changed copy of a project: the first worker of pytest-xdist does, and each gets a copy of that."""
    own = tmp_path_factory.mktemp("projects")
    shared = own.parent if worker_id == "master" else own.parent.parent

    def make(name: str, project: Project, change: Callable[[Project], object]) -> Project:
        parent, done = shared / name, shared / name / "done"
        with FileLock(f"{parent}.lock"):
            if not done.exists():
                change(copy(project, parent))
                done.touch()
        return copy(Project(parent / "project"), own / name)

    return make


@pytest.fixture(scope="session")
def finished_project(fresh_project: Project, once: Once) -> Project:
    """The project after `dvc repro`, committed. Copy it before you change it."""

    def finish(project: Project) -> None:
        project.dvc("repro")
        project.commit("Run the pipeline")

    return once("finished", fresh_project, finish)


@pytest.fixture(scope="session")
def finished_small(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of one quick stage after `dvc repro`, committed. Copy it before you change it."""
    project = Project(tmp_path_factory.mktemp("small") / "project")
    make_project(project.folder, SMALL)
    project.repro()
    project.commit("Run it")
    return project


@pytest.fixture
def small(finished_small: Project, tmp_path: Path) -> Project:
    """A copy of the project of one quick stage, free to change."""
    return copy(finished_small, tmp_path / "small")


@pytest.fixture(scope="session")
def two_results(finished_project: Project, once: Once) -> Project:
    """The project with a second result, the experiment `slow`, which hardly learns. Copy it before you change it.

    HEAD has the first result, the workspace the second.
    """
    slow = ("exp", "run", "--name", "slow", "--set-param", "train.lr=0.0001")
    return once("two", finished_project, lambda project: project.dvc(*slow))


@pytest.fixture(scope="session")
def served(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A project that was moved after it ran, with `make ui` running in it."""
    before = copy(finished_project, tmp_path_factory.mktemp("served")).folder
    project = Project(before.rename(before.with_name("über uns")))
    project.command("sync")
    (project.folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != "installed":
            (project.folder / ".venv" / path.name).symlink_to(path)
    (project.folder / ".venv/installed").touch()
    port = free_port()
    with serve(project, port, "make", "ui", MLFLOW_PORT=str(port)) as pid:
        yield Served(project, port, pid)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server, with the bucket `team`. A test that uses it has a prefix of its own."""
    server = S3(tmp_path_factory.mktemp("s3"), environment())
    yield server
    server.stop()


@pytest.fixture(scope="session")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSH]:
    """An SSH server. A test that uses it has a folder of its own."""
    try:
        server = SSH(tmp_path_factory.mktemp("ssh"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield server
    server.stop()


@pytest.fixture
def project(finished_project: Project, tmp_path: Path) -> Project:
    """A copy of the project after `dvc repro`, free to change."""
    return copy(finished_project, tmp_path)


@pytest.fixture
def new_project(fresh_project: Project, tmp_path: Path) -> Project:
    """A copy of the project in which nothing has run, free to change."""
    return copy(fresh_project, tmp_path)
