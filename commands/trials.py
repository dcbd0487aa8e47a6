"""Trials: runs of the pipeline as DVC experiments, several at a time. replicate and sweep share this module."""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

from filelock import FileLock, Timeout

LOCKS = Path(".dvc", "tmp", "trials")  # DVC keeps .dvc/tmp out of git
DVC = (sys.executable, "-m", "dvc")
REMOTE = "origin"  # where a cluster's nodes get the project from: DVC's default for experiments, too
RETRIES = 5  # of a trial whose node dies
CONNECT_SECONDS = 5
START_SECONDS = 30  # in which DVC has put the workspace back


class NotRunError(Exception):
    """What kept a trial from being run, in one line. The trial has not failed: the same command runs it."""


@dataclass(frozen=True)
class Trial:
    """One run of the pipeline: its experiment's name, changes as in `dvc exp run -S`, tags of its rows in MLflow."""

    name: str
    changes: tuple[str, ...]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """What the experiments start from: a commit of the project in this folder, and the uncommitted changes to it."""

    folder: Path
    rev: str
    patch: bytes


def read_baseline() -> Baseline:
    """The baseline in the current folder. Exits if there is none, or if DVC could not commit an experiment."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    try:
        with Repo() as repo:
            folder = Path(repo.root_dir)
            baseline = Baseline(folder, repo.scm.get_rev(), _changes(folder))
    except (DvcException, SCMError) as error:
        sys.exit(f"error: {error}")
    except FileNotFoundError as error:
        sys.exit(f"error: expected {error.filename}, found none; install it")
    missing = [  # DVC commits each experiment
        key
        for key in ("user.name", "user.email")
        if subprocess.run(["git", "config", key], cwd=baseline.folder, capture_output=True).returncode
    ]
    if missing:
        cure = " and ".join(f"`git config --global {key} …`" for key in missing)
        sys.exit(f"error: expected {' and '.join(missing)} in git's configuration, found none; {cure} sets it")
    return baseline


def experiments(folder: Path, rev: str) -> dict[str, str]:
    """The commits of the experiments that start from this one, by name."""
    listed = _git(folder, "for-each-ref", "--format=%(objectname) %(refname)", _ref(rev, ""))
    return {line.rpartition("/")[2]: line.partition(" ")[0] for line in listed.decode().splitlines()}


def _ref(rev: str, name: str) -> str:
    """Where DVC keeps an experiment."""
    return f"refs/exps/{rev[:2]}/{rev[2:]}/{name}"


def _head(folder: Path) -> str:
    return _git(folder, "rev-parse", "HEAD").decode().strip()


def _changes(folder: Path) -> bytes:
    """The uncommitted changes to the files that git tracks."""
    return _git(folder, "diff", "--binary", "HEAD")


def _git(folder: Path, *arguments: str) -> bytes:
    return _checked(folder, ["git", *arguments])


def _checked(folder: Path, command: Sequence[str]) -> bytes:
    """The command's output. Raises CalledProcessError, with its error message."""
    return subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout


def run(baseline: Baseline, trial: Trial, stopped: threading.Event | None = None, reset: bool = False) -> str:
    """Run a trial in a temporary copy of the project, unless its experiment exists; return why it failed, or "".

    Raises NotRunError if the workspace is not the baseline's any more, or if `stopped` is set before the trial starts.
    With `reset`, for a clone of a node's own, the workspace is put back first.
    """
    folder, rev = baseline.folder, baseline.rev
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    with (folder / LOCKS / f"{trial.name}.lock").open("w") as own:
        fcntl.flock(own, fcntl.LOCK_EX)  # DVC holds it, too: it may still run a trial of a command that was killed
        message = f"{trial.name}: {' '.join(trial.changes)}"
        if found := experiments(folder, rev).get(trial.name):
            said = _git(folder, "log", "-1", "--format=%B", found).decode().strip()
            return "" if said == message else f"another experiment has this name: {said.splitlines()[0]}"
        changes = [argument for change in trial.changes for argument in ("--set-param", change)]
        output: list[str] = []
        # DVC makes the experiment in the workspace, puts it on a stash, puts the workspace back and takes the first
        # experiment from the stash: two that start at once would be mixed up.
        with FileLock(folder / LOCKS / "start"):
            if stopped and stopped.is_set():
                raise NotRunError("it was stopped")
            if reset:
                _git(folder, "reset", "--quiet", "--hard", rev)
            if (head := _head(folder)) != rev:
                raise NotRunError(
                    f"expected commit {rev[:7]} for {trial.name}, found {head[:7]}; `git checkout` the first"
                )
            if _changes(folder) != baseline.patch:
                files = _git(folder, "diff", "--name-only", "HEAD").decode().split("\n")[:-1]
                raise NotRunError(
                    f"expected the tracked files as they were when the first trial began, for {trial.name}, found "
                    f"others, or fewer changes: {', '.join(files[:3]) or 'none'}; undo what was changed meanwhile"
                )
            process = subprocess.Popen(
                [*DVC, "--wait-for-lock", "exp", "run", "--temp", "--name", trial.name, "--message", message, *changes],
                cwd=folder,
                env=os.environ | _environment(trial),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",  # of a stage that prints in another encoding
                pass_fds=[own.fileno()],
                process_group=0,  # Ctrl-C is for this command, which does not stop DVC while it changes the workspace
            )
            assert process.stdout
            for line in process.stdout:
                output.append(line)
                if line.startswith("Reproducing experiment"):
                    break
        output += process.stdout
        process.wait()
        return "" if trial.name in experiments(folder, rev) else reason_of(output)


@contextlib.contextmanager
def _no_start(folder: Path) -> Iterator[None]:
    """Start no trial meanwhile: DVC changes the workspace at a start, and must not be stopped before it is put back."""
    lock = FileLock(folder / LOCKS / "start")
    with contextlib.suppress(Timeout):  # DVC waits for another command, and has changed nothing
        lock.acquire(timeout=START_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _environment(trial: Trial) -> dict[str, str]:
    tags = {"MLFLOW_TAGS": json.dumps(trial.tags)} if trial.tags else {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "PYTHONUNBUFFERED": "1", **tags}  # so that DVC says at once that it has started


def reason_of(output: list[str]) -> str:
    """Why DVC failed: what the stage says, else what DVC says."""
    lines = [line.strip() for line in output if line.strip()]
    for pattern in (r"error: ", r"ERROR: (?!failed to reproduce)", r"ERROR: "):
        for number, line in enumerate(lines):
            if re.match(pattern, line):
                rest = lines[number + 1 :]
                more = [] if not line.endswith(":") else [next(iter(rest), "")]
                return " ".join([re.sub("^(error|ERROR): ", "", line), *more])[:500]
    return "it was killed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where trials run."""
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="trials at a time (default: 1, or what the cluster holds)"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="run trials as Ray tasks, on the cluster at host:port, or on this machine if none is given",
    )


def check_name(name: str) -> None:
    """Exit if experiments and files could not have this name."""
    if not re.fullmatch(r"[\w-]+", name):
        sys.exit(f"error: expected a --name of letters, digits, _ and -, found {name}")


def read(path: str, trial: str, rev: str) -> str:
    """A file of a trial's experiment, from git, DVC's cache or the remote. Exits if it is in none of them."""
    from commands.compare import read_file  # here, since nodes have only this module

    try:
        return read_file(path, rev).decode()
    except Exception as error:  # of a remote, of any kind
        reason = _last(str(error))
        sys.exit(f"error: expected {path} of {trial}, found none: {reason}; the same command continues")


def open_place(baseline: Baseline, args: argparse.Namespace) -> "Here | Cluster":
    """Where to run trials. Exits if that cannot be."""
    if args.jobs is not None and args.jobs < 1:
        sys.exit(f"error: expected --jobs of at least 1, found {args.jobs}")
    return Here(baseline, args.jobs or 1) if args.ray is None else Cluster(baseline, args.jobs, args.ray)


class Here:
    """Runs trials on this machine, at most `jobs` at a time."""

    def __init__(self, baseline: Baseline, jobs: int) -> None:
        self.slots, self._baseline = jobs, baseline
        self._pool, self._stopped = ThreadPoolExecutor(jobs), threading.Event()

    def __enter__(self) -> Self:
        _exit_on_signals()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if kind:
            import psutil

            self._stopped.set()
            with _no_start(self._baseline.folder):
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.terminate()
        self._pool.shutdown()

    def run(self, trials: Iterator[Trial]) -> Iterator[tuple[Trial, str]]:
        """Yield each trial as it ends, with the reason if it failed; take the next one if a slot is free."""
        running: dict[Future[str], Trial] = {}
        while True:
            while len(running) < self.slots and (trial := next(trials, None)):
                running[self._pool.submit(run, self._baseline, trial, self._stopped)] = trial
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                trial = running.pop(done)
                try:
                    reason = done.result()
                except NotRunError as error:
                    sys.exit(f"error: {error}; the same command continues")
                yield trial, reason


@dataclass(frozen=True)
class Source:
    """Where a Ray task finds the project: in its folder, or in the git repository at `url`."""

    baseline: Baseline
    url: str  # "" for the folder
    prefix: str  # of the project in the git repository
    identity: Mapping[str, str]  # git's configuration for the commits of experiments
    env: Mapping[str, str]


class Cluster:
    """Runs trials as Ray tasks: on this machine, in the project itself, or on nodes that clone it and push results."""

    def __init__(self, baseline: Baseline, jobs: int | None, address: str) -> None:
        """`address` is Ray's, or `local` for a cluster on this machine that ends with the command.

        Exits if nothing answers, or if the nodes could not get the project.
        """
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_DEDUP_LOGS": "0"}
        self._baseline, self._jobs, self.remote = baseline, jobs, address != "local"
        url = _check_remotes(baseline) if self.remote else ""
        _check_answers(address)
        _choose_token(address)
        import dvc.api
        import ray

        new: Any = {"include_dashboard": False, "object_store_memory": 100 << 20} if not self.remote else {}
        with _kept_errors() as kept:  # Ray writes the same line each second, and nothing if all is well
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **new)
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                if isinstance(error, ray.exceptions.AuthenticationError) or b"InvalidAuthToken" in kept.read():
                    sys.exit(
                        f"error: expected the token of the Ray cluster at {address}, found another one or none; copy "
                        "~/.ray/auth_token from the machine of `ray start --head`"
                    )
                sys.exit(f"error: expected a Ray cluster at {address}, found none: {str(error).splitlines()[0]}")
        self._ray, self._params, self._cpus = ray, dvc.api.params_show().get("train", {}), 1
        identity = {key: _git(baseline.folder, "config", key).decode().strip() for key in ("user.name", "user.email")}
        env = {key: os.environ[key] for key in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME") if key in os.environ}
        prefix = _git(baseline.folder, "rev-parse", "--show-prefix").decode().strip()
        self._source = Source(baseline, url, prefix, identity, env)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes have no code of this project
        self._task = ray.remote(max_retries=RETRIES)(work)

    def __enter__(self) -> Self:
        _exit_on_signals()
        self._redirected = contextlib.redirect_stdout(sys.stderr)  # Ray says there that a node is lost
        self._redirected.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.nullcontext() if self.remote else _no_start(self._baseline.folder):
            self._ray.shutdown()
        self._redirected.__exit__(None, None, None)

    def run(self, trials: Iterator[Trial]) -> Iterator[tuple[Trial, str]]:
        """Yield each trial as it ends, with the reason if it failed; take the next one if the cluster has room."""
        running: dict[Any, Trial] = {}
        while True:
            while len(running) < self._slots() and (trial := next(trials, None)):
                running[self._task.options(**self._needs(trial)).remote(self._source, trial)] = trial
            if not running:
                return
            (done, *_), _ = self._ray.wait([*running], num_returns=1)
            trial = running.pop(done)
            try:
                reason, trouble = self._ray.get(done)
            except self._ray.exceptions.RayError as error:
                reason, trouble = "", f"Ray lost {trial.name}: {_last(str(error))}"
            if not trouble and not reason and self.remote:
                ref = _ref(self._baseline.rev, trial.name)
                try:
                    _git(self._baseline.folder, "fetch", "--quiet", REMOTE, f"{ref}:{ref}")
                except subprocess.CalledProcessError as error:
                    trouble = f"expected {trial.name} from git remote {REMOTE}, found: {_last(error.stderr.decode())}"
            if trouble:
                sys.exit(f"error: {trouble}; the same command continues")
            yield trial, reason

    def _needs(self, trial: Trial) -> dict[str, int]:
        """The CPUs and GPUs of a trial, by its params train.threads and train.device. Exits if no node has them."""
        params = dict(self._params)
        for change in trial.changes:
            key, _, value = change.partition("=")
            params[key.removeprefix("train.")] = value
        threads = str(params.get("threads", 1))
        need = {"num_cpus": int(threads) if threads.isdigit() else 1, "num_gpus": int(params.get("device") == "cuda")}
        cpus, gpus = need.values()
        self._cpus = cpus
        most = max((node.get("CPU", 0) for node in self._nodes() if node.get("GPU", 0) >= gpus), default=0)
        if most < cpus:
            sys.exit(
                f"error: expected a node with {cpus} CPU(s) and {gpus} GPU(s) for {trial.name}, found at most "
                f"{most:.0f} CPU(s); train.threads and train.device decide"
            )
        return need

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _slots(self) -> int:
        """How many trials there is room for, if each needs what the last one did; at least one, which Ray may delay."""
        room = sum(int(node.get("CPU", 0)) // self._cpus for node in self._nodes())
        return max(1, min(self._jobs or room, room))


def _check_remotes(baseline: Baseline) -> str:
    """The address of the git remote, from which nodes clone. Exits if they could not, or could not push results."""
    folder = baseline.folder
    if baseline.patch:
        sys.exit("error: expected no uncommitted changes, found some, which a cluster does not see; commit first")
    found = subprocess.run(["git", "remote", "get-url", REMOTE], cwd=folder, capture_output=True, text=True)
    if found.returncode:
        sys.exit(
            f"error: expected a git remote {REMOTE} for the nodes to clone, found none; `git remote add {REMOTE} …`"
        )
    fetched = subprocess.run(["git", "fetch", "--quiet", REMOTE], cwd=folder, capture_output=True, text=True)
    if fetched.returncode:
        sys.exit(f"error: expected git remote {REMOTE} to answer, found: {_last(fetched.stderr)}")
    if not _git(folder, "branch", "--remotes", "--contains", baseline.rev).strip():
        sys.exit(f"error: expected commit {baseline.rev[:7]} in git remote {REMOTE}, found none; `git push` first")
    ref = _ref(baseline.rev, "*")
    known = subprocess.run(["git", "fetch", "--quiet", REMOTE, f"{ref}:{ref}"], cwd=folder, capture_output=True)
    if known.returncode:
        sys.exit(f"error: expected the same experiments here and in git remote {REMOTE}, found some that have diverged")
    config = subprocess.run([*DVC, "config", "--project", "core.remote"], cwd=folder, capture_output=True)
    if config.returncode:
        sys.exit("error: expected a default DVC remote for the results, found none; `dvc remote add --default …`")
    return found.stdout.strip()


def _check_answers(address: str) -> None:
    """Exit if nothing listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            sys.exit(f"error: expected a Ray cluster at {address}, found none: {error}")
    elif address not in ("local", "auto"):
        sys.exit(f"error: expected a Ray address such as 10.0.0.1:6379, found {address}")


def _choose_token(address: str) -> None:
    """Let Ray authenticate as `ray start --head` does: by this machine's token, if it has one.

    A cluster that ends with the command has a token of its own: Ray would write one to ~/.ray, and any later
    `ray start` would ask for it.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if address == "local":
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    elif {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or Path(
        "~/.ray/auth_token"
    ).expanduser().exists():
        os.environ["RAY_AUTH_MODE"] = "token"


@contextlib.contextmanager
def _kept_errors() -> Iterator[IO[bytes]]:
    """Keep in a file what is written to standard error, by compiled code, too; yield a reader of that file."""
    with tempfile.NamedTemporaryFile() as file, Path(file.name).open("rb") as kept:
        shown = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield kept
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def work(source: Source, trial: Trial) -> tuple[str, str]:
    """Run a trial in a Ray task. Return why it failed or "", and what kept it from being run or pushed or ""."""
    import ray

    os.environ |= source.env
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray's; the stages set their own
    try:
        if not source.url:
            return run(source.baseline, trial), ""
        if not ray.get_gpu_ids():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a trial that asks for no GPU has the bits of a CPU on all nodes
        folder, ref = clone(source), _ref(source.baseline.rev, trial.name)
        if _pushed(folder, ref):  # by a node that was lost before it could say so: the trial is done
            _git(folder, "fetch", "--quiet", REMOTE, f"+{ref}:{ref}")
        reason = run(Baseline(folder, source.baseline.rev, b""), trial, reset=True)
        if not reason:
            push(folder, source, trial)
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd[:4]))
        return "", f"expected `{command} …` to work on a node, found: {_last(error.stderr.decode())}"
    except NotRunError as error:
        return "", str(error)
    except OSError as error:
        return "", f"expected to run {trial.name} on a node, found {error}"
    return reason, ""


def clone(source: Source) -> Path:
    """The project in this node's clone at the commit, with the data that the DVC remote has."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    parent = Path(tempfile.gettempdir()) / f"dvc-trials-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    status = parent.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise OSError(f"{parent} is not a folder of this user")
    key = hashlib.sha256(f"{source.url} {source.baseline.rev} {node}".encode()).hexdigest()[:16]
    folder = parent / key
    with FileLock(f"{folder}.lock"):
        if not (folder / ".git" / "complete").exists():
            if not folder.exists():
                shutil.rmtree(parent / f"{key}.part", ignore_errors=True)
                _git(parent, "clone", "--quiet", "--no-checkout", source.url, f"{key}.part")
                (parent / f"{key}.part").rename(folder)
            _git(folder, "checkout", "--quiet", "--detach", source.baseline.rev)
            for name, value in source.identity.items():
                _git(folder, "config", name, value)
            # What the remote lacks, the stages make.
            _checked(folder / source.prefix, [*DVC, "pull", "--allow-missing"])
            (folder / ".git" / "complete").touch()
    return folder / source.prefix


def push(folder: Path, source: Source, trial: Trial) -> None:
    """Push what the experiment made to the DVC remote, then the experiment to the git remote: there, it is whole."""
    ref = _ref(source.baseline.rev, trial.name)
    own = _git(folder, "rev-parse", ref).decode().strip()
    if other := _pushed(folder, ref):
        _git(folder, "fetch", "--quiet", REMOTE, ref)
        trees = {_git(folder, "rev-parse", f"{rev}^{{tree}}") for rev in (own, other)}
        if len(trees) == 1:  # another node ran it, too: to the same bits
            return
        raise OSError(f"another experiment {trial.name} in git remote {REMOTE}")
    with FileLock(folder / LOCKS / "start"):  # DVC's lock does not wait long
        program = "import sys; from dvc.repo import Repo; Repo().push(revs=[sys.argv[1]], workspace=False)"
        _checked(folder, [sys.executable, "-c", program, own])
    _git(folder, "push", "--quiet", REMOTE, f"{ref}:{ref}")


def _pushed(folder: Path, ref: str) -> str:
    """The commit of an experiment in the git remote; "" if it is not there."""
    return _git(folder, "ls-remote", REMOTE, ref).decode().partition("\t")[0]


def _last(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("hint:")]
    return lines[-1] if lines else "nothing"


def _exit_on_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)


def _exit(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)
