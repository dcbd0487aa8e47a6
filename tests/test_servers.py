"""MLflow failures never cost you work: a real server is stopped, hung and started again."""

import http.server
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest
from mlflow.entities import Run
from support.commands import environment
from support.project import STAGES, Project, copy, ran
from support.store import Store

from benchmarks.servers import MLflow, free_port
from benchmarks.servers import postgres as start_postgres

MODEL = "models/lenet.safetensors"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflow]:
    folder = tmp_path_factory.mktemp("server")
    server = MLflow(folder, f"sqlite:///{folder / 'mlflow.db'}", environment())
    yield server
    server.stop()


class Outcome(NamedTuple):
    ran: list[str]
    warnings: list[str]
    seconds: float  # from the stage's start to the first warning


def repro(project: Project, uri: str, on_line: Callable[[str], None] = lambda _: None) -> Outcome:
    """Run `dvc repro`, which must succeed, and call on_line with each line of its output."""
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=project.folder,
        env=environment() | {"PYTHONUNBUFFERED": "1", "MLFLOW_TRACKING_URI": uri},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines, times = [], []
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        times.append(time.monotonic())
        on_line(line)
    output = "".join(lines)
    assert process.wait() == 0, output
    assert "Traceback" not in output
    warned = [index for index, line in enumerate(lines) if "warning" in line.lower()]
    started = next(index for index, line in enumerate(lines) if line.startswith("> "))
    return Outcome(ran(output), [lines[index] for index in warned], times[warned[0]] - times[started] if warned else 0)


def assert_sync_completes_the_record(project: Project, uri: str) -> None:
    project.command("sync", MLFLOW_TRACKING_URI=uri)
    agreed = project.command("audit", MLFLOW_TRACKING_URI=uri)
    assert "agree" in agreed.stdout


def test_a_server_that_is_down_costs_one_warning(project: Project, server: MLflow) -> None:
    project.set("evaluate.batch_size", 50)
    outcome = repro(project, f"http://127.0.0.1:{free_port()}")
    assert outcome.ran == ["evaluate"]
    (warning,) = outcome.warnings
    assert warning.startswith("warning: MLflow cannot use http://127.0.0.1:")
    assert outcome.seconds < 10
    assert_sync_completes_the_record(project, server.uri)


def test_a_server_that_answers_500_costs_one_warning(project: Project) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    project.set("evaluate.batch_size", 50)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as failing:
        threading.Thread(target=failing.serve_forever, args=[0.01], daemon=True).start()
        outcome = repro(project, f"http://127.0.0.1:{failing.server_port}")
        failing.shutdown()
    assert (outcome.ran, len(outcome.warnings)) == (["evaluate"], 1)
    assert outcome.seconds < 10


def test_a_server_that_hangs_costs_one_warning(project: Project, server: MLflow) -> None:
    project.set("evaluate.batch_size", 60)
    server.signal(signal.SIGSTOP)
    try:
        outcome = repro(project, server.uri)
    finally:
        server.signal(signal.SIGCONT)
    assert (outcome.ran, len(outcome.warnings)) == (["evaluate"], 1)
    assert outcome.seconds < 10
    assert_sync_completes_the_record(project, server.uri)


def test_a_server_that_goes_down_in_the_middle_costs_one_warning_and_the_record_is_completed(
    project: Project, server: MLflow
) -> None:
    project.set("train.seed", 3)
    project.set("train.epochs", 12)
    project.set("train.batch_size", 2)

    def stop(line: str) -> None:
        if line.startswith("epoch 10/"):  # by then the run has begun
            server.stop()

    outcome = repro(project, server.uri, stop)
    assert outcome.ran == ["train", "evaluate"]
    assert len(outcome.warnings) == 2, "one for each stage"
    server.start()
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("fashion-mnist-lenet")
    assert experiment
    of_this_seed = "tags.stage = 'train' and params.`train.seed` = '3'"
    (cut,) = client.search_runs([experiment.experiment_id], of_this_seed)
    assert cut.info.status == "RUNNING"
    assert_sync_completes_the_record(project, server.uri)
    (completed,) = client.search_runs([experiment.experiment_id], of_this_seed)
    assert (completed.info.run_id, completed.info.status) == (cut.info.run_id, "FINISHED")
    points = client.get_metric_history(cut.info.run_id, "train_loss")
    assert [point.step for point in points] == list(range(1, 13))


def test_a_read_only_store_costs_one_warning(project: Project) -> None:
    project.set("evaluate.batch_size", 50)
    before = (project.folder / "mlflow.db").read_bytes()
    outcome = repro(project, f"sqlite:///file:{project.folder}/mlflow.db?mode=ro&uri=true")
    assert (outcome.ran, len(outcome.warnings)) == (["evaluate"], 1)
    assert "readonly" in outcome.warnings[0]
    assert outcome.seconds < 10
    assert (project.folder / "mlflow.db").read_bytes() == before
    project.command("sync")
    assert Store(project).runs("evaluate")[0].data.tags["restored"] == "true"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Callable[[str], str]]:
    """Makes a database of this name in a PostgreSQL that listens on loopback; returns its address."""
    try:
        with start_postgres() as create:
            yield create
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def shared(tmp_path: Path, postgres: Callable[[str], str]) -> Iterator[MLflow]:
    """A server on a PostgreSQL database of its own."""
    folder = tmp_path / "server"
    folder.mkdir()
    server = MLflow(folder, postgres(f"hosts_{tmp_path.name}"), environment())
    yield server
    server.stop()


def test_the_pipeline_records_on_a_team_server_with_postgresql(project: Project, shared: MLflow) -> None:
    project.set("evaluate.batch_size", 50)
    assert repro(project, shared.uri) == (["evaluate"], [], 0)
    assert_sync_completes_the_record(project, shared.uri)
    client = mlflow.MlflowClient(shared.uri)
    experiment = client.get_experiment_by_name("fashion-mnist-lenet")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["stage"]: run.info.status for run in runs} == dict.fromkeys(STAGES, "FINISHED")
    assert all(run.info.artifact_uri.startswith("mlflow-artifacts:/") for run in runs), "proxied by the server"
    assert list((shared.log.parent / "artifacts").rglob("lenet.safetensors"))
    assert not (project.folder / "mlruns").exists()


@pytest.fixture
def hosts(tmp_path: Path) -> dict[str, dict[str, str]]:
    """The environments of two hosts: what makes each Python program believe that it runs there."""
    (tmp_path / "host").mkdir()
    patch = "import os, socket\nsocket.gethostname = lambda: os.environ['TEST_HOST']\n"
    (tmp_path / "host/sitecustomize.py").write_text(patch)
    return {name: {"PYTHONPATH": str(tmp_path / "host"), "TEST_HOST": name} for name in ("one", "other")}


def at_once(commands: Mapping[Path, Sequence[str]], envs: Iterable[dict[str, str]]) -> list[str]:
    """Run a shell command in each folder, all at once; none may fail or warn. Returns what they print."""
    both = [
        subprocess.Popen(
            ["sh", "-ec", "\n".join(lines)],
            cwd=folder,
            env=environment() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for (folder, lines), env in zip(commands.items(), envs, strict=True)
    ]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert not any(re.search("^(warning|error): ", output, re.MULTILINE) for output in outputs), outputs
    return outputs


def rows(client: mlflow.MlflowClient, experiment: str) -> list[Run]:
    """The runs of an MLflow experiment, each finished, and each child below the run that made its model."""
    found = client.get_experiment_by_name(experiment)
    assert found
    runs = client.search_runs([found.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    makers = {run.data.tags[f"dvc.outs.{MODEL}"]: run.info.run_id for run in runs if run.data.tags["stage"] == "train"}
    for run in runs:
        if run.data.tags["stage"] == "evaluate":
            assert run.data.tags["mlflow.parentRunId"] == makers[run.data.tags[f"dvc.deps.{MODEL}"]]
    assert len(client.search_logged_models([found.experiment_id])) == len(makers)
    return list(runs)


def test_two_hosts_that_record_each_other_s_results_at_once_make_one_run_of_each_execution(
    two_results: Project,
    hosts: dict[str, dict[str, str]],
    tmp_path: Path,
    shared: MLflow,
    stress: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """The one records the first commit, then the second; the other begins with the second."""
    tries = 20 if stress else 2
    one = copy(two_results, tmp_path)
    one.commit("Learn slowly")
    other = copy(one, tmp_path / "other")
    commands = {
        one.folder: ["dvc-mlflow sync --rev main~1", "dvc-mlflow sync --rev main"],
        other.folder: ["dvc-mlflow sync --rev main", "dvc-mlflow sync --rev main~1"],
    }
    for number in range(tries):
        name = f"try {number}"
        address = {"MLFLOW_TRACKING_URI": shared.uri, "MLFLOW_EXPERIMENT_NAME": name}
        at_once(commands, [host | address for host in hosts.values()])
        stages = sorted(run.data.tags["stage"] for run in rows(mlflow.MlflowClient(shared.uri), name))
        assert stages == sorted([*STAGES, "train", "evaluate"])
    record_property("pairs of hosts that recorded each other's results at once", tries)


def test_two_hosts_that_run_the_same_stage_at_once_make_one_run_of_it(
    finished_project: Project,
    hosts: dict[str, dict[str, str]],
    tmp_path: Path,
    shared: MLflow,
    stress: bool,
    record_property: Callable[[str, object], None],
) -> None:
    tries = 20 if stress else 1
    clones = [copy(finished_project, tmp_path / name) for name in hosts]
    for number in range(tries):
        name = f"try {number}"
        for clone in clones:
            clone.set("evaluate.batch_size", 10 + number)
        address = {"MLFLOW_TRACKING_URI": shared.uri, "MLFLOW_EXPERIMENT_NAME": name}
        commands = {clone.folder: ["dvc repro"] for clone in clones}
        outputs = at_once(commands, [host | address for host in hosts.values()])
        assert [ran(output) for output in outputs] == [["evaluate"], ["evaluate"]]
        runs = rows(mlflow.MlflowClient(shared.uri), name)
        assert sorted(run.data.tags["stage"] for run in runs) == sorted(STAGES)
    record_property("pairs of hosts that ran the same stage at once", tries)
