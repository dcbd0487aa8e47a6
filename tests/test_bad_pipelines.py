"""Changes and faults in a pipeline of shell stages: no false record, no duplicate, one clear line for each."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
from mlflow.entities import Run
from support.commands import environment, execute
from support.project import make_project

from dvc_mlflow.execution import Execution, content_of
from dvc_mlflow.project import Git
from dvc_mlflow.project import Project as DVCProject
from dvc_mlflow.store import CLAIM
from dvc_mlflow.store import Store as MLflowStore
from dvc_mlflow.ui import view
from stages.stage import md5

HERE = {"GIT_AUTHOR_NAME": "Ada", "GIT_AUTHOR_EMAIL": "ada@example.org"}
HERE |= {key.replace("AUTHOR", "COMMITTER"): value for key, value in HERE.items()}
PIPELINE = """
stages:
  fit:
    cmd: {prefix}sh fit.sh
    deps: [fit.sh, data]
    params: [rate]
    outs: [model.txt]
    plots: [history.csv: {{x: epoch}}]
  score:
    cmd: wc -c < model.txt > score.yaml
    deps: [model.txt]
    params: [size]
    metrics: [score.yaml]
artifacts:
  net: {{path: model.txt, type: model}}
"""
FIT = """
grep rate params.yaml > model.txt
echo epoch,loss > history.csv
for epoch in 1 2 3; do echo "$epoch,$(cat data/x)$epoch" >> history.csv; sleep ${PAUSE:-0}; done
"""


class Pipeline:
    """A DVC project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, prefix: str = "", git: bool = True) -> None:
        """Fill it with two stages, and commit them; nothing has run."""
        files = {"fit.sh": FIT, "params.yaml": "rate: 1\nsize: 1\n", "data/x": "0."}
        make_project(self.folder, {"dvc.yaml": PIPELINE.format(prefix=prefix), **files}, git)
        if git:
            self.commit()

    def env(self, **more: str) -> dict[str, str]:
        return environment() | HERE | more

    def run(self, *command: str, code: int | None = 0, **more: str) -> str:
        """Run a command; return what it printed. `code` is its expected exit code, None if any will do."""
        ended = execute(command, self.folder, self.env(**more))
        output = ended.stdout + ended.stderr
        assert "Traceback" not in output, output
        assert code != 0 or "warning: " not in output, output
        assert "defect" not in output, output
        assert code is None or ended.returncode == code, f"{command}: {ended.returncode}\n{output}"
        return output

    def write(self, path: str, text: str | bytes) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    def set(self, rate: int = 1, size: int = 1) -> None:
        self.write("params.yaml", f"rate: {rate}\nsize: {size}\n")

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "A pipeline")

    def forget(self) -> None:
        """Remove the store, so that the next command creates a new one."""
        for path in self.folder.glob("mlflow.db*"):
            path.unlink()
        shutil.rmtree(self.folder / "mlartifacts", ignore_errors=True)

    def runs(self) -> list[Run]:
        if not (self.folder / "mlflow.db").exists():  # MLflow would make one
            return []
        client = mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        experiment = client.get_experiment_by_name("project")
        return list(client.search_runs([experiment.experiment_id])) if experiment else []

    def rows(self) -> list[tuple[str, str, str]]:
        """Stage, status and rate of each run."""
        return sorted((run.data.tags["stage"], run.info.status, run.data.params["rate"]) for run in self.runs())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The project, with and without a prefix of its commands. Not to be changed: copy it."""
    folders = {prefix: tmp_path_factory.mktemp("made") / "project" for prefix in ("", "dvc-mlflow run ")}
    for prefix, folder in folders.items():
        Pipeline(folder).make(prefix)
    return folders


@pytest.fixture
def pipeline(made: dict[str, Path], tmp_path: Path) -> Pipeline:
    return Pipeline(shutil.copytree(made[""], tmp_path / "project"))


@pytest.fixture
def named(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The project, whose store this process can open, too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{pipeline.folder}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "project")
    return pipeline


@pytest.fixture
def live(made: dict[str, Path], tmp_path: Path) -> Pipeline:
    """The project whose commands have the prefix `dvc-mlflow run`."""
    return Pipeline(shutil.copytree(made["dvc-mlflow run "], tmp_path / "project"))


def test_an_evaluation_is_never_recorded_with_params_that_did_not_make_its_model(pipeline: Pipeline) -> None:
    pipeline.run("dvc", "repro")
    pipeline.set(rate=2)
    pipeline.run("dvc", "repro", "fit")
    output = pipeline.run("dvc-mlflow", "sync", code=1)
    assert "score: not recorded: dvc.lock does not say what made the model.txt that it read" in output
    assert pipeline.rows() == [("fit", "FINISHED", "2")]
    pipeline.run("dvc", "repro")
    pipeline.run("dvc-mlflow", "sync")
    pipeline.set()
    pipeline.run("dvc", "repro")
    pipeline.run("dvc-mlflow", "sync")
    assert pipeline.rows() == [(stage, "FINISHED", rate) for stage in ("fit", "score") for rate in ("1", "2")]
    pipeline.run("dvc-mlflow", "audit", "--all")


def test_each_lock_has_runs_with_its_own_params_even_if_the_bytes_are_the_same(pipeline: Pipeline) -> None:
    """A stage's param changed but its out did not, so DVC skips the stages after it."""
    names = """stages:
  names:
    cmd: echo 1 > names.txt
    params: [label]
    outs: [names.txt]"""
    text = (pipeline.folder / "dvc.yaml").read_text().replace("\nstages:", names, 1)
    pipeline.write("dvc.yaml", text.replace("deps: [fit.sh, data]", "deps: [fit.sh, data, names.txt]"))
    pipeline.write("params.yaml", "rate: 1\nsize: 1\nlabel: first\n")
    pipeline.run("dvc", "repro")
    pipeline.commit()
    pipeline.write("params.yaml", "rate: 1\nsize: 1\nlabel: second\n")
    pipeline.run("dvc", "repro", "names")
    pipeline.run("dvc-mlflow", "sync")
    pipeline.run("git", "checkout", "-q", ".")
    pipeline.run("dvc", "repro")
    assert pipeline.run("dvc-mlflow", "audit", code=1).count("MLflow has no finished run") == 3
    pipeline.run("dvc-mlflow", "sync")
    pipeline.run("dvc-mlflow", "audit", "--all")
    labels = sorted((run.data.tags["stage"], run.data.params["label"]) for run in pipeline.runs())
    assert labels == [(stage, label) for stage in ("fit", "names", "score") for label in ("first", "second")]
    runs = {run.info.run_id: run for run in pipeline.runs()}
    scores = [run for run in runs.values() if run.data.tags["stage"] == "score"]
    for run in scores:
        parent = runs[run.data.tags["mlflow.parentRunId"]]
        assert (parent.data.tags["stage"], parent.data.params["label"]) == ("fit", run.data.params["label"])


@pytest.mark.parametrize("finished", [False, True], ids=["being recorded", "recorded"])
def test_a_run_moves_to_the_parent_that_stays_if_its_own_is_dropped(named: Pipeline, finished: bool) -> None:
    """Of two recorders of an execution, one drops its run, which a third may have found before that."""
    named.run("dvc", "repro")
    project = DVCProject(named.folder)
    store, fit, score = MLflowStore(project), project.locked("fit"), project.locked("score")
    assert fit and score

    def begin(execution: Execution) -> str:
        content = content_of(execution, project)
        run_id, _ = store.begin(execution, None, os.getpid(), project.now(), Git(), live=False, content=content)
        return run_id

    kept, dropped = sorted(begin(fit) for _ in range(2))
    for run_id in kept, dropped:
        store.complete(run_id, fit)
    store.publish(dropped, fit, None)  # before the other has claimed the execution
    child = begin(score)
    if finished:
        store.complete(child, score)
        store.publish(child, score, None)
    store.client.set_tag(kept, CLAIM, fit.id)
    store.terminate(kept, "FINISHED")
    assert store.publish(dropped, fit, None).info.run_id == kept
    if not finished:
        store.complete(child, score)
        store.publish(child, score, None)
    runs = {run.info.run_id: run for run in named.runs()}
    assert runs.keys() == {kept, child}
    assert (runs[child].info.status, runs[child].data.tags["mlflow.parentRunId"]) == ("FINISHED", kept)
    (model,) = store.models_of(kept, "model.txt")
    assert [(metric.key, metric.run_id) for metric in model.metrics or []] == [("score", child)]
    named.run("dvc-mlflow", "audit", "--all")
    assert named.run("dvc-mlflow", "sync").count("recorded before") == 2


def test_the_view_shows_the_best_run_first_if_the_metrics_files_are_gone(named: Pipeline) -> None:
    named.run("dvc", "repro")
    named.run("dvc-mlflow", "sync")
    (named.folder / "score.yaml").unlink()
    shutil.rmtree(named.folder / ".dvc/cache")
    shown = view(MLflowStore(DVCProject(named.folder)), 20)
    assert (shown["selectedColumns"][0], shown["orderByKey"], shown["orderByAsc"]) == (
        "metrics.`score`",
        "metrics.`score`",
        False,
    )


def test_the_view_sorts_by_the_metric_of_a_family_and_leaves_text_out(named: Pipeline) -> None:
    text = PIPELINE.format(prefix="")
    family = """
  score:
    foreach: [a]
    do:
      cmd: "(echo cost@1: 1; echo note: fine) > ${item}.yaml"
      deps: [model.txt]
      metrics: ["${item}.yaml"]
      meta: {minimize: "cost@1"}
  other:
    cmd: "echo cost: 2 > other.yaml"
    deps: [model.txt]
    metrics: [other.yaml]
artifacts:"""
    head, _, rest = text.partition("\n  score:")
    named.write("dvc.yaml", head + family + rest.partition("artifacts:")[2])
    named.run("dvc", "repro")
    named.run("dvc-mlflow", "sync")
    shown = view(MLflowStore(DVCProject(named.folder)), 20)
    (fit,) = [run for run in named.runs() if run.data.tags["stage"] == "fit"]
    (best,) = [name for name in fit.data.metrics if name.startswith("score_a.cost")]
    assert (shown["orderByKey"], shown["orderByAsc"]) == (f"metrics.`{best}`", True)
    assert shown["selectedColumns"] == [f"metrics.`{best}`", "metrics.`other.cost`"]


SERVING = """
import sys, types
import mlflow
{imported}
sys.path.insert(0, "elsewhere")
sys.modules["odd"] = types.ModuleType("odd")
sys.modules["odd"].__path__ = object()  # as in torch.classes
class Model(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[str]) -> list[str]:
        return [helper.answer()]
mlflow.models.set_model(Model())
"""


def test_code_that_serves_a_model_is_imported_as_when_it_is_loaded(named: Pipeline) -> None:
    net, answers = "net: {path: model.txt, type: model", {"2": "two", "3": "three"}
    served = f"{net}, meta: {{python_model: serve.py, code_paths: [lib/helper]}}"
    named.write("dvc.yaml", PIPELINE.format(prefix="").replace(net, served))
    for rate in "123":
        named.write("serve.py", SERVING.format(imported="import helper" if rate in answers else "import nosuch"))
        named.write("lib/helper/__init__.py", f"def answer():\n    return '{answers.get(rate)}'\n")
        named.set(rate=int(rate))
        named.run("dvc", "repro")
        named.commit()
    said = named.run("dvc-mlflow", "sync", "--all")
    assert "fit: model net is recorded without its code: serve.py cannot be loaded (ModuleNotFoundError: No mod" in said
    named.run("dvc-mlflow", "audit", "--all")
    store = f"sqlite:///{named.folder}/mlflow.db"
    client = mlflow.MlflowClient(store)
    fits = {run.info.run_id: run for run in named.runs() if run.data.tags["stage"] == "fit"}
    models = client.search_logged_models([named.runs()[0].info.experiment_id])
    assert sorted(fits[str(model.source_run_id)].data.params["rate"] for model in models) == ["1", "2", "3"]
    for model in models:
        fit = fits[str(model.source_run_id)]
        assert (fit.info.status, model.status) == ("FINISHED", "READY")
        git = {key: value for key, value in model.tags.items() if ".git." in key}
        assert git == {"mlflow.source.git.commit": fit.data.tags["commit"]}
        if answer := answers.get(fit.data.params["rate"]):
            program = "import mlflow, sys; print(mlflow.pyfunc.load_model(sys.argv[1]).predict(['x']))"
            assert answer in named.run("python", "-c", program, model.model_uri, MLFLOW_TRACKING_URI=store)


def test_a_small_out_that_was_absent_is_no_difference_and_is_added_later(pipeline: Pipeline) -> None:
    pipeline.write("dvc.yaml", PIPELINE.format(prefix="").replace("outs: [model.txt]", "outs: [model.txt, fit.log]"))
    pipeline.write("fit.sh", f"{FIT}\necho fitted > fit.log")
    pipeline.run("dvc", "repro")
    log = pipeline.folder / "fit.log"
    cached = pipeline.folder / ".dvc/cache/files/md5" / md5(log)[:2] / md5(log)[2:]
    kept = cached.rename(pipeline.folder / "kept")
    log.unlink()
    pipeline.run("dvc-mlflow", "sync")
    kept.rename(cached)
    pipeline.run("dvc", "checkout", "-q")
    pipeline.run("dvc-mlflow", "audit")
    pipeline.run("dvc-mlflow", "sync")
    (fit,) = [run for run in pipeline.runs() if run.data.tags["stage"] == "fit"]
    assert "dvc.partial" not in fit.data.tags
    artifact = pipeline.folder / "mlartifacts" / fit.info.run_id / "artifacts/fit.log"
    artifact.unlink()
    assert "artifacts fit.log: MLflow does not have it" in pipeline.run("dvc-mlflow", "audit", code=1)


def test_outs_that_dvc_took_from_a_run_with_another_size_are_not_recorded(pipeline: Pipeline) -> None:
    """DVC's run cache ignores params that are named like its own fields."""
    text = (pipeline.folder / "dvc.yaml").read_text()
    pipeline.write("dvc.yaml", text.replace("wc -c < model.txt >", "grep size params.yaml >"))
    pipeline.run("dvc", "repro")
    pipeline.run("dvc-mlflow", "sync")
    pipeline.set(size=2)
    assert "Stage 'score' is cached" in pipeline.run("dvc", "repro")
    assert (pipeline.folder / "score.yaml").read_text() == "size: 1\n"
    line = "score: not recorded: DVC took the outs of score from its run cache, which ignores params named size"
    assert line in pipeline.run("dvc-mlflow", "sync", code=1)
    assert len(pipeline.rows()) == 2
    pipeline.run("dvc", "repro", "--force")
    pipeline.run("dvc-mlflow", "sync")
    assert [run.data.metrics["size"] for run in pipeline.runs() if run.data.tags["stage"] == "score"] == [2, 1]


def test_a_change_that_git_overlooks_is_in_the_patch(pipeline: Pipeline) -> None:
    """Git takes a file of the same size and time for unchanged; DVC's experiments change params that quickly."""
    params = pipeline.folder / "params.yaml"
    os.utime(params, (1e9, 1e9))
    pipeline.run("git", "config", "core.trustctime", "false")
    pipeline.run("git", "add", "params.yaml")
    pipeline.set(rate=2)
    os.utime(params, (1e9, 1e9))
    pipeline.run("dvc", "repro")
    assert "params.yaml" not in pipeline.run("git", "diff")
    pipeline.run("dvc-mlflow", "sync")
    for run in pipeline.runs():
        assert run.data.tags["git.dirty"] == "true"
        patch = pipeline.folder / "mlartifacts" / run.info.run_id / "artifacts" / "code.patch"
        assert "+rate: 2" in patch.read_text()


def test_a_forced_run_to_the_same_bytes_is_the_same_execution(live: Pipeline) -> None:
    live.run("dvc", "repro")
    live.run("dvc-mlflow", "sync")
    before = {run.info.run_id for run in live.runs()}
    assert "warning" not in live.run("dvc", "repro", "--force")
    live.run("dvc-mlflow", "sync")
    assert {run.info.run_id for run in live.runs()} == before
    assert len(before) == 2


def test_an_experiment_that_equals_its_baseline_has_runs_of_its_own(live: Pipeline) -> None:
    live.run("dvc", "repro")
    live.commit()
    live.run("dvc", "exp", "run", "--temp", "-n", "same", "-S", "rate=1")
    live.run("dvc", "exp", "run", "--temp", "-n", "other", "-S", "rate=2")
    live.run("dvc-mlflow", "sync")
    found = sorted((run.data.tags["stage"], run.data.tags.get("dvc.exp_name", "")) for run in live.runs())
    assert found == [(stage, name) for stage in ("fit", "score") for name in ("", "other", "same")]
    live.run("dvc-mlflow", "audit", "--all")
    assert "as run" not in live.run("dvc-mlflow", "sync")


def test_a_killed_run_is_not_continued_on_other_data(live: Pipeline) -> None:
    process = subprocess.Popen(
        ["dvc", "repro"], cwd=live.folder, env=live.env(PAUSE="5"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    launcher: list[psutil.Process] = []
    while not launcher or not any("loss" in run.data.metrics for run in live.runs()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        launcher = [one for one in children if {"run", "fit.sh"} <= {*words(one)}]
    commands = launcher[0].children()
    launcher[0].send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(commands, 10)
    assert not [one for one in commands if "fit.sh" in words(one)], "the command ends with its launcher"
    while any(run.info.status == "RUNNING" for run in live.runs()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    live.write("data/x", "7.")
    live.run("dvc", "repro")
    assert sorted(run.info.status for run in live.runs()) == ["FINISHED", "KILLED"]
    (whole,) = [run for run in live.runs() if run.info.status == "FINISHED"]
    client = mlflow.MlflowClient(f"sqlite:///{live.folder}/mlflow.db")
    points = client.get_metric_history(whole.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(1, 7.1), (2, 7.2), (3, 7.3)]


def test_a_command_that_ends_without_its_out_has_a_failed_run(live: Pipeline) -> None:
    live.write("fit.sh", "true")
    output = live.run("dvc", "repro", code=None)
    assert "warning: expected model.txt, found nothing: the command ended without it" in output
    assert [run.info.status for run in live.runs()] == ["FAILED"]


@pytest.mark.parametrize("killed", ["the launcher", "DVC"])
def test_a_run_is_killed_if_its_outs_are_gone_since_dvc_runs_it_again(live: Pipeline, killed: str) -> None:
    """DVC has not seen the command succeed: its next process removes the outs, which the recorder has not read yet."""
    command = ["dvc-mlflow", "run", "sh", "-c", "until [ -e go ]; do sleep 0.1; done; sh fit.sh"]
    dvc = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *command]
    process = subprocess.Popen(dvc, cwd=live.folder, env=live.env(DVC_STAGE="fit"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not live.runs():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (launcher,) = psutil.Process(process.pid).children()
    (recorder,) = [one for one in launcher.children() if "dvc_mlflow.recorder" in words(one)]
    recorder.suspend()
    live.write("go", "")
    while launcher.children() != [recorder]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)  # the launcher tells the recorder that the command has ended
    if killed == "DVC":
        process.kill()
    else:
        launcher.kill()
    process.wait()
    (live.folder / "model.txt").unlink()
    recorder.resume()
    assert process.communicate() == (None, "")  # of the recorder, too
    assert [run.info.status for run in live.runs()] == ["KILLED"]


def test_params_that_change_while_a_stage_runs_are_not_recorded_as_its_own(live: Pipeline) -> None:
    """DVC reads them when the stage ends, and takes these for the ones that it started with."""
    process = subprocess.Popen(
        ["dvc", "repro"], cwd=live.folder, env=live.env(PAUSE="2"), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any("loss" in run.data.metrics for run in live.runs()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    live.set(rate=2)
    assert "warning: params or deps of fit changed while it was running" in process.communicate()[1]
    assert (live.folder / "model.txt").read_text() == "rate: 1\n"
    assert "rate: 2" in (live.folder / "dvc.lock").read_text()
    output = live.run("dvc-mlflow", "sync", code=1)
    for stage in ("fit", "score"):
        assert f"{stage}: not recorded: params or deps of fit changed while it was running" in output
    assert live.rows() == [("fit", "FINISHED", "1")]
    live.run("dvc-mlflow", "audit", "--all", code=1)
    live.run("dvc", "repro", "--force")
    live.run("dvc-mlflow", "sync")
    assert live.rows() == [("fit", "FINISHED", "1"), ("fit", "FINISHED", "2"), ("score", "FINISHED", "2")]
    live.run("dvc-mlflow", "audit", "--all")


def test_a_dvc_yaml_that_the_command_is_writing_is_read_again(live: Pipeline) -> None:
    """DVCLive adds its files to dvc.yaml while the recorder starts."""
    live.write("fit.sh", f"cp dvc.yaml whole; : > dvc.yaml; sleep 2; cat whole > dvc.yaml\n{FIT}")
    live.run("dvc", "repro")
    assert live.rows() == [("fit", "FINISHED", "1")]


def test_points_of_an_earlier_run_in_a_kept_out_are_not_recorded(live: Pipeline) -> None:
    """DVC does not remove an out with `persist`."""
    kept = PIPELINE.replace("{{x: epoch}}", "{{x: epoch, persist: true}}")
    live.write("dvc.yaml", kept.format(prefix="dvc-mlflow run "))
    live.run("dvc", "repro")
    live.write("data/x", "7.")
    live.write("fit.sh", f"sleep 2\n{FIT}")
    live.run("dvc", "repro")
    assert live.rows().count(("fit", "FINISHED", "1")) == 2


def words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def test_a_launcher_that_ignores_ctrl_c_starts_its_command_so(live: Pipeline) -> None:
    ignores = "trap '' INT; exec dvc-mlflow run sh -c 'kill -INT $$; echo went on'"
    assert "went on" in live.run("sh", "-c", ignores, code=None, DVC_STAGE="fit")


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -TERM $$", -15), ("kill -KILL $$", -9)])
def test_the_launcher_ends_as_its_command_does(live: Pipeline, command: str, code: int) -> None:
    status = "FAILED" if code > 0 else "KILLED"
    live.run("dvc-mlflow", "run", "sh", "-c", command, code=code, DVC_STAGE="fit")
    assert [run.info.status for run in live.runs()] == [status]


def test_a_restore_fetches_what_is_missing_instead_of_computing_it(live: Pipeline, tmp_path: Path) -> None:
    """In a shallow clone with an empty cache, git fetches the commit; the bytes come from DVC's remote."""
    live.run("dvc", "remote", "add", "-d", "storage", str(tmp_path / "storage"))
    live.run("dvc", "repro")
    live.commit()
    live.run("dvc", "push")
    live.set(rate=2)
    live.run("dvc", "repro")
    live.commit()
    first = next(run for run in live.runs() if run.data.tags["stage"] == "fit" and run.data.params["rate"] == "1")
    clone = Pipeline(tmp_path / "clone")
    live.run("git", "clone", "-q", "--depth", "1", live.folder.as_uri(), str(clone.folder))
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{live.folder}/mlflow.db", "MLFLOW_EXPERIMENT_NAME": "project"}
    before = [(run.info.run_id, run.data.tags) for run in live.runs()]
    output = clone.run(
        "dvc-mlflow", "lineage", first.info.run_id, "--restore", str(tmp_path / "again"), code=0, **store
    )
    assert output.count("verified ") == 3 + 1, output  # deps and outs
    assert "Running stage" not in output
    assert (tmp_path / "again/model.txt").read_text() == "rate: 1\n"
    assert [(run.info.run_id, run.data.tags) for run in live.runs()] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_restore_that_is_stopped_leaves_no_folder(live: Pipeline, number: signal.Signals, tmp_path: Path) -> None:
    live.run("dvc", "repro")
    (run,) = [run for run in live.runs() if run.data.tags["stage"] == "fit"]
    shutil.rmtree(live.folder / ".dvc/cache")
    command = ["dvc-mlflow", "lineage", run.info.run_id, "--restore", str(tmp_path / "again")]
    process = subprocess.Popen(command, cwd=live.folder, env=live.env(PAUSE="9"), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "again/history.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert b"Traceback" not in process.communicate()[1]
    assert process.returncode == 128 + number
    assert not (tmp_path / "again").exists()
    assert psutil.wait_procs(started, timeout=10)[1] == [], "the command continues in a folder that is gone"


def test_two_syncs_at_once_into_a_new_file_make_one_run_of_each_execution(pipeline: Pipeline) -> None:
    pipeline.run("dvc", "repro")
    both = [
        subprocess.Popen(["dvc-mlflow", "sync"], cwd=pipeline.folder, env=pipeline.env(), stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [(process.communicate()[1], process.returncode) for process in both] == [(b"", 0), (b"", 0)]
    assert pipeline.rows() == [("fit", "FINISHED", "1"), ("score", "FINISHED", "1")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_next_sync_completes_one_that_was_stopped(pipeline: Pipeline, number: signal.Signals) -> None:
    pipeline.run("dvc", "repro")
    process = subprocess.Popen(["dvc-mlflow", "sync"], cwd=pipeline.folder, env=pipeline.env(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (pipeline.folder / "mlflow.db").exists() or not pipeline.runs():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    assert b"Traceback" not in process.communicate()[1]
    pipeline.run("dvc-mlflow", "sync")
    assert pipeline.rows() == [("fit", "FINISHED", "1"), ("score", "FINISHED", "1")]
    pipeline.run("dvc-mlflow", "audit", "--all")


def test_a_stale_run_of_another_host_is_closed_by_its_age(pipeline: Pipeline) -> None:
    pipeline.run("dvc", "repro")
    pipeline.run("dvc-mlflow", "sync")
    client = mlflow.MlflowClient(f"sqlite:///{pipeline.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("project")
    assert experiment
    tags = {"stage": "fit", "process.host": "gone", "process.pid": "1", "process.created": "1.0"}
    old = client.create_run(experiment.experiment_id, int((time.time() - 7200) * 1000), tags).info.run_id
    new = client.create_run(experiment.experiment_id, tags=tags).info.run_id
    assert f"closed run {old} of gone" in pipeline.run("dvc-mlflow", "sync", "--close-stale", "1")
    assert [client.get_run(run_id).info.status for run_id in (old, new)] == ["KILLED", "RUNNING"]


def test_a_run_that_was_about_to_be_removed_is_removed_by_the_next_sync(pipeline: Pipeline) -> None:
    pipeline.run("dvc", "repro")
    pipeline.run("dvc-mlflow", "sync")
    client = mlflow.MlflowClient(f"sqlite:///{pipeline.folder}/mlflow.db")
    (fit,) = [run for run in pipeline.runs() if run.data.tags["stage"] == "fit"]
    tags = {key: value for key, value in fit.data.tags.items() if not key.startswith("mlflow.")}
    left = client.create_run(fit.info.experiment_id, tags=tags | {"process.created": "1.0"}).info.run_id
    client.set_terminated(left, "KILLED")
    assert f"closed run {left}" in pipeline.run("dvc-mlflow", "sync")
    assert pipeline.rows() == [("fit", "FINISHED", "1"), ("score", "FINISHED", "1")]


METRICS = {
    "a list": (b"[1, 2]", "expected a mapping of names to numbers, found list"),
    "not UTF-8": (b"a: \xff", "expected metrics, found something else (UnicodeDecodeError)"),
    "not YAML": (b"a: [", "expected metrics, found something else"),
    "100,000 keys": (
        json.dumps({str(number): number for number in range(100_000)}).encode(),
        "expected at most 10,000 metrics, found 100,000",
    ),
    "numbers that are none": (b"a: .nan\nb: .inf\nc: 1e999\nd: text\n", ""),
}


@pytest.mark.parametrize(("content", "line"), METRICS.values(), ids=METRICS.keys())
def test_a_metrics_file_that_cannot_be_shown_is_named_and_costs_no_record(
    pipeline: Pipeline, content: bytes, line: str
) -> None:
    text = (pipeline.folder / "dvc.yaml").read_text()
    if content.startswith(b"{"):  # DVC takes a minute to read so much YAML
        text = text.replace("score.yaml", "score.json")
    pipeline.write("given", content)
    pipeline.write("dvc.yaml", text.replace("wc -c < model.txt >", "cp given"))
    pipeline.run("dvc", "repro")
    assert line in pipeline.run("dvc-mlflow", "sync")
    assert pipeline.rows() == [("fit", "FINISHED", "1"), ("score", "FINISHED", "1")]
    pipeline.run("dvc-mlflow", "audit", "--all")


def test_curves_without_their_x_are_named_and_cost_no_record(pipeline: Pipeline) -> None:
    pipeline.write("fit.sh", FIT.replace("epoch,loss", "round,loss"))
    pipeline.run("dvc", "repro")
    line = "history.csv: expected a whole number as epoch, found none; no curves shown"
    assert line in pipeline.run("dvc-mlflow", "sync")
    assert len(pipeline.rows()) == 2


@pytest.mark.parametrize("x", ["0.5", "inf", "nan", "a word"])
def test_a_plot_whose_x_is_no_whole_number_is_only_an_artifact(pipeline: Pipeline, x: str) -> None:
    pipeline.write("fit.sh", f'grep rate params.yaml > model.txt; printf "epoch,loss\\n{x},1\\n" > history.csv')
    pipeline.run("dvc", "repro")
    assert "history.csv" not in pipeline.run("dvc-mlflow", "sync")
    (fit,) = [run for run in pipeline.runs() if run.data.tags["stage"] == "fit"]
    assert "loss" not in fit.data.metrics
    assert (pipeline.folder / "mlartifacts" / fit.info.run_id / "artifacts/history.csv").exists()


@pytest.mark.parametrize("everything", [[], ["--all"]], ids=["workspace", "history"])
def test_an_unavailable_image_is_added_to_its_record_later(pipeline: Pipeline, everything: list[str]) -> None:
    text = PIPELINE.format(prefix="").replace(
        "metrics: [score.yaml]", "metrics: [score.yaml]\n    plots: [picture.png]"
    )
    pipeline.write("dvc.yaml", text.replace("> score.yaml", "> score.yaml; echo picture > picture.png"))
    pipeline.run("dvc", "repro")
    pipeline.commit()
    picture = pipeline.folder / "picture.png"
    cached = pipeline.folder / ".dvc/cache/files/md5" / md5(picture)[:2] / md5(picture)[2:]
    kept = cached.rename(pipeline.folder / "kept")
    picture.unlink()
    pipeline.run("dvc-mlflow", "sync", *everything)
    (score,) = [run for run in pipeline.runs() if run.data.tags["stage"] == "score"]
    assert score.data.metrics == {"score": 8.0}
    assert "dvc.absent.picture.png" in score.data.tags
    kept.rename(cached)
    assert "picture.png" in pipeline.run("dvc-mlflow", "audit", "--all", code=1)
    pipeline.run("dvc", "checkout", "-q")
    pipeline.run("dvc-mlflow", "sync", *everything)
    pipeline.run("dvc-mlflow", "audit", "--all")
    (score,) = [run for run in pipeline.runs() if run.data.tags["stage"] == "score"]
    assert "dvc.absent.picture.png" not in score.data.tags


def test_bytes_that_are_gone_are_named_and_sync_fails(pipeline: Pipeline) -> None:
    pipeline.run("dvc", "repro")
    shutil.rmtree(pipeline.folder / ".dvc/cache")
    (pipeline.folder / "history.csv").unlink()
    output = pipeline.run("dvc-mlflow", "sync", code=1)
    assert "fit: not recorded: history.csv does not match dvc.lock and is not in DVC's cache" in output


def test_a_project_without_lock_or_git_is_no_failure(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path / "project")
    pipeline.make(git=False)
    assert pipeline.run("dvc-mlflow", "sync") == "fit: not run yet\nscore: not run yet\n"
    pipeline.run("dvc", "repro")
    pipeline.run("dvc-mlflow", "sync")
    pipeline.run("dvc-mlflow", "audit")
    assert pipeline.rows() == [("fit", "FINISHED", "1"), ("score", "FINISHED", "1")]


def test_a_folder_without_a_project_is_refused_in_one_line(tmp_path: Path) -> None:
    ended = subprocess.run(["dvc-mlflow", "sync"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: expected a DVC project in ")
