"""What the real DVCLive writes is recorded without code: live, by sync, and from its experiments."""

from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run
from support.commands import environment, execute
from support.project import make_project

TRAIN = """
import yaml
from dvclive import Live
rate = yaml.safe_load(open("params.yaml"))["rate"]
with Live() as live:
    for epoch in range(3):
        live.log_metric("train/loss", rate / (epoch + 1))
        live.log_metric("accuracy", 0.5 + rate * epoch)
        live.next_step()
    live.summary["best"] = rate
    open("model.bin", "w").write(str(rate))
    live.log_artifact("model.bin", type="model", name="net", cache=False)
"""
DVC_YAML = """
stages:
  train:
    cmd: {prefix}python train.py
    deps: [train.py]
    params: [rate]
    outs:
      - model.bin
      - dvclive: {{cache: false}}
"""


class Live:
    """A project with DVCLive whose dvc.yaml has only a stage: DVCLive adds metrics, plots and artifacts to it."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder = folder / "project"
        files = {"train.py": TRAIN, "params.yaml": "rate: 0.125\n", ".gitignore": "/mlflow.db*\n/mlartifacts\n"}
        make_project(self.folder, {"dvc.yaml": DVC_YAML.format(prefix=prefix), **files})
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "Begin")
        self.output = self.run("dvc", "repro")
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "Train")

    def run(self, *command: str) -> str:
        ended = execute(command, self.folder, environment())
        assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended
        return ended.stdout + ended.stderr

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    def runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name("project")
        return list(self.client.search_runs([experiment.experiment_id])) if experiment else []

    def curve(self, run: Run, name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, name)]

    def assert_shown(self, run: Run, rate: float) -> None:
        assert run.data.params == {"rate": str(rate)}
        assert run.data.metrics == {"train.loss": rate / 3, "accuracy": 0.5 + 2 * rate, "best": rate, "step": 2}
        assert self.curve(run, "train.loss") == [(0, rate), (1, rate / 2), (2, rate / 3)]
        assert self.curve(run, "accuracy") == [(0, 0.5), (1, 0.5 + rate), (2, 0.5 + 2 * rate)]
        assert run.outputs and len(run.outputs.model_outputs) == 1


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """A project with an experiment, after `dvc-mlflow sync --all`."""
    live = Live(tmp_path_factory.mktemp("synced"))
    live.run("dvc", "exp", "run", "-n", "tried", "-S", "rate=0.25")
    live.run("git", "checkout", "-q", ".")
    live.run("dvc", "checkout", "-q", "--force")
    (live.folder / "params.yaml").write_text("rate: 0.5\n")
    live.run("python", "train.py")  # no stage: DVCLive itself saves an experiment, with its dvc.lock
    live.run("git", "checkout", "-q", ".")
    live.run("dvc", "checkout", "-q", "--force")
    live.output = live.run("dvc-mlflow", "sync", "--all")
    return live


def test_sync_shows_its_metrics_and_curves(synced: Live) -> None:
    (run,) = [run for run in synced.runs() if "dvc.exp_name" not in run.data.tags]
    synced.assert_shown(run, 0.125)
    assert "agree" in synced.run("dvc-mlflow", "audit", "--all")


def test_experiments_that_dvclive_saved_itself_have_rows(synced: Live) -> None:
    names = synced.run("dvc", "exp", "list", "--name-only").split()
    runs = {name: run for run in synced.runs() if (name := run.data.tags.get("dvc.exp_name"))}
    assert len(names) == 2 and {*runs} == {*names}
    for name, run in runs.items():
        synced.assert_shown(run, 0.25 if name == "tried" else 0.5)


def test_the_live_record_of_the_very_first_run_shows_what_dvclive_adds_to_dvc_yaml(tmp_path: Path) -> None:
    live = Live(tmp_path, "dvc-mlflow run ")
    assert "warning" not in live.output
    (run,) = live.runs()
    assert run.info.status == "FINISHED" and "restored" not in run.data.tags
    live.assert_shown(run, 0.125)
    assert "agree" in live.run("dvc-mlflow", "audit", "--all")
