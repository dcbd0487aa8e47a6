"""The MLflow store: a view of what DVC knows. All of a run can be made again from dvc.lock and the outs."""

import contextlib
import csv
import gc
import importlib.metadata
import json
import logging
import os
import platform
import posixpath
import re
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before MLflow is imported. A store that does not answer is given up after some 8 s: `make sync` makes up for it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # whatever the environment says
os.environ.pop("MLFLOW_RUN_ID", None)  # it would override the run that is meant

# What is imported stays. To look through it for garbage, again and again and once more at exit, would take a second.
gc.disable()
import mlflow
import mlflow.pyfunc
import mlflow.store.tracking.sqlalchemy_store  # MLflow would import it later, when a stage waits for it
import numpy as np
import psutil
from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from ruamel.yaml import YAML, YAMLError
from safetensors import safe_open

from stages.params import read_values
from stages.pipeline import Pipeline, Record, flatten, md5
from stages.stage import StageError, hide_credentials, shorten

gc.enable()
gc.freeze()

EXPERIMENT = "fashion-mnist-lenet"
DESCRIPTION = "LeNet on Fashion-MNIST. Compare the `train` runs; `evaluate` runs are their children."
CODE = Path(__file__).parent
DATASET_CONTEXT = {"fetch": "source", "train": "training", "evaluate": "evaluation"}
WHAT = {
    "fetch": "The data, verified byte for byte.",
    "train": "A training of LeNet, with the test metrics of the model that it made: the run to compare.",
    "evaluate": "An evaluation, on every test image, of the model of the run above it.",
}
MODEL = "Images uint8 (N, 28, 28), white on black, to the class of each and the probability of every class."
# evaluate's metrics that its train run shows as well
HEADLINE = ("test_accuracy", "test_loss", "test_macro_f1", "test_ece")
# Where MLflow's database has artifact locations: table and column
ARTIFACT_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
PATCH = "code.patch"  # the artifact of a run of a dirty tree
SERVING_PACKAGES = ("mlflow", "numpy", "safetensors", "torch")


class Store:
    """The store that MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME name, else mlflow.db in the project.

    `folder` is where the stage works. In `dvc exp run --temp` and --queue it is a clone that DVC deletes; DVC_ROOT
    names the real project.
    """

    def __init__(self, folder: Path) -> None:
        root = Path(os.environ.get("DVC_ROOT", folder)).resolve()
        self.pipeline = Pipeline(folder)
        embedded = "MLFLOW_TRACKING_URI" not in os.environ
        if embedded:
            mlflow.set_tracking_uri(sqlite_address(root / "mlflow.db"))
        # A server knows where its artifacts go. A database would put them into the current folder, which may be
        # deleted.
        served = mlflow.get_tracking_uri().startswith("http")
        artifacts = (root / "mlartifacts").as_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        # Processes that create an SQLite store at the same time break each other's migrations, and two stages that
        # find the same record missing would both make it. Several projects may share a database.
        named = re.match("sqlite:///(?!file:)([^?]+)", mlflow.get_tracking_uri())
        database = root / "mlflow.db" if embedded else root / named[1] if named else None
        if named and not Path(named[1]).is_absolute():  # the current folder may be deleted as well
            mlflow.set_tracking_uri(f"sqlite:///{database}{named.string[named.end() :]}")
        lock = Path(f"{database}.lock") if database else root / ".dvc" / "tmp" / "mlflow.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(lock, timeout=60)
        with self.lock:
            if database and not database.exists():
                create_database(database)
            self.client = mlflow.MlflowClient()
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                self.experiment_id = self._create_experiment(name, None if served else artifacts)
            else:
                self.experiment_id = experiment.experiment_id
                if embedded and re.fullmatch("file://.*/mlartifacts", experiment.artifact_location):
                    move_artifacts(root / "mlflow.db", experiment.artifact_location, artifacts)
        mlflow.set_experiment(experiment_id=self.experiment_id)

    def _create_experiment(self, name: str, artifacts: str | None) -> str:
        try:
            return self.client.create_experiment(
                name, artifact_location=artifacts, tags={"mlflow.note.content": DESCRIPTION}
            )
        except MlflowException:
            experiment = self.client.get_experiment_by_name(name)  # a process on another host was first
            if experiment is None:
                raise
            return experiment.experiment_id

    # Finding runs

    def search(self, tags: Mapping[str, str], status: str) -> list[Run]:
        """All runs that have these tags and this status, the newest first."""
        conditions = [f"attributes.status = '{status}'", *(f"tags.`{key}` = '{value}'" for key, value in tags.items())]
        page = self.client.search_runs([self.experiment_id], " and ".join(conditions))
        runs = list(page)
        while page.token:
            page = self.client.search_runs([self.experiment_id], " and ".join(conditions), page_token=page.token)
            runs += page
        return runs

    def users(self, md5: str) -> dict[str, list[Run]]:
        """The finished runs that made a file with this MD5 ("outs") and those that read one ("deps")."""
        pipeline = self.pipeline
        runs = {}
        for kind, paths in (("outs", pipeline.outs), ("deps", pipeline.deps)):
            every = {path for stage in pipeline.stages for path in paths(stage)}
            found = [self.search({f"dvc.{kind}.{path}": md5}, "FINISHED") for path in sorted(every)]
            runs[kind] = sorted(chain(*found), key=lambda run: run.info.start_time)
        return runs

    def find(self, record: Record) -> Run | None:
        """The newest finished run of this very execution: same command, deps, params and outs."""
        runs = self.search(_identity(record) | _hash_tags("outs", record.outs), "FINISHED")
        if parent := self.parent(record):  # before newer ones: the clock may have been wrong
            runs.sort(key=lambda run: run.data.tags.get("mlflow.parentRunId") != parent.info.run_id)
        return runs[0] if runs else None

    def unfinished(self, record: Record) -> Run | None:
        """The newest run of this very execution, here and with the same versions, that was cut off before its end."""
        tags = _identity(record) | _version_tags() | {"process.host": socket.gethostname()}
        runs = self.search(tags, "KILLED") + [run for run in self.search(tags, "RUNNING") if not _is_alive(run)]
        values = param_values(record)  # they may have been cut off, too; those of stages before this one may differ
        runs = [run for run in runs if run.data.params.items() <= values.items()]
        return max(runs, key=lambda run: run.info.start_time, default=None)

    # Writing runs

    def begin(self, record: Record, parent: Run | None, start_time: int, pid: int | None) -> str:
        """Create the run of an execution, or go on with an unfinished one; return the run's id.

        It has all that is known at the start. `start_time` in milliseconds since 1970; `pid` is the process of the
        stage, None where there is none.
        """
        tags = _identity(record) | {"dvc.cmd": record.cmd} | _hash_tags("deps", record.deps) | _version_tags()
        tags |= {
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": f"dvc.yaml:{record.stage}",
            "mlflow.user": psutil.Process().username(),
        }
        for variable in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
            if value := os.environ.get(variable):
                tags[variable.lower().replace("_", ".", 1)] = value
        if parent:
            tags["mlflow.parentRunId"] = parent.info.run_id
        if pid:
            tags |= _process_tags(pid)
        # What is restored may be of another tree than the one that is there.
        commit, patch = git_state(self.pipeline) if pid or self._is_of_this_tree(record) else ("", b"")
        if commit:
            tags |= {"mlflow.source.git.commit": commit, "git.dirty": "true" if patch else "false"}
        changes = changed_params(self.pipeline, record)
        tags["mlflow.note.content"] = note(record, changes)
        experiment = os.environ.get("DVC_EXP_NAME")
        what = [*([experiment] if experiment else []), *changes[:3], *(["…"] if len(changes) > 3 else [])]
        name = shorten(" ".join([record.stage, *(what or [record.fingerprint[:8]])]), 250)  # as MLflow's tables have it
        with self.lock:
            if unfinished := self.unfinished(record):
                run_id = unfinished.info.run_id
                self.client.update_run(run_id, "RUNNING", name)
                self.client.log_batch(run_id, tags=[RunTag(*tag) for tag in {**tags, "resumed": "true"}.items()])
            else:
                run_id = self.client.create_run(self.experiment_id, start_time, tags, name).info.run_id
        self._log_inputs(run_id, record)
        if patch:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / PATCH).write_bytes(patch)
                self.client.log_artifact(run_id, f"{folder}/{PATCH}")
        return run_id

    def _is_of_this_tree(self, record: Record) -> bool:
        """Whether the stage, and those before it, would run now as they ran: same command, deps and params."""
        stages = {record.stage, *self.pipeline.upstream(record.stage)}
        records = [self.pipeline.locked(stage) for stage in stages]
        return all(locked and self._would_skip(locked) for locked in records)

    def _would_skip(self, record: Record) -> bool:
        params = read_values(self.pipeline.folder / "params.yaml")
        return self.pipeline.starting(record.stage, params).fingerprint == record.fingerprint

    def _log_inputs(self, run_id: str, record: Record) -> None:
        """Log params and data sets; what the run has already stays as it is."""
        self.client.log_batch(run_id, params=[Param(key, value) for key, value in param_values(record).items()])
        self._log_datasets(run_id, record)

    def steps(self, run_id: str) -> set[int]:
        """The epochs whose metrics the run has."""
        return {point.step for point in self.client.get_metric_history(run_id, "train_loss")}

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0, **links: Any) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(run_id, [Metric(key, value, now, step, **links) for key, value in metrics.items()])

    def complete(self, run_id: str, record: Record) -> None:
        """Add what the outs say; what the run has already is not logged again."""
        folder, outs = self.pipeline.folder, record.outs
        if record.stage == "fetch":
            self._log_datasets(run_id, record)
        for path in outs:
            if artifact := artifact_path(path):
                self.client.log_artifact(run_id, str(folder / path), artifact.rpartition("/")[0] or None)
        if record.stage == "train":
            self._log_curves(run_id, folder / one(outs, "history.csv"))
            self._log_model(run_id, one(outs, ".safetensors"), outs)
        if record.stage == "evaluate":
            self._log_evaluation(run_id, record)
        # With FINISHED, these tags make the run the record of these outs: last, when all of it is there.
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _hash_tags("outs", outs).items()])

    def close(self, run_id: str, status: str, pid: int) -> None:
        """End the run of the stage with this process; where a later process goes on with the run, leave it alone."""
        with self.lock:
            if self.client.get_run(run_id).data.tags["process.pid"] == str(pid):
                self._terminate(run_id, status)

    def _terminate(self, run_id: str, status: str) -> None:
        """End a run now or, where the clock was set back to before its start, at its start."""
        start_time = self.client.get_run(run_id).info.start_time
        self.client.set_terminated(run_id, status, max(start_time, int(time.time() * 1000)))

    def datasets(self, record: Record) -> dict[str, str]:
        """The data sets that the stage reads, or makes, by name; the digest is the MD5 that DVC knows."""
        return {_dataset_name(path): digest for path, digest in self._dataset_files(record).items()}

    def _dataset_files(self, record: Record) -> dict[str, str]:
        md5s = {**record.deps, **record.outs}
        return {path: md5s[path] for path in self.pipeline.outs("fetch") if path in md5s}

    def stages(self) -> list[str]:
        """The stages whose executions all have runs, in order; one that was added has some if it makes them."""
        return [stage for stage in self.pipeline.in_order() if stage in WHAT]

    def _log_datasets(self, run_id: str, record: Record) -> None:
        context = [InputTag("mlflow.data.context", DATASET_CONTEXT.get(record.stage, record.stage))]
        inputs = [
            DatasetInput(Dataset(_dataset_name(path), digest, "local", json.dumps({"uri": path})), context)
            for path, digest in self._dataset_files(record).items()
        ]
        if inputs:
            self.client.log_inputs(run_id, inputs)

    def _log_curves(self, run_id: str, history: Path) -> None:
        with history.open(newline="") as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        logged = self.steps(run_id)
        for row in rows:
            step = int(row.pop("epoch"))
            if step not in logged:
                self.log_metrics(run_id, row, step)

    def _log_model(self, run_id: str, path: str, outs: Mapping[str, str]) -> None:
        """Log the weights as a model that MLflow can load and serve, made from code: no pickle."""
        model_id = self.model_id(self.client.get_run(run_id))
        if model_id and self.client.get_logged_model(model_id).status == LoggedModelStatus.READY:
            return  # one that was cut off in the middle is not ready
        for model in self.client.search_logged_models([self.experiment_id], f"source_run_id = '{run_id}'"):
            if model.model_id != model_id:  # it was cut off before the run knew of it
                self.client.delete_logged_model(model.model_id)
        with safe_open(self.pipeline.folder / path, framework="numpy") as weights:
            classes = json.loads(weights.metadata()["lenet"])["classes"]
        example = np.zeros((1, 28, 28), np.uint8)
        example[0, 6:24, 8:20] = 200  # something like a dress
        # MLflow takes no link that leads out of its folder; with cache.type symlink, the file is one into DVC's cache.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copy(self.pipeline.folder / path, folder))
            # mlflow.pyfunc.log_model would do, but for an active run: MLflow calls it FINISHED whenever Python exits.
            Model.log(
                artifact_path=None,
                flavor=SimpleNamespace(save_model=_save_model),
                run_id=None if model_id else run_id,  # a run cannot have the same model twice
                model_id=model_id,
                name=f"lenet-{outs[path][:8]}",
                python_model=str(CODE / "serving.py"),
                artifacts={"weights": copy.as_uri()},  # MLflow unquotes a path
                code_paths=[str(CODE)],
                signature=ModelSignature(
                    inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, 28, 28))]),
                    outputs=Schema([ColSpec("string", "class"), *(ColSpec("float", name) for name in classes)]),
                ),
                input_example=example,
                validate_serving_input=False,
                pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in SERVING_PACKAGES],
                tags={
                    **_hash_tags("outs", {path: outs[path]}),
                    "mlflow.source.name": "dvc.yaml:train",
                    "mlflow.note.content": MODEL,
                },
            )

    def evaluation(self, record: Record) -> dict[str, float]:
        """What evaluate's files say: its metrics, and those of each class as, for example, `f1.Bag`."""
        folder = self.pipeline.folder
        metrics = json.loads((folder / one(record.outs, "evaluate.json")).read_text(encoding="utf-8"))
        with (folder / one(record.outs, "per_class.csv")).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        per_class = {_metric_name(row.pop("class"), label): row for label, row in enumerate(rows)}
        return metrics | {
            f"{key}.{name}": float(value) for name, row in per_class.items() for key, value in row.items()
        }

    def _log_evaluation(self, run_id: str, record: Record) -> None:
        """Log evaluate's metrics, on the model and data set they belong to, and the headline on the train run."""
        metrics = self.evaluation(record)
        ((dataset, digest),) = self.datasets(record).items()
        links: dict[str, Any] = {"dataset_name": dataset, "dataset_digest": digest}
        if parent_id := self.client.get_run(run_id).data.tags.get("mlflow.parentRunId"):
            if model_id := self.model_id(self.client.get_run(parent_id)):
                links["model_id"] = model_id
            self.log_metrics(parent_id, {key: metrics[key] for key in HEADLINE})
        self.log_metrics(run_id, metrics, **links)

    # Reading runs

    def artifact_md5(self, run: Run, name: str) -> str:
        """MD5 of a run's artifact; "" where it has none of this name."""
        if name not in [
            file.path for file in self.client.list_artifacts(run.info.run_id, name.rpartition("/")[0] or None)
        ]:
            return ""
        with tempfile.TemporaryDirectory() as folder:
            return md5(Path(self.client.download_artifacts(run.info.run_id, name, folder)))

    def model_md5(self, run: Run) -> str:
        """MD5 of the weights in a run's model; "" where it has no model."""
        model_id = self.model_id(run)
        if not model_id:
            return ""
        with tempfile.TemporaryDirectory() as folder:
            mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=folder)
            return md5(next(Path(folder).rglob("*.safetensors")))

    def model_id(self, run: Run) -> str | None:
        return run.outputs.model_outputs[-1].model_id if run.outputs and run.outputs.model_outputs else None

    # Making the store agree with dvc.lock

    def parent(self, record: Record) -> Run | None:
        """The run to put this one below: that of the train stage which made the model that evaluate reads."""
        train = self.pipeline.locked("train")
        if record.stage != "evaluate" or not train or not train.outs.items() & record.deps.items():
            return None
        return self.find(train)

    def restore(self, stage: str) -> str | None:
        """Make the run of the execution that dvc.lock records, if it is missing; return its id.

        A run that was cut off is completed. Nothing is made of outs that are not as dvc.lock says.
        """
        record = self.pipeline.locked(stage)
        if record is None or self.pipeline.missing_outs(stage):
            return None
        with self.lock:
            parent = self.parent(record)
            run = self.find(record)
            if run and (parent is None or run.data.tags.get("mlflow.parentRunId") == parent.info.run_id):
                return None
            if unfinished := self.unfinished(record):
                run_id = unfinished.info.run_id
                self._log_inputs(run_id, record)  # it may have been cut off before
            else:
                run_id = self.begin(record, parent, int(time.time() * 1000), None)
            self.client.set_tag(run_id, "restored", "true")
            self.complete(run_id, record)
            self._terminate(run_id, "FINISHED")
            return run_id

    def restore_upstream(self, stage: str) -> None:
        for other in self.stages():
            if other in self.pipeline.upstream(stage):
                self.restore(other)

    def restore_evaluation(self) -> None:
        """Put the evaluation that there is below a train run that made the same model: DVC will not run it again."""
        evaluation = self.pipeline.locked("evaluate")
        if evaluation and self.parent(evaluation) and self._would_skip(evaluation):
            self.restore("evaluate")

    def dead(self) -> list[Run]:
        """The runs that are RUNNING for processes of this host that are gone."""
        running = self.search({"process.host": socket.gethostname()}, "RUNNING")
        return [run for run in running if not _is_alive(run)]

    def close_dead(self) -> list[str]:
        """Close the dead runs as KILLED; return their ids."""
        run_ids = [run.info.run_id for run in self.dead()]
        for run_id in run_ids:
            self._terminate(run_id, "KILLED")
        return run_ids


def quiet() -> None:
    """Keep the notes of MLflow and its libraries from standard error: a command's output is about the command."""
    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised as well
    warnings.showwarning = lambda *_, **__: None  # MLflow resets filters


def describe(error: BaseException) -> str:
    """One line on a failure of the store, with its first cause; without the credentials that an address may hold."""
    if isinstance(error, StageError):  # not the store's: dvc.yaml or dvc.lock is damaged
        return str(error)
    while cause := error.__cause__ or error.__context__:
        error = cause
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return hide_credentials(f"MLflow cannot use {mlflow.get_tracking_uri()} ({reason})")


def sqlite_address(path: Path) -> str:
    """The address of an SQLite database: in one, % begins an escape and ? ends the path."""
    escaped = str(path).replace("%", "%25").replace("?", "%3F")
    # Without the driver's name, MLflow would make a folder of the escaped name.
    return f"sqlite:///{path}" if escaped == str(path) else f"sqlite+pysqlite:///{escaped}"


def create_database(path: Path) -> None:
    """Create an SQLite database with MLflow's tables, whole or not at all: MLflow opens none that was cut off."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    mlflow.MlflowClient(sqlite_address(temporary)).search_experiments()
    temporary.replace(path)


def move_artifacts(database: Path, former: str, current: str) -> None:
    """Lead the artifact locations of a project that was moved or copied, which MLflow keeps whole, to where it is now.

    `former` and `current` are the URIs of the folder mlartifacts; what lies elsewhere stays as it is.
    """
    if former == current:
        return
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:  # all of it or nothing
        for table, column in ARTIFACT_LOCATIONS:
            connection.execute(
                f"UPDATE {table} SET {column} = :current || substr({column}, length(:former) + 1) "
                f"WHERE substr({column} || '/', 1, length(:former) + 1) = :former || '/'",
                {"former": former, "current": current},
            )


def git_state(pipeline: Pipeline) -> tuple[str, bytes]:
    """The commit, and the patch from it to the files as they are; both empty without git.

    Files that DVC writes do not count. Of files that git does not know, those count that the pipeline reads.
    """

    def git(*arguments: str, accept: int = 0) -> bytes:
        command = ["git", "-C", str(pipeline.folder), *arguments]
        result = subprocess.run(command, capture_output=True)
        if result.returncode not in (0, accept):
            raise subprocess.CalledProcessError(result.returncode, command)
        return result.stdout

    written = ["dvc.lock", *(out for stage in pipeline.stages for out in pipeline.outs(stage))]
    read = ["params.yaml", "dvc.yaml", "stages"]
    # One that `git apply` takes, whatever the user's configuration of git makes of a diff.
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
    diff = ("diff", "--binary", *plain)
    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        patch = git(*diff, "HEAD", "--", ".", *(f":(exclude){path}" for path in written))
        for path in git("ls-files", "--others", "--exclude-standard", "-z", "--", *read).split(b"\0")[:-1]:
            patch += git(*diff, "--no-index", "--", "/dev/null", os.fsdecode(path), accept=1)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return "", b""
    return commit, patch


def param_values(record: Record) -> dict[str, str]:
    """The params of the stage and of those before it, as MLflow shows them."""
    values = flatten({**record.upstream_params, **record.params})
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _identity(record: Record) -> dict[str, str]:
    return {"stage": record.stage, "dvc.fingerprint": record.fingerprint}


def _version_tags() -> dict[str, str]:
    versions = {f"version.{package}": importlib.metadata.version(package) for package in (*SERVING_PACKAGES, "dvc")}
    return versions | {"version.python": platform.python_version()}


def _hash_tags(kind: str, md5s: Mapping[str, str]) -> dict[str, str]:
    return {f"dvc.{kind}.{path}": md5 for path, md5 in md5s.items()}


def changed_params(pipeline: Pipeline, record: Record) -> list[str]:
    """The params that are not as they are in the last commit, as `key=value`; those of the stage without its name."""
    command = ["git", "-C", str(pipeline.folder), "show", "HEAD:./params.yaml"]
    try:
        committed = YAML(typ="safe").load(subprocess.run(command, capture_output=True, check=True).stdout)
        before = param_values(replace(record, params=committed, upstream_params={}))
    except (OSError, subprocess.CalledProcessError, YAMLError, AttributeError):  # no git, no commit, or no mapping
        return []
    values = param_values(record)
    changes = {key: value for key, value in values.items() if before.get(key) != value}
    return [f"{key.removeprefix(f'{record.stage}.')}={value}" for key, value in changes.items()]


def note(record: Record, changes: list[str]) -> str:
    """The description that the run's page shows, in Markdown."""
    params = f"Params: as committed{', but ' + ', '.join(changes) if changes else ''}."
    return "\n\n".join(
        [WHAT.get(record.stage, record.stage), params, "`python -m commands.lineage RUN_ID` brings its bytes back."]
    )


def artifact_path(path: str) -> str | None:
    """Where an out is among the artifacts of its run; None for data and weights, which are not."""
    name = Path(path).name
    if path.endswith(".png"):
        return f"plots/{name}"
    return name if path.endswith((".json", ".csv", ".parquet")) else None


def _metric_name(name: str, label: int) -> str:
    """The name of a class as part of a metric's; with `_` and its label where it has characters that MLflow refuses."""
    if re.fullmatch(r"[\w.:/ -]+", name) and posixpath.normpath(f"f1.{name}") == f"f1.{name}":
        return name
    return re.sub(r"[^\w.: -]", "_", f"{name} {label}")


def _save_model(validate_serving_input: bool, **arguments: Any) -> None:
    """Pyfunc's save_model. Model.log alone reads the flag: to serve the example here would import PyTorch, 2 s."""
    mlflow.pyfunc.save_model(**arguments)


def _dataset_name(path: str) -> str:
    return "/".join(Path(path).with_suffix("").parts[-2:])


def one(paths: Iterable[str], ending: str) -> str:
    """The path that ends so, of which there is one."""
    (path,) = (path for path in paths if path.endswith(ending))
    return path


def _process_tags(pid: int) -> dict[str, str]:
    created = ""
    with contextlib.suppress(psutil.NoSuchProcess):
        # Setting the clock must not make it another process. Linux has the start in time since boot, to which psutil
        # adds the time of the boot, which moves with the clock; macOS keeps the time of day that it was.
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:  # killed; its new parent may take its time, or for ever
            created = f"{process.create_time() - (psutil.boot_time() if psutil.LINUX else 0):.2f}"
    return {"process.host": socket.gethostname(), "process.pid": str(pid), "process.created": created}


def _is_alive(run: Run) -> bool:
    """Whether the stage's process may still be at work; one of another host always may."""
    tags = run.data.tags
    if tags.get("process.host") != socket.gethostname():
        return True
    current = _process_tags(int(tags["process.pid"]))
    return current["process.created"] != "" and current == {key: tags[key] for key in current}
