"""What the tests share: a tiny data set behind a local mirror, and copies of the project that run on it."""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before MLflow is imported

import contextlib
import functools
import gzip
import hashlib
import http.server
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import forked
import mlflow
import numpy as np
import pytest
from dvc.utils.serialize import load_yaml, modify_yaml
from filelock import FileLock
from mlflow.entities import Run

from dvc_mlflow.store import move_artifacts
from stages.stage import md5

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="run the long forms of the reliability tests")


@pytest.fixture(scope="session")
def stress(request: pytest.FixtureRequest) -> bool:
    """Whether to run the long form of a test."""
    return request.config.getoption("--stress")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures that tests recorded with `record_property`, such as how many kills were survived."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{value:>7,} {name} ({report.nodeid})")


TRAIN_SIZE, TEST_SIZE = 600, 200


def make_idx(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def make_images(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images uint8 (N, 28, 28) that show their labels: a bright square, at a place of its own for each, in noise."""
    images = rng.integers(0, 60, (len(labels), 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 + 10 * (label // 5), 1 + 5 * (label % 5)
        image[row : row + 8, column : column + 5] += 180
    return images


@functools.cache
def make_tiny_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for part, size in (("train", TRAIN_SIZE), ("test", TEST_SIZE)):
        labels = rng.permutation(np.arange(size, dtype=np.uint8) % 10)
        files[f"{part}_images"] = make_idx(make_images(labels, rng))
        files[f"{part}_labels"] = make_idx(labels)
    return files


@pytest.fixture(scope="session")
def tiny_files() -> dict[str, bytes]:
    """The unpacked content of the four files, by their keys in params.yaml."""
    return make_tiny_files()


# A shell that starts the tests in the background has them ignore SIGINT, and so all that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MIRROR = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Start the mirror in the process that outlives the workers of pytest-xdist, since they share what came from it."""
    if hasattr(config, "workerinput"):
        config.stash[MIRROR] = config.workerinput["mirror"]
        return
    folder = tempfile.TemporaryDirectory()
    for key, entry in load_yaml(ROOT / "params.yaml")["fetch"]["files"].items():
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
    """Begin with the test that mostly waits, for DVC's queue: the other tests make use of the processors meanwhile."""
    items.sort(key=lambda item: "queued_experiments" not in item.name)


def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist, which is about to start, where the mirror is."""
    node.workerinput["mirror"] = node.config.stash[MIRROR]


@pytest.fixture(scope="session")
def mirror(request: pytest.FixtureRequest) -> str:
    """The address of an HTTP server that has the tiny files, under the names that params.yaml gives them."""
    return request.config.stash[MIRROR]


@functools.cache
def home() -> tempfile.TemporaryDirectory[str]:
    """A home folder that has an identity for git, and nothing else."""
    folder = tempfile.TemporaryDirectory(prefix="home-")
    Path(folder.name, ".gitconfig").write_text("[user]\nname = Test\nemail = test@example.org\n")
    return folder


def environment() -> dict[str, str]:
    """The environment without the user's settings, those of this project and of a make around the tests."""
    foreign = re.compile("MLFLOW_|DVC_|FASHION_|GIT_|XDG_|MAKE|MFLAGS")
    clean = {key: value for key, value in os.environ.items() if not foreign.match(key)}
    path = f"{Path(sys.executable).parent}:{clean['PATH']}"
    return clean | {
        "PATH": path,
        "HOME": home().name,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # these jobs are for GenAI
    }


def execute(command: Sequence[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder; DVC and `dvc-mlflow` in a fork, see forked.py."""
    module = {"dvc": "dvc", "dvc-mlflow": "dvc_mlflow"}.get(command[0])
    if module and command[1] != "run":
        return forked.run_module(module, command[1:], folder, env)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def make_project(folder: Path, files: Mapping[str, str], git: bool = True) -> None:
    """Make a DVC project of these files in a new folder, in a git repository unless told otherwise; commit nothing."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    commands = (
        [["git", "init", "-q", "-b", "main"], ["dvc", "init", "-q"]] if git else [["dvc", "init", "-q", "--no-scm"]]
    )
    for command in commands:
        ended = execute(command, folder, environment())
        assert ended.returncode == 0, ended


@dataclass(frozen=True)
class Project:
    """A copy of the project, with git and DVC, in a folder of its own."""

    folder: Path

    def run(
        self, *command: str, check: bool = True, warns: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder; env is added to a clean environment.

        It may fail only if check is false, and must print a warning if `warns`, else none.
        """
        result = execute(command, self.folder, environment() | env)
        if check and result.returncode != 0:
            raise AssertionError(f"{command} exited with {result.returncode}:\n{result.stdout}{result.stderr}")
        if check:
            assert bool(re.search("^warning: ", result.stdout + result.stderr, re.MULTILINE)) == warns, result
        return result

    def dvc(
        self, *arguments: str, check: bool = True, warns: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return self.run("dvc", *arguments, check=check, warns=warns, **env)

    def repro(self, *arguments: str, check: bool = True, **env: str) -> list[str]:
        """Run `dvc repro` and return the stages that it ran."""
        return ran(self.dvc("repro", *arguments, check=check, warns=False, **env).stdout)

    def command(self, name: str, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Do what `python -m commands.NAME …`, or `dvc-mlflow NAME …`, does in the folder; see forked.py."""
        bridge = name in ("sync", "audit", "lineage")
        module, words = ("dvc_mlflow", (name, *arguments)) if bridge else (f"commands.{name}", arguments)
        result = forked.run_module(module, words, self.folder, environment() | env)
        assert "Traceback" not in result.stdout + result.stderr, result
        if check and result.returncode != 0:
            raise AssertionError(f"{name} {arguments} exited with {result.returncode}:\n{result.stdout}{result.stderr}")
        return result

    def commands(self, *commands: str, **env: str) -> dict[str, subprocess.CompletedProcess[str]]:
        """Do the commands one after the other, each given as one line, and return how they ended, by that line.

        None may say in more than one line why it fails.
        """
        ends = {line: self.command(*shlex.split(line), check=False, **env) for line in commands}
        assert not any("\n" in end.stderr.partition("error: ")[2].rstrip("\n") for end in ends.values()), ends
        return ends

    def set(self, key: str, value: Any) -> None:
        """Set a parameter, by its dotted key."""
        *sections, last = key.split(".")
        with modify_yaml(self.folder / "params.yaml") as params:
            for section in sections:
                params = params[section]
            params[last] = value

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "-qm", message)

    def md5s(self) -> dict[str, str]:
        """The MD5 of each out, by its path, as dvc.lock has them."""
        stages = load_yaml(self.folder / "dvc.lock")["stages"].values()
        return {out["path"]: out["md5"] for stage in stages for out in stage["outs"]}


class Pipeline:
    """What dvc.yaml of a folder says, as it stands there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages = load_yaml(folder / "dvc.yaml")["stages"]

    def deps(self, stage: str) -> list[str]:
        return self.stages[stage].get("deps", [])

    def outs(self, stage: str) -> list[str]:
        """Paths of all outs, metrics files and plots among them."""
        entries = [entry for kind in ("outs", "metrics", "plots") for entry in self.stages[stage].get(kind, [])]
        return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]

    def hash(self, paths: Iterable[str]) -> dict[str, str]:
        """MD5 of each file, by its path; "" for a file that is not there."""
        return {path: md5(self.folder / path) if (self.folder / path).is_file() else "" for path in paths}


class Store:
    """The MLflow store of a project, read with MLflow's own client."""

    def __init__(self, project: Project) -> None:
        self.uri = f"sqlite:///{project.folder / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(self.uri)
        experiment = self.client.get_experiment_by_name("fashion-mnist-lenet")
        assert experiment
        self.experiment_id = experiment.experiment_id

    def runs(self, stage: str) -> list[Run]:
        """The stage's runs, the newest first."""
        return list(self.client.search_runs([self.experiment_id], f"tags.stage = '{stage}'"))

    def run(self, stage: str) -> Run:
        (run,) = self.runs(stage)
        return run

    def curve(self, run: Run, metric: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, metric)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ran(output: str) -> list[str]:
    """The stages that DVC says it ran."""
    return re.findall(r"^Running stage '(\w+)'", output, re.MULTILINE)


@pytest.fixture(scope="session")
def fresh_project(tiny_files: dict[str, bytes], mirror: str, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project as a clone has it, on the tiny data: nothing has run. Not to be changed: copy it."""
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
            shutil.copyfile(ROOT / name, project.folder / name)
    project.set("fetch.mirrors", [mirror])
    for key, content in tiny_files.items():
        project.set(f"fetch.files.{key}.bytes", len(content))
        project.set(f"fetch.files.{key}.sha256", hashlib.sha256(content).hexdigest())
    project.set("train.validation_size", 100)
    project.set("train.epochs", 3)
    project.set("train.batch_size", 16)
    project.set("train.threads", 1)  # threads that wait for each other do so at the cost of the other processes
    project.set("evaluate.threads", 1)
    (project.folder / "dvc.lock").unlink(missing_ok=True)
    project.run("git", "init", "-q", "-b", "main")
    project.commit("The project on tiny data")
    return project


Once = Callable[[str, Project, Callable[[Project], object]], Project]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """Makes a changed copy of a project; of pytest-xdist's workers the first does so, and all get a copy of that."""
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
    """The project after `dvc repro`, committed. Not to be changed: copy it."""

    def finish(project: Project) -> None:
        project.dvc("repro")
        project.commit("Run the pipeline")

    return once("finished", fresh_project, finish)


@pytest.fixture(scope="session")
def two_results(finished_project: Project, once: Once) -> Project:
    """The project with a second result, the experiment `slow`, that hardly learns. Not to be changed: copy it.

    HEAD has the first result, the workspace the second.
    """
    slow = ("exp", "run", "--name", "slow", "--set-param", "train.lr=0.0001")
    return once("two", finished_project, lambda project: project.dvc(*slow))


def copy(project: Project, parent: Path) -> Project:
    """A copy of the project in parent/project, with an MLflow store that knows where its artifacts lie now."""
    old, new = project.folder, parent / "project"
    shutil.copytree(old, new, symlinks=True)
    if (new / "mlflow.db").exists():
        move_artifacts(new / "mlflow.db", *((folder / "mlartifacts").as_uri() for folder in (old, new)))
    return Project(new)


class Served(NamedTuple):
    project: Project
    port: int
    pid: int  # of make


@pytest.fixture(scope="session")
def served(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A project that was moved after it ran, and `make ui` at work in it, in the environment of the tests."""
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


@pytest.fixture
def project(finished_project: Project, tmp_path: Path) -> Project:
    """A copy, to be changed, of the project after `dvc repro`."""
    return copy(finished_project, tmp_path)


@pytest.fixture
def new_project(fresh_project: Project, tmp_path: Path) -> Project:
    """A copy, to be changed, of the project in which nothing has run."""
    return copy(fresh_project, tmp_path)
