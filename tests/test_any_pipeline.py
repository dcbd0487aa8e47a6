"""A pipeline that the package does not know, of shell and Python stages that use all that DVC can express."""

import json
import math
import re
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run
from support.commands import environment, execute

from dvc_mlflow.store import move_artifacts

HERE = {"GIT_AUTHOR_NAME": "Ada", "GIT_AUTHOR_EMAIL": "ada@example.org"}
HERE |= {key.replace("AUTHOR", "COMMITTER"): value for key, value in HERE.items()}

PIPELINE = """
vars:
  - folder: results
stages:
  prepare:
    desc: Two parts of the table.
    cmd:
      - mkdir -p parts/deep
      - head -n 1 raw.csv > parts/a.csv
      - {run}tail -n +2 raw.csv -- {tail}
    deps: [raw.csv]
    outs: [parts]
  train:
    cmd: {run}python train.py parts ${{folder}} model.bin
    deps: [train.py, parts]
    params:
      - params.yaml: [train]
      - conf.json: [a.b, list]
      - conf.toml: [deep]
      - conf.py: [RATE, Net.width]
      - whole.yaml:
    outs: [model.bin, "${{folder}}"]
  evaluate:
    cmd: {run}sh evaluate.sh evaluate.json
    deps: [evaluate.sh, model.bin]
    metrics:
      - evaluate.json:
          cache: false
  seeds:
    foreach: [1, 2]
    do:
      cmd: {run}sh score.sh ${{item}} seed-${{item}}.json
      deps: [score.sh]
      metrics: ["seed-${{item}}.json"]
  sizes:
    foreach:
      small: {{n: 1}}
      big: {{n: 9}}
    do:
      cmd: sh score.sh ${{item.n}} size-${{key}}.json
      metrics: ["size-${{key}}.json"]
  pairs:
    foreach:
      - {{name: u, n: 3}}
      - {{name: v, n: 4}}
    do:
      cmd: sh score.sh ${{item.n}} pair-${{item.name}}.json
      metrics: ["pair-${{item.name}}.json"]
  grid:
    matrix:
      rate: [0.1, 0.2]
      kind: [p, q]
    cmd: sh score.sh ${{item.rate}} grid-${{item.rate}}-${{item.kind}}.json
    metrics: ["grid-${{item.rate}}-${{item.kind}}.json"]
  steady:
    cmd: cat fetched.txt extra.txt > steady.txt
    deps: [fetched.txt, extra.txt]
    outs:
      - steady.txt:
          push: false
  always:
    cmd: echo again > always.txt
    always_changed: true
    outs:
      - always.txt:
          persist: true
  silent:
    cmd: "true"
    params: [silent]
{gone}
metrics:
  - ${{folder}}/metrics.json
plots:
  - ${{folder}}/note.txt
  - loss:
      x: epoch
      y:
        ${{folder}}/history.csv: [loss, accuracy]
artifacts:
  parts:
    path: parts
    type: dataset
  net:
    path: model.bin
    type: model
"""

GONE = """
  gone:
    cmd: echo gone > gone.txt
    outs: [gone.txt]
"""

SUB = """
stages:
  train:
    cmd: {run}sh ../../score.sh 7 result.json
    wdir: work
    deps: [../../score.sh]
    params: [rate]
    metrics: [result.json]
    outs: [log.tsv]
plots:
  - work/log.tsv:
      x: step
      y: value
"""

FILES = {
    "raw.csv": "name,value\nx,1\ny,2\n",
    "params.yaml": "train: {rate: 0.5, layers: [8, 4]}\nsilent: true\nunused: 1\n",
    "conf.json": '{"a": {"b": 1, "c": 2}, "list": [1, {"d": 3, "c": 4}]}',
    "conf.toml": "top = 1\n[deep]\nname = 't'\n[deep.er]\nx = 2.5\n",
    "conf.py": "RATE = 0.25\nUNUSED = 3\nclass Net:\n    width = 16\n",
    "whole.yaml": "p: 1\nq: {r: two}\n",
    "extra.txt": "extra\n",
    "train.py": """
import json, sys
from pathlib import Path
parts, out, model = map(Path, sys.argv[1:])
out.mkdir(exist_ok=True)
Path(model).write_bytes((parts / "a.csv").read_bytes() * 3)
rows = "".join(f"{epoch},{1 / epoch},{0.2 * epoch}\\n" for epoch in (1, 2, 3))
(out / "history.csv").write_text("epoch,loss,accuracy\\n" + rows)
values = {"loss": 0.125, "accuracy": 0.2 * 3, "best": {"epoch": 3, "done": True}, "optimizer": "sgd"}
(out / "metrics.json").write_text(json.dumps(values))
(out / "note.txt").write_text("a note\\n")
""",
    "evaluate.sh": """echo '{"accuracy": 0.75, "worst": NaN, "classes": {"a b": {"f1": 0.5}}}' > $1\n""",
    "score.sh": 'echo "{\\"score\\": $1}" > $2\nprintf \'step\\tvalue\\n0\\t1.5\\n10\\t0.5\\n\' > log.tsv\n',
    "sub/work/params.yaml": "rate: 3\n",
    ".gitignore": "/log.tsv\n/mlflow.db*\n/mlartifacts\n",
}

STAGES = {
    *("prepare", "train", "evaluate", "seeds@1", "seeds@2", "sizes@small", "sizes@big", "pairs@0", "pairs@1"),
    *("grid@0.1-p", "grid@0.1-q", "grid@0.2-p", "grid@0.2-q", "steady", "always", "silent", "sub/dvc.yaml:train"),
}
LIVE = {"prepare", "train", "evaluate", "seeds@1", "seeds@2", "sub/dvc.yaml:train"}


@dataclass(frozen=True)
class Pipeline:
    """A DVC project in a subfolder of its git repository, and its MLflow store."""

    folder: Path

    def run(self, *command: str, code: int | None = 0) -> str:
        """Run a command; return what it printed. `code` is its expected exit code, None if any will do."""
        ended = execute(command, self.folder, environment() | HERE)
        output = ended.stdout + ended.stderr
        assert "Traceback" not in output, output
        assert code != 0 or "warning: " not in output, output
        assert code is None or ended.returncode == code, f"{command}: {ended.returncode}\n{output}"
        return output

    def write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    def runs(self) -> list[Run]:
        client = self.client
        experiment = client.get_experiment_by_name(self.folder.name)
        return list(client.search_runs([experiment.experiment_id])) if experiment else []

    def named(self) -> dict[str, Run]:
        """The only run of each stage."""
        runs = self.runs()
        named = {run.data.tags["stage"]: run for run in runs}
        assert len(named) == len(runs), sorted(run.data.tags["stage"] for run in runs)
        return named

    def curve(self, run: Run, name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, name)]

    def artifacts(self, run: Run) -> dict[str, bytes]:
        """The run's files, except the execution, which contains the command, and the patch."""
        folder = Path(re.sub("^file://", "", run.info.artifact_uri))
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if name not in ("execution.json", "code.patch")}


def make(folder: Path, run: str) -> Pipeline:
    """The pipeline after `dvc repro`, with a prefix before some commands; then one stage is removed."""
    pipeline = Pipeline(folder / "repository" / "project")
    pipeline.folder.mkdir(parents=True)
    pipeline.write("../outside.txt", "from outside\n")
    for path, text in FILES.items():
        pipeline.write(path, text)
    tail = "| cat > parts/deep/b.csv"  # a shell command: the prefix goes before what it runs
    text = PIPELINE.replace("raw.csv -- {tail}", f"raw.csv {tail}")
    pipeline.write("dvc.yaml", text.format(run=run, gone=GONE))
    pipeline.write("sub/dvc.yaml", SUB.format(run=run))
    pipeline.run("git", "init", "-q", "-b", "main", "..")
    pipeline.run("dvc", "init", "-q", "--subdir")
    pipeline.run("dvc", "add", "-q", "raw.csv")
    pipeline.run("dvc", "import-url", "-q", "../outside.txt", "fetched.txt")
    pipeline.run("git", "add", "-A", "..")
    pipeline.run("git", "commit", "-qm", "A pipeline")
    output = pipeline.run("dvc", "repro", "--all-pipelines")
    assert "warning" not in output, output
    pipeline.write("dvc.yaml", text.format(run=run, gone=""))
    pipeline.run("dvc", "freeze", "steady")
    return pipeline


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The pipeline recorded by `dvc-mlflow sync` alone."""
    pipeline = make(tmp_path_factory.mktemp("synced"), "")
    pipeline.run("dvc-mlflow", "sync")
    return pipeline


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The pipeline with the prefix `dvc-mlflow run` before commands."""
    return make(tmp_path_factory.mktemp("live"), "dvc-mlflow run ")


@pytest.fixture(scope="module")
def runs(synced: Pipeline) -> dict[str, Run]:
    return synced.named()


def test_each_execution_has_one_finished_run(runs: dict[str, Run]) -> None:
    assert {*runs} == STAGES
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_audit_agrees_and_a_second_sync_adds_nothing(synced: Pipeline, runs: dict[str, Run]) -> None:
    assert "agree" in synced.run("dvc-mlflow", "audit", "--all")
    assert "recorded as run" not in synced.run("dvc-mlflow", "sync")
    assert {run.info.run_id for run in synced.runs()} == {run.info.run_id for run in runs.values()}


def test_params_of_all_kinds_of_files(runs: dict[str, Run]) -> None:
    assert runs["train"].data.params == {
        "train.rate": "0.5",
        "train.layers": "[8, 4]",
        "conf.json:a.b": "1",
        "conf.json:list": '[1, {"c": 4, "d": 3}]',
        "conf.toml:deep.name": "t",
        "conf.toml:deep.er.x": "2.5",
        "conf.py:RATE": "0.25",
        "conf.py:Net.width": "16",
        "whole.yaml:p": "1",
        "whole.yaml:q.r": "two",
    }
    assert runs["evaluate"].data.params == runs["train"].data.params
    assert runs["sub/dvc.yaml:train"].data.params == {"sub/work/params.yaml:rate": "3"}
    assert runs["silent"].data.params == {"silent": "true"}


def test_metrics_of_a_directory_and_strings(runs: dict[str, Run]) -> None:
    train = runs["train"].data
    assert train.metrics["loss"] == 1 / 3 and train.metrics["loss.final"] == 0.125  # differs from the last value
    assert train.metrics["best.epoch"] == 3 and "accuracy.final" not in train.metrics
    assert train.tags["best.done"] == "true" and train.tags["optimizer"] == "sgd"
    evaluate = runs["evaluate"].data.metrics
    assert evaluate["accuracy"] == 0.75 and evaluate["classes.a b.f1"] == 0.5 and math.isnan(evaluate["worst"])


@pytest.mark.parametrize(
    ("stage", "score"),
    [("seeds@2", 2), ("sizes@big", 9), ("pairs@1", 4), ("grid@0.2-p", 0.2), ("sub/dvc.yaml:train", 7)],
)
def test_each_stage_of_a_family_has_its_own_metrics(runs: dict[str, Run], stage: str, score: float) -> None:
    assert runs[stage].data.metrics["score"] == score


def test_curves_have_all_steps(synced: Pipeline, runs: dict[str, Run]) -> None:
    assert synced.curve(runs["train"], "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert synced.curve(runs["sub/dvc.yaml:train"], "value") == [(0, 1.5), (10, 0.5)]


def test_small_files_are_artifacts(synced: Pipeline, runs: dict[str, Run]) -> None:
    assert {*synced.artifacts(runs["train"])} == {f"results/{n}" for n in ("history.csv", "metrics.json", "note.txt")}
    assert synced.artifacts(runs["steady"]) == {"steady.txt": b"from outside\nextra\n"}


def test_a_directory_is_a_dataset_of_the_runs_that_make_and_read_it(synced: Pipeline, runs: dict[str, Run]) -> None:
    names = {
        stage: [entry.dataset.name for entry in (run.inputs.dataset_inputs if run.inputs else [])]
        for stage, run in runs.items()
    }
    assert {stage for stage, found in names.items() if found == ["parts"]} == {"prepare", "train"}


def test_a_run_that_reads_a_model_is_a_child_whose_metrics_are_on_the_parent(runs: dict[str, Run]) -> None:
    assert runs["evaluate"].data.tags["mlflow.parentRunId"] == runs["train"].info.run_id
    assert runs["train"].data.metrics["evaluate.accuracy"] == 0.75
    assert [stage for stage, run in runs.items() if "mlflow.parentRunId" in run.data.tags] == ["evaluate"]


def test_runs_name_the_commit_and_its_author(synced: Pipeline, runs: dict[str, Run]) -> None:
    head = synced.run("git", "rev-parse", "HEAD").strip()
    assert {run.data.tags["mlflow.source.git.commit"] for run in runs.values()} == {head}
    assert {run.data.tags["git.author"] for run in runs.values()} == {"Ada <ada@example.org>"}


def test_live_and_synced_records_are_alike(synced: Pipeline, runs: dict[str, Run], live: Pipeline) -> None:
    own = live.named()
    assert {*own} >= LIVE and {run.info.status for run in own.values()} == {"FINISHED"}
    for stage in LIVE:
        one, other = own[stage], runs[stage]
        assert "restored" not in one.data.tags
        assert one.data.params == other.data.params
        assert str(sorted(one.data.metrics.items())) == str(sorted(other.data.metrics.items()))  # NaN equals NaN here
        for name in {*one.data.metrics} - {"worst"}:
            assert live.curve(one, name) == synced.curve(other, name)
        assert live.artifacts(one) == synced.artifacts(other)
    assert own["evaluate"].data.tags["mlflow.parentRunId"] == own["train"].info.run_id


def test_sync_completes_what_ran_without_the_launcher(live: Pipeline) -> None:
    live.run("dvc-mlflow", "sync")
    assert {*live.named()} == STAGES
    assert "agree" in live.run("dvc-mlflow", "audit", "--all")


@pytest.fixture(scope="module")
def planted(synced: Pipeline, runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `dvc-mlflow audit --all` prints in a copy with one planted fault of each kind."""
    folder = tmp_path_factory.mktemp("planted")
    pipeline = Pipeline(folder / "repository" / "project")
    shutil.copytree(synced.folder.parent, pipeline.folder.parent, symlinks=True)
    old, new = (p.folder / "mlartifacts" for p in (synced, pipeline))
    move_artifacts(pipeline.folder / "mlflow.db", old.as_uri(), new.as_uri())
    client = pipeline.client

    def run_id(stage: str) -> str:
        return runs[stage].info.run_id

    client.log_metric(run_id("seeds@1"), "score", 99.0)
    client.log_metric(run_id("seeds@2"), "invented", 1.0)
    client.log_metric(run_id("train"), "loss", 77.0, step=2)
    client.log_metric(run_id("sub/dvc.yaml:train"), "value", 8.0, step=20)
    client.log_param(run_id("silent"), "invented", "1")
    client.set_tag(run_id("grid@0.1-p"), "dvc.outs.grid-0.1-p.json", "0" * 32)
    client.set_tag(run_id("grid@0.1-q"), "dvc.cmd", "another")
    client.delete_run(run_id("grid@0.2-q"))
    client.delete_tag(run_id("evaluate"), "mlflow.parentRunId")
    (new / run_id("steady") / "artifacts/steady.txt").write_text("other")
    (new / run_id("always") / "artifacts/always.txt").unlink()
    (new / run_id("pairs@0") / "artifacts/execution.json").write_text("{}")
    with sqlite3.connect(pipeline.folder / "mlflow.db") as connection:
        change = "UPDATE params SET value = '0.9' WHERE key = 'train.rate' AND run_uuid = ?"
        connection.execute(change, [run_id("train")])
        connection.execute("DELETE FROM inputs WHERE destination_id = ?", [run_id("prepare")])
        change = "UPDATE logged_model_tags SET tag_value = ? WHERE tag_key = 'dvc.outs.model.bin'"
        connection.execute(change, ["0" * 32])
    pipeline.write("pair-v.json", "{}\n")
    cached = json.loads(json.dumps(digests(pipeline)))["size-big.json"]
    objects = pipeline.folder / ".dvc/cache/files/md5" / cached[:2] / cached[2:]
    objects.chmod(0o644)
    objects.write_text("other")
    pipeline.write("whole.yaml", "p: 2\nq: {r: two}\n")
    return pipeline.run("dvc-mlflow", "audit", "--all", code=1)


def digests(pipeline: Pipeline) -> dict[str, Any]:
    """The MD5 of each out in dvc.lock."""
    from dvc.utils.serialize import load_yaml

    lock = load_yaml(pipeline.folder / "dvc.lock")["stages"].values()
    return {out["path"]: out["md5"] for stage in lock for out in stage.get("outs", [])}


@pytest.mark.parametrize(
    "line",
    [
        "^seeds@1: run .*metrics score: MLflow has 99.0; expected 1",
        "^seeds@2: run .*metrics invented: MLflow has 1.0; expected nothing",
        "^train: run .*curve loss at step 2: MLflow has 77.0; expected 0.5",
        "^sub/dvc.yaml:train: run .*curve value at step 20: MLflow has 8.0; expected nothing",
        "^silent: run .*params invented: MLflow has",
        '^train: run .*params train.rate: MLflow has "0.9"; expected "0.5"',
        '^grid@0.1-p: run .*tags dvc.outs.grid-0.1-p.json: MLflow has "0000',
        '^grid@0.1-q: run .*tags dvc.cmd: MLflow has "another"',
        "^grid@0.2-q: MLflow has no finished run",
        "^evaluate: .*(parent|no finished run)",
        '^steady: run .*artifacts steady.txt: MLflow has "other bytes"',
        "^always: run .*artifacts always.txt: MLflow does not have it",
        "^pairs@0: run .*execution.json",
        "^prepare: run .*datasets parts: MLflow does not have it",
        "^train: run .*model model.bin: MLflow has",
        "^pair-v.json: dvc.lock .pairs@1. has MD5",
        "^size-big.json: (dvc.lock .* has MD5|DVC's copy is damaged)",
        "^p: whole.yaml has 2, dvc.lock 1",
    ],
)
def test_audit_finds_a_planted_difference(planted: str, line: str) -> None:
    assert re.search(line, planted, re.MULTILINE), planted


def test_a_stage_that_never_ran_is_named(synced: Pipeline, runs: dict[str, Run]) -> None:
    text = (synced.folder / "dvc.yaml").read_text()
    synced.write("dvc.yaml", text.replace("stages:\n", "stages:\n  later:\n    cmd: echo > later.txt\n", 1))
    try:
        assert "later: not run yet" in synced.run("dvc-mlflow", "sync")
        assert "later: dvc.yaml has it, dvc.lock does not" in synced.run("dvc-mlflow", "audit", code=1)
    finally:
        synced.write("dvc.yaml", text)
    assert {*synced.named()} == STAGES
