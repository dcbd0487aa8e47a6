"""The process that writes a stage's MLflow run, started by stages/tracking.py.

Reads events, one JSON object a line, from standard input. Where they end without an `end`, the stage was killed, and
so the run is. Where the store fails, prints the reason in one line on standard output and exits with 1.
"""

import contextlib
import csv
import importlib.metadata
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.pop("MLFLOW_RUN_ID", None)  # it would override the run that is meant

import mlflow
import mlflow.pyfunc
import numpy as np
from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from stages.pipeline import Pipeline, flatten

EXPERIMENT = "fashion-mnist-lenet"
CODE = Path(__file__).parent

# The stage whose run is the parent of a stage's run: the one that made the same bytes of what both name.
PARENT = {"evaluate": "train"}
DATASET_CONTEXT = {"fetch": "source", "train": "training", "evaluate": "evaluation"}
HEADLINE = ("test_accuracy", "test_loss", "test_macro_f1")  # evaluate's metrics that its train run shows as well
SERVING_PACKAGES = ("mlflow", "numpy", "safetensors", "torch")


class Store:
    """The MLflow store: as MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say, else mlflow.db in the project."""

    def __init__(self, root: Path) -> None:
        embedded = "MLFLOW_TRACKING_URI" not in os.environ
        lock: contextlib.AbstractContextManager = contextlib.nullcontext()
        artifacts = None
        if embedded:
            mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
            artifacts = (root / "mlartifacts").as_uri()
            # Processes that create the same SQLite store at the same time break each other's migrations.
            lock = FileLock(root / "mlflow.db.lock")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        with lock:
            self.client = mlflow.MlflowClient()
            self.experiment_id = self._find_experiment(name) or self._create_experiment(name, artifacts)
        mlflow.set_experiment(experiment_id=self.experiment_id)

    def _find_experiment(self, name: str) -> str | None:
        experiment = self.client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else None

    def _create_experiment(self, name: str, artifacts: str | None) -> str:
        try:
            return self.client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:
            if existing := self._find_experiment(name):  # on a server, another process was first
                return existing
            raise

    def newest_run(self, tags: Mapping[str, str]) -> Run | None:
        """The newest run that has all of these tags."""
        conditions = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        runs = self.client.search_runs([self.experiment_id], conditions, max_results=1)
        return runs[0] if runs else None


class Recorder:
    """Writes the run of the stage that is at work in `folder`, from its start to its end."""

    def __init__(self, stage: str, folder: Path, params: Mapping[str, Any], start_time: int) -> None:
        """`params` by section; `start_time` in milliseconds since 1970."""
        self.stage = stage
        self.pipeline = Pipeline(folder)
        self.record = self.pipeline.record(stage, params)
        # In `dvc exp run --temp` and --queue the folder is a clone that is deleted; DVC_ROOT is the real project.
        self.store = Store(Path(os.environ.get("DVC_ROOT", folder)))
        self.client = self.store.client
        self.parent = self._find_parent()
        name = os.environ.get("DVC_EXP_NAME") or self.record.fingerprint[:8]
        run = self.client.create_run(self.store.experiment_id, start_time, self._tags(), f"{stage} {name}")
        self.run_id = run.info.run_id
        values = flatten({**self.record.upstream_params, **self.record.params})
        params_logged = [
            Param(key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items()
        ]
        self.client.log_batch(self.run_id, params=params_logged)
        self._log_datasets(self.record.deps)

    def tag(self, key: str, value: str) -> None:
        self.client.set_tag(self.run_id, key, value)

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._log_metrics(self.run_id, metrics, step=step)

    def end(self, status: str) -> None:
        """Close the run; if the stage FINISHED, first add what its outs say."""
        try:
            if status == "FINISHED":
                outs = self.pipeline.hash(self.pipeline.outs(self.stage))
                self.client.log_batch(self.run_id, tags=[RunTag(f"dvc.outs.{path}", md5) for path, md5 in outs.items()])
                if self.stage == "fetch":
                    self._log_datasets(outs)
                if self.model_path in outs:
                    self._log_model(outs[self.model_path])
                for path in outs:
                    if path.endswith((".json", ".csv")):
                        self.client.log_artifact(self.run_id, str(self.pipeline.folder / path))
                if self.stage == "evaluate":
                    self._log_evaluation()
        except BaseException:
            self.client.set_terminated(self.run_id, "FAILED")
            raise
        self.client.set_terminated(self.run_id, status)

    @property
    def model_path(self) -> str:
        return next(path for path in self.pipeline.outs("train") if path.endswith(".safetensors"))

    def _find_parent(self) -> Run | None:
        """The run of the stage in PARENT that made exactly the bytes that this stage reads."""
        if self.stage not in PARENT:
            return None
        shared = set(self.pipeline.outs(PARENT[self.stage])) & set(self.record.deps)
        tags = {f"dvc.outs.{path}": self.record.deps[path] for path in shared}
        return self.store.newest_run({"stage": PARENT[self.stage], **tags})

    def _tags(self) -> dict[str, str]:
        tags = {"stage": self.stage, "dvc.cmd": self.record.cmd, "dvc.fingerprint": self.record.fingerprint}
        tags |= {f"dvc.deps.{path}": md5 for path, md5 in self.record.deps.items()}
        for variable in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
            if value := os.environ.get(variable):
                tags[variable.lower().replace("_", ".", 1)] = value
        tags |= git_tags(self.pipeline)
        tags |= {f"version.{package}": importlib.metadata.version(package) for package in (*SERVING_PACKAGES, "dvc")}
        tags["version.python"] = platform.python_version()
        tags |= {"mlflow.source.type": "LOCAL", "mlflow.source.name": self.record.cmd}
        if self.parent:
            tags["mlflow.parentRunId"] = self.parent.info.run_id
        return tags

    def _log_datasets(self, md5s: Mapping[str, str]) -> None:
        """Log those of the files that are data sets as the run's inputs; the digest is the MD5 that DVC knows."""
        inputs = []
        for path in set(md5s) & set(self.pipeline.outs("fetch")):
            source = json.dumps({"uri": path})
            dataset = Dataset(name=path, digest=md5s[path], source_type="local", source=source)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", DATASET_CONTEXT[self.stage])]))
        if inputs:
            self.client.log_inputs(self.run_id, inputs)

    def _log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0, **links: Any) -> None:
        now = int(time.time() * 1000)
        entities = [Metric(key, value, now, step, **links) for key, value in metrics.items()]
        self.client.log_batch(run_id, metrics=entities)

    def _log_model(self, md5: str) -> None:
        """Log the weights as a model that MLflow can load and serve, made from code: no pickle."""
        mlflow.start_run(run_id=self.run_id)  # log_model writes to the active run
        mlflow.pyfunc.log_model(
            name="lenet",
            python_model=str(CODE / "serving.py"),
            artifacts={"weights": str(self.pipeline.folder / self.model_path)},
            code_paths=[str(CODE)],
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, 28, 28))]),
                outputs=Schema([TensorSpec(np.dtype("float32"), (-1, 10))]),
            ),
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in SERVING_PACKAGES],
            tags={f"dvc.outs.{self.model_path}": md5},
        )

    def _log_evaluation(self) -> None:
        """Log evaluate's metrics, on the model and data set they belong to, and the headline on the train run."""
        scores, per_class = (
            next(self.pipeline.folder / path for path in self.pipeline.outs("evaluate") if path.endswith(name))
            for name in ("evaluate.json", "per_class.csv")
        )
        metrics = json.loads(scores.read_text())
        with per_class.open(newline="") as file:
            for row in csv.DictReader(file):
                name = row.pop("class")
                metrics |= {f"{key}.{name}": float(value) for key, value in row.items()}
        (dataset,) = set(self.record.deps) & set(self.pipeline.outs("fetch"))
        links: dict[str, Any] = {"dataset_name": dataset, "dataset_digest": self.record.deps[dataset]}
        if self.parent:
            if self.parent.outputs and self.parent.outputs.model_outputs:
                links["model_id"] = self.parent.outputs.model_outputs[-1].model_id
            self._log_metrics(self.parent.info.run_id, {key: metrics[key] for key in HEADLINE})
        self._log_metrics(self.run_id, metrics, **links)


def git_tags(pipeline: Pipeline) -> dict[str, str]:
    """The commit, and whether the tree differs from it in a file that DVC does not write."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(pipeline.folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    written_by_dvc = ["dvc.lock", *(out for stage in pipeline.stages for out in pipeline.outs(stage))]
    try:
        commit = git("rev-parse", "HEAD")
        status = git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in written_by_dvc))
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return {}
    return {"mlflow.source.git.commit": commit, "git.dirty": "true" if status else "false"}


def record(events: Iterable[str]) -> None:
    """Do what the events say, up to the end of the run."""
    events = iter(events)
    start = json.loads(next(events))
    recorder = Recorder(start["stage"], Path(start["folder"]), start["params"], start["time"])
    for line in events:
        match json.loads(line):
            case {"event": "tag", "key": key, "value": value}:
                recorder.tag(key, value)
            case {"event": "metrics", "metrics": metrics, "step": step}:
                recorder.metrics(metrics, step)
            case {"event": "end", "status": status}:
                recorder.end(status)
                return
    recorder.end("KILLED")


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when the stage does
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.showwarning = lambda *_, **__: None  # a stage's output is about the stage; MLflow resets filters
    try:
        record(sys.stdin)
    except Exception as error:  # whatever it is, the stage should tell it in one line
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"MLflow cannot use {mlflow.get_tracking_uri()}: {reason}; see MLFLOW_TRACKING_URI")
        sys.exit(1)


if __name__ == "__main__":
    main()
