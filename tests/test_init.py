"""`dvc-mlflow init` shows what a dvc.yaml could declare, and writes it on request."""

import subprocess
from pathlib import Path

import mlflow
import pytest
from support.commands import environment, execute
from support.project import Project, make_project

DVC_YAML = """\
# The pipeline of a project that declares as little as it can.
stages:
  train:
    cmd: sh train.sh data model.pkl  # the data come by `dvc add`
    deps: [train.sh, data]
    outs:
      - model.pkl
      - scores.json:   # small enough for git
          cache: false
      - settings.json
      - history.csv
  look:
    cmd: sh look.sh | tail -n 1 > best.txt
    deps:
      - history.csv
    outs:
      - best.txt
    plots:
      - curve.tsv
"""
APPLIED = """\
# The pipeline of a project that declares as little as it can.
stages:
  train:
    cmd: sh train.sh data model.pkl  # the data come by `dvc add`
    deps: [train.sh, data]
    outs:
      - model.pkl
      - settings.json
    metrics:
      - scores.json:   # small enough for git
          cache: false
    plots:
      - history.csv:
          x: epoch
  look:
    cmd: sh look.sh | tail -n 1 > best.txt
    deps:
      - history.csv
    outs:
      - best.txt
    plots:
      - curve.tsv:
          x: step
artifacts:
  data:
    path: data
    type: dataset
  model:
    path: model.pkl
    type: model
"""
TRAIN = r"""
cat $1/x > $2
printf 'epoch,loss\n1,0.5\n2,0.25\n' > history.csv
echo '{"accuracy": 0.75, "classes": {"a": 0.5}}' > scores.json
echo '{"name": "net", "kind": "small", "layers": 3}' > settings.json
"""
LOOK = r"""
printf 'step\tvalue\n0\t1\n10\t2\n' > curve.tsv
sort history.csv
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project after `dvc repro`."""
    folder = tmp_path / "project"
    make_project(folder, {"dvc.yaml": DVC_YAML, "train.sh": TRAIN, "look.sh": LOOK, "data/x": "1"})
    run(folder, "dvc", "add", "-q", "data")
    run(folder, "dvc", "repro", "-q")
    return folder


def run(folder: Path, *command: str) -> str:
    ended: subprocess.CompletedProcess[str] = execute(command, folder, environment())
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended
    return ended.stdout


def test_the_diff_is_printed_and_nothing_is_written(folder: Path) -> None:
    printed = run(folder, "dvc-mlflow", "init")
    assert "--- dvc.yaml" in printed and "+    metrics:" in printed and "+    type: model" in printed
    assert "nothing was written; `dvc-mlflow init --apply` writes it" in printed
    assert (folder / "dvc.yaml").read_text() == DVC_YAML
    assert not (folder / "mlflow.db").exists()


def test_the_applied_diff_keeps_comments_and_reruns_no_stage(folder: Path) -> None:
    run(folder, "dvc-mlflow", "init", "--apply")
    assert (folder / "dvc.yaml").read_text() == APPLIED
    assert "up to date" in run(folder, "dvc", "status")
    run(folder, "dvc-mlflow", "sync")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("project")
    assert experiment
    runs = {run.data.tags["stage"]: run for run in client.search_runs([experiment.experiment_id])}
    assert runs["train"].data.metrics == {"accuracy": 0.75, "classes.a": 0.5, "loss": 0.25}
    assert runs["look"].data.metrics == {"value": 2}
    inputs, outputs = runs["train"].inputs, runs["train"].outputs
    assert inputs and [one.dataset.name for one in inputs.dataset_inputs] == ["data"]
    assert outputs and len(outputs.model_outputs) == 1
    assert run(folder, "dvc-mlflow", "init") == "dvc.yaml already declares everything that init looks for\n"


def test_a_table_of_a_top_level_plot_stays_as_it_is(finished_project: Project) -> None:
    printed = run(finished_project.folder, "dvc-mlflow", "init")
    assert printed == "dvc.yaml already declares everything that init looks for\n"


def test_live_prefixes_the_commands_that_need_no_shell(folder: Path) -> None:
    printed = run(folder, "dvc-mlflow", "init", "--live", "--apply")
    expected = "`sh look.sh | tail -n 1 > best.txt` uses shell syntax; add `dvc-mlflow run` by hand"
    assert f"dvc.yaml: {expected}" in printed
    text = (folder / "dvc.yaml").read_text()
    assert "cmd: dvc-mlflow run sh train.sh data model.pkl # the data come by `dvc add`" in text
    assert text.replace("dvc-mlflow run ", "").replace(" # the", "  # the") == APPLIED
