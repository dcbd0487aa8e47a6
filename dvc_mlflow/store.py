"""The MLflow store: runs that show executions. It decides who recorded one first, which a file lock could not."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import mlflow
import mlflow.pyfunc
import mlflow.store.tracking.sqlalchemy_store  # MLflow would import it later, when a stage waits for it
import psutil
from filelock import FileLock
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LifecycleStage,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema

from dvc_mlflow.execution import Content, Execution, MissingBytes, content_of, named_params, same, start_of
from dvc_mlflow.project import Git, Project, Unprovable, matches
from dvc_mlflow.text import UserError, one_line, valid_name, valid_value, without_credentials

# Where MLflow's database stores artifact locations: table and column
ARTIFACT_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
PATCH = "code.patch"  # the artifact of a run from a dirty tree
EXECUTION = "execution.json"  # the artifact with the execution itself
CLAIM = "dvc.execution"  # the tag that names the execution a run shows
MISTAKEN = "dvc.mistaken."  # and the hash of a dvc.lock entry that never ran: a tag of the run that did
PARTIAL = "dvc.partial"  # the tag of a run that may lack small outs, which could not be had when it was recorded
ABSENT = "dvc.absent."  # and the path of an image that could not be had when the run was recorded: sync adds it later
RESERVED = r"(dvc|mlflow|git|process|version|hardware)\.|(stage|restored|resumed|commit)$"  # tags that are set here
PARENT = "mlflow.parentRunId"
CLAIM_SECONDS = 30  # how long to wait for another run that claims an execution
HOST = socket.gethostname()


class Conflict(Exception):  # noqa: N818
    """A run has a point that this execution did not make: a step of an earlier attempt."""


class UnusableCode(Exception):  # noqa: N818
    """The code that serves a model cannot be loaded."""


class NoStore(UserError):  # noqa: N818
    """No address is given, and the project has no mlflow.db yet."""


class Store:
    """The store that `tracking_uri` names, else mlflow.db in the project."""

    def __init__(self, project: Project, create: bool = True) -> None:
        """Open it, and create what is missing. Raises UserError, MlflowException or another error of the store.

        Unless told to `create`, raises NoStore or UserError if there is no store, or if it has no such experiment.
        """
        self.project, root = project, project.root
        self.known: dict[str, list[Run]] | None = None  # all finished runs by execution, once `know_all` was called
        self._mistaken: set[str] = set()  # the tags of dvc.lock entries that never ran, once `know_all` was called
        self._contents: dict[str, Content] = {}  # of runs completed here
        self.problems: list[str] = []  # what could not be shown of the last execution that was recorded
        address, name = tracking_uri(project), os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment_name(project)
        embedded = not address
        uri = address or sqlite_address(root / "mlflow.db")
        mlflow.set_tracking_uri(uri)
        named = re.match("sqlite:///(?!file:)([^?]+)", uri)
        database = root / "mlflow.db" if embedded else root / named[1] if named else None
        if named and not Path(named[1]).is_absolute():  # an experiment's current folder may be deleted
            mlflow.set_tracking_uri(f"sqlite:///{database}{uri[named.end() :]}")
        if database and not create and not database.exists():
            kind = NoStore if embedded else UserError
            raise kind(f"expected an MLflow store at {database}, found none; `dvc-mlflow sync` makes it")
        lock = Path(f"{database}.lock") if database else root / ".dvc" / "tmp" / "dvc-mlflow.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        # For this host only: processes that create the same SQLite file break each other's migrations, and two that
        # continue the same killed run would mix.
        self.lock = FileLock(lock, timeout=60)
        with self.lock:
            if database and not database.exists():
                create_database(database)
        self.client = mlflow.MlflowClient()
        artifacts = (root / "mlartifacts").as_uri()
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None and not create:
            raise UserError(
                f"expected the experiment {name} at {without_credentials(uri)}, found none; `dvc-mlflow sync` makes it"
            )
        if experiment is None:
            # A server knows where its artifacts go; a database would put them into the current folder.
            self.experiment_id = self._create_experiment(name, None if uri.startswith("http") else artifacts)
        else:
            self.experiment_id = experiment.experiment_id
            if embedded and re.fullmatch("file://.*/mlartifacts", experiment.artifact_location):
                move_artifacts(root / "mlflow.db", experiment.artifact_location, artifacts)
        mlflow.set_experiment(experiment_id=self.experiment_id)

    @property
    def server(self) -> str:
        """The server's address, without credentials; "" if the store is a database."""
        uri = mlflow.get_tracking_uri()
        served = uri.startswith(("http:", "https:"))
        return without_credentials(uri).replace("//…@", "//").rstrip("/") if served else ""

    def page(self, run: Run) -> str:
        """The address of the run's page on the server."""
        return f"{self.server}/#/experiments/{self.experiment_id}/runs/{run.info.run_id}"

    def _create_experiment(self, name: str, artifacts: str | None) -> str:
        note = "What DVC ran: each execution of a stage is a run. `dvc-mlflow sync` adds what is missing."
        try:
            return self.client.create_experiment(name, artifacts, {"mlflow.note.content": note})
        except MlflowException:
            experiment = self.client.get_experiment_by_name(name)  # another process was first
            if experiment is None:
                raise
            return experiment.experiment_id

    # Finding runs

    def search(self, tags: Mapping[str, str], status: str = "") -> list[Run]:
        """All runs with these tags, and this status if one is given; oldest first."""
        conditions = [f"tags.`{key}` = '{_quoted(value)}'" for key, value in tags.items()]
        conditions += [f"attributes.status = '{status}'"] if status else []
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], " and ".join(conditions), max_results=1000, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    def find(self, execution: Execution, experiment: str | None = None) -> Run | None:
        """The finished run of this execution; for a DVC experiment, that experiment's run."""
        if self.known is None:
            runs = self.search({CLAIM: execution.id}, "FINISHED")
        else:
            runs = self.known.get(execution.id, [])
        if experiment:
            runs = [run for run in runs if run.data.tags.get("dvc.exp_name") == experiment]
        # Of several without an experiment, all but the lowest run id are about to be dropped: see `publish`.
        runs = sorted(runs, key=lambda run: (1, "") if "dvc.exp_name" in run.data.tags else (0, run.info.run_id))
        if (maker := execution.maker_of_model()) and (parent := self.find(maker, experiment) or self.find(maker)):
            runs = [run for run in runs if run.data.tags.get(PARENT) == parent.info.run_id]
        return runs[0] if runs else None

    def know_all(self) -> None:
        """Read all finished runs now, so that none need be searched; `publish` finds what others record later."""
        self.known = {}
        for run in self.search({}, "FINISHED"):
            self._know(run)

    def _know(self, run: Run) -> None:
        if self.known is not None and CLAIM in run.data.tags:
            others = [one for one in self.known.get(run.data.tags[CLAIM], []) if one.info.run_id != run.info.run_id]
            self.known[run.data.tags[CLAIM]] = [*others, run]
            self._mistaken |= {tag for tag in run.data.tags if tag.startswith(MISTAKEN)}

    def lacks(self, execution: Execution, experiment: str | None = None) -> bool:
        """Whether `record` may have something to add: there is no run, or images could not be had for it."""
        run = self.find(execution, experiment)
        return run is None or bool(_absent(run))

    def find_alone(self, execution: Execution) -> Run | None:
        """A finished run of an execution whose upstream is unknown."""
        return next((run for run, same_outs in self.alike(execution) if same_outs), None)

    def alike(self, execution: Execution) -> list[tuple[Run, bool]]:
        """The finished runs of this stage with these command, params and deps, and whether each made the same outs."""
        outs = {valid_name(f"dvc.outs.{path}"): digest for path, digest in execution.outs.items()}
        found = self.search({"stage": execution.stage, "dvc.fingerprint": execution.fingerprint}, "FINISHED")
        return [(run, outs.items() <= run.data.tags.items()) for run in found]

    def parent(self, execution: Execution, experiment: str | None = None) -> Run | None:
        """The run that made the model that the execution reads; None if it reads none.

        Raises Unprovable if MLflow has no such run.
        """
        maker = execution.maker_of_model()
        if maker is None:
            return None
        found = self.find(maker, experiment) or self.find(maker)
        if found is None:
            raise Unprovable(f"MLflow has no run of {maker.stage}, which made the model that it read")
        return found

    def unfinished(self, execution: Execution) -> Run | None:
        """The newest killed or lost run of this execution, on this host and in this environment."""
        tags = {"stage": execution.stage, "dvc.fingerprint": execution.fingerprint, "process.host": HOST}
        runs = self.search(tags, "KILLED") + [run for run in self.search(tags, "RUNNING") if not is_alive(run)]
        params, here = start_of(execution, self.project).params, environment_tags()
        runs = [
            run for run in runs if run.data.params.items() <= params.items() and here.items() <= run.data.tags.items()
        ]
        return max(runs, key=lambda run: run.info.start_time, default=None)

    # Writing runs

    def begin(
        self,
        execution: Execution,
        experiment: str | None,
        pid: int,
        start_time: int,
        git: Git,
        live: bool,
        content: Content | None = None,
    ) -> tuple[str, bool]:
        """Create the run of an execution, or continue a killed one; return its id, and whether it is continued.

        `pid` is the process that owns the run: once it is gone, the run is dead. `start_time` is in milliseconds.
        `content` is given for an execution that has ended.
        """
        parent = self.parent(execution, experiment)
        start = content or start_of(execution, self.project)
        content_tags = {key: value for key, value in start.tags.items() if key != CLAIM}
        made_by = environment_tags() | hardware_tags() if live else {"restored": "true"}
        tags = {**(own_tags() if live else {}), **content_tags, **process_tags(pid), **made_by}
        changes = changed_params(self.project, execution)
        tags |= {
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": valid_value(source_of(execution)),
            "mlflow.user": git.author.partition(" <")[0] if git.author and not live else psutil.Process().username(),
            "mlflow.note.content": valid_value(note(execution, changes)),
        }
        if git.author:
            tags["git.author"] = git.author
        if git.commit:
            tags |= {"mlflow.source.git.commit": git.commit, "git.dirty": "true" if git.patch else "false"}
        if experiment:
            tags["dvc.exp_name"] = experiment
        tags |= self.project.tags()
        if parent:
            tags[PARENT] = parent.info.run_id
        what = [*([experiment] if experiment else []), *changes[:3], *(["…"] if len(changes) > 3 else [])]
        name = one_line(" ".join([execution.stage, *(what or [execution.fingerprint[:8]])]), 250)
        first = dict(list(tags.items())[:90])  # a run can be created with tags, but not with any number of them
        with self.lock:
            former = self.unfinished(execution) if live else None
            if former:
                run_id = former.info.run_id
                self.client.update_run(run_id, "RUNNING", name)
                tags["resumed"] = "true"
            else:
                first |= process_tags(pid) | {"stage": tags["stage"], "dvc.fingerprint": tags["dvc.fingerprint"]}
                run_id = self.client.create_run(self.experiment_id, start_time, first, name).info.run_id
                tags = {key: value for key, value in tags.items() if first.get(key) != value}
            self._log(run_id, params=start.params if live else {}, tags=tags)
        if live:
            self._log_datasets(run_id, execution, start)
        if git.patch:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / PATCH).write_bytes(git.patch)
                self.client.log_artifact(run_id, f"{folder}/{PATCH}")
        return run_id, bool(former)

    def _log(
        self,
        run_id: str,
        metrics: Iterable[Metric] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log everything in as few calls as MLflow allows: at most 1,000 items each, 100 of them params, 100 tags."""
        points = [*_batches(list(metrics), 800)]
        values = [*_batches([Param(key, value) for key, value in (params or {}).items()], 100)]
        named = [*_batches([RunTag(valid_name(key), valid_value(value)) for key, value in (tags or {}).items()], 100)]
        for batch in zip_longest(points, values, named, fillvalue=()):
            self.client.log_batch(run_id, *batch)

    def _log_datasets(self, run_id: str, execution: Execution, content: Content) -> None:
        paths = {valid_name(name): path for name, path in execution.declared.datasets.items()}
        context = [InputTag("mlflow.data.context", one_line(execution.stage, 250))]
        inputs = [
            DatasetInput(Dataset(name, digest, "local", json.dumps({"uri": paths[name]})), context)
            for name, digest in content.datasets.items()
        ]
        for number in range(5):  # if two hosts create a data set at once, one is refused
            try:
                if inputs:
                    self.client.log_inputs(run_id, inputs)
                return
            except MlflowException:
                if number == 4:
                    raise
                time.sleep(0.1 * 2**number)

    def log_points(self, run_id: str, points: Iterable[tuple[str, float, int]], timestamp: int) -> None:
        """Log metrics: name, value and step of each; the time is in milliseconds since 1970."""
        self._log(run_id, [Metric(name, value, timestamp, step) for name, value, step in points])

    def complete(
        self,
        run_id: str,
        execution: Execution,
        logged: Mapping[str, Mapping[int, float]] | None = None,
        content: Content | None = None,
    ) -> None:
        """Add the content that the run lacks; `logged` are the points that it has. `problems` has what cannot be shown.

        Raises MissingBytes if bytes are unavailable, and Conflict if the run has points that the files lack.
        """
        content = content or content_of(execution, self.project)
        self.problems = [*content.problems]
        run = self.client.get_run(run_id)
        if logged is None:
            logged = self.points(run, content.curves)
        for column, points in logged.items():
            if any(not same(content.curves.get(column, {}).get(step), value) for step, value in points.items()):
                raise Conflict(column)
        now = run.info.start_time if "restored" in run.data.tags else int(time.time() * 1000)
        missing = [
            Metric(column, value, now, step)
            for column, points in content.curves.items()
            for step, value in points.items()
            if step not in logged.get(column, {})
        ]
        if content.datasets.keys() - _datasets(run).keys():
            self._log_datasets(run_id, execution, content)
        self._log_files(run_id, execution, content)
        model_id = self._log_models(run, execution, content)
        self._log(
            run_id,
            [*missing, *self._new_metrics(run, content, model_id, now)],
            {key: value for key, value in content.params.items() if key not in run.data.params},
            {key: value for key, value in content.tags.items() if run.data.tags.get(key) != value and key != CLAIM}
            | _absent_tags(content),
        )
        self._contents = {**dict(list(self._contents.items())[-20:]), run_id: content}

    def points(self, run: Run, columns: Iterable[str]) -> dict[str, dict[int, float]]:
        """The run's points of these curves, the last one of each step."""
        return {
            column: {point.step: point.value for point in self.client.get_metric_history(run.info.run_id, column)}
            for column in columns
            if column in run.data.metrics
        }

    def _log_files(self, run_id: str, execution: Execution, content: Content) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for path, digest in content.artifacts.items():
                copy = Path(folder) / re.sub(r"(^|/)\.\.(?=/)", r"\1_", path.lstrip("/"))
                copy.parent.mkdir(parents=True, exist_ok=True)
                found = self.project.find(path, digest)
                if found is None:
                    raise MissingBytes(path)
                shutil.copyfile(found, copy)
            kept = {
                path: self.project.entries(path, digest)
                for path, digest in {**execution.deps, **execution.outs}.items()
                if digest.endswith(".dir")
            }
            execution = replace(execution, entries={p: e for p, e in kept.items() if e is not None and len(e) <= 1000})
            (Path(folder) / EXECUTION).write_text(execution.to_json(), encoding="utf-8")
            self.client.log_artifacts(run_id, folder)

    def _new_metrics(self, run: Run, content: Content, model_id: str | None, timestamp: int) -> list[Metric]:
        """The metrics that the run lacks, each linked to its model, or its parent's, and to the data set."""
        if model_id is None and (parent_id := run.data.tags.get(PARENT)):
            model_id = self.model_id(self.client.get_run(parent_id))
        links = _links(model_id, content.datasets)
        new = {key: value for key, value in content.metrics.items() if not same(run.data.metrics.get(key), value)}
        return [Metric(key, value, timestamp, 0, **links) for key, value in new.items()]

    def _log_models(self, run: Run, execution: Execution, content: Content) -> str | None:
        """Log the models that the execution made; return the id of the last one."""
        run_id, model_id = run.info.run_id, None
        for name, digest in content.models.items():
            path, meta = execution.declared.models[name], execution.declared.model_meta.get(name, {})
            existing = self.models_of(run_id, path)
            ready = [model for model in existing if model.status == LoggedModelStatus.READY]
            known = self._model_ids(run_id)
            cut_off = [model for model in existing if model not in ready]
            for model in cut_off:
                if model.model_id not in known:  # it was cut off before it was linked to the run
                    self.client.delete_logged_model(model.model_id)
            if ready:
                model_id = ready[-1].model_id
                continue
            again = next((model.model_id for model in cut_off if model.model_id in known), None)
            model_id = again or self._create_model(run, execution, content, name)
            if meta.get("python_model") and (folder := self.project.code_folder(execution, _code_of(meta))):
                try:
                    self._add_served_model(None if again else run_id, model_id, path, digest, meta, folder)
                except UnusableCode as error:
                    self.problems.append(f"model {name} is recorded without its code: {error}")
            elif not again:  # the hash alone: DVC has the bytes
                self.client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])
            self.client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        return model_id

    def _create_model(self, run: Run, execution: Execution, content: Content, name: str) -> str:
        """Create a model in MLflow, which is then to be linked to its run; return its id.

        MLflow's own log_model would add the commit of the repository that has the running program.
        """
        path, digest = execution.declared.models[name], content.models[name]
        tags = {f"dvc.outs.{path}": digest, "mlflow.source.name": source_of(execution)}
        for key in ("mlflow.source.type", "mlflow.source.git.commit", "mlflow.user"):
            if key in run.data.tags:
                tags[key] = run.data.tags[key]
        if desc := execution.declared.model_meta.get(name, {}).get("desc"):
            tags["mlflow.note.content"] = valid_value(str(desc))
        model = self.client.create_logged_model(
            self.experiment_id,
            name=valid_model_name(name, digest),
            source_run_id=run.info.run_id,
            tags=tags,
            params=dict(content.params),
        )
        return model.model_id

    def _add_served_model(
        self, run_id: str | None, model_id: str, path: str, digest: str, meta: Mapping[str, Any], folder: Path
    ) -> None:
        """Add to a model its bytes and the code in `folder` that `meta` names by the arguments of log_model: no pickle.

        `run_id` is given if the model is not linked to its run yet. Raises UnusableCode if MLflow cannot load the code.
        """
        found = self.project.find(path, digest)
        if found is None:
            raise MissingBytes(path)
        signature = meta.get("signature")
        # MLflow refuses a link out of its folder; with cache.type symlink, the file is one into DVC's cache.
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(shutil.copyfile(found, Path(scratch) / Path(path).name))
            # mlflow.pyfunc.log_model needs an active run, which MLflow marks FINISHED whenever Python exits.
            Model.log(
                artifact_path=None,
                flavor=SimpleNamespace(save_model=_save_model),
                run_id=run_id,  # a run cannot have the same model twice
                model_id=model_id,
                python_model=str(folder / meta["python_model"]),
                artifacts={"model": copy.as_uri()},  # MLflow unquotes a path
                code_paths=[str(folder / code) for code in meta.get("code_paths") or []] or None,
                signature=signature
                and ModelSignature(
                    **{
                        side: Schema.from_json(json.dumps(signature[side]))
                        for side in ("inputs", "outputs")
                        if signature.get(side)
                    }
                ),
                validate_serving_input=False,
                pip_requirements=[_pinned(package) for package in meta.get("pip_requirements", ["mlflow"])],
            )

    def models_of(self, run_id: str, path: str) -> list[Any]:
        """The run's logged models for a path."""
        found = self.client.search_logged_models([self.experiment_id], f"source_run_id = '{run_id}'")
        return [model for model in found if f"dvc.outs.{path}" in model.tags]

    def _model_ids(self, run_id: str) -> set[str]:
        outputs = self.client.get_run(run_id).outputs
        return {output.model_id for output in outputs.model_outputs} if outputs else set()

    def model_id(self, run: Run) -> str | None:
        """The id of the run's model; None if it has none."""
        return run.outputs.model_outputs[-1].model_id if run.outputs and run.outputs.model_outputs else None

    def publish(self, run_id: str, execution: Execution, experiment: str | None) -> Run:
        """End a complete run as FINISHED, or drop it for another of the same execution; return the one that stays.

        Each run first claims its execution, then searches for rivals; of concurrent claims, the lowest run id stays.
        So no two can both stay, on any hosts, without a lock that all of them would have to reach.
        """
        self.client.set_tag(run_id, CLAIM, execution.id)
        own = self.client.get_run(run_id)
        deadline = time.monotonic() + CLAIM_SECONDS
        ended = own.info.status == "FINISHED"  # already, if it was moved here from a parent that was dropped
        while True:
            if self._lost_parent(own):
                own = self._move(own, execution, experiment)
                if ended:
                    self.show_on_parent(own, execution)
            rivals = [run for run in self.search({CLAIM: execution.id}) if self._rivals(own, run, experiment)]
            finished = [run for run in rivals if run.info.status == "FINISHED"]
            claiming = [
                run for run in rivals if run.info.status == "RUNNING" and run.info.run_id < run_id and is_alive(run)
            ]
            if ended:
                finished = [run for run in finished if run.info.run_id < run_id]
            if finished:
                self._know(finished[0])
                self._drop(run_id)
                return finished[0]
            if claiming and time.monotonic() < deadline:
                time.sleep(0.05)
            elif not ended:
                end_time = _end_time(own)
                try:
                    self.show_on_parent(own, execution, end_time)  # a FINISHED run is complete
                except MlflowException:
                    if self._lost_parent(own):
                        continue
                    raise
                self.client.set_terminated(run_id, "FINISHED", end_time)
                ended = True
            else:
                own = self.client.get_run(run_id)
                self._know(own)
                return own

    def _lost_parent(self, run: Run) -> bool:
        """Whether the run's parent was dropped for another of its execution after this run had found it."""
        parent_id = run.data.tags.get(PARENT)
        return parent_id is not None and self.client.get_run(parent_id).info.lifecycle_stage != LifecycleStage.ACTIVE

    def _move(self, run: Run, execution: Execution, experiment: str | None) -> Run:
        """Make the run a child of the parent that stayed, with its metrics linked to that one's model.

        Raises Unprovable if there is none.
        """
        self.known = None  # it has the parent that was dropped
        run_id, parent = run.info.run_id, self.parent(execution, experiment)
        assert parent is not None
        self.client.set_tag(run_id, PARENT, parent.info.run_id)
        if self.model_id(run) is None:
            links = _links(self.model_id(parent), _datasets(run))
            linked = [metric for metric in run.data._metric_objs if metric.step == 0]
            self._log(run_id, [Metric(one.key, one.value, one.timestamp, 0, **links) for one in linked])
        return self.client.get_run(run_id)

    def _drop(self, run_id: str) -> None:
        """Remove a run of an execution that has another; those that read its model move to the one that stays."""
        self.discard(run_id)
        for child in self.search({PARENT: run_id}, "FINISHED"):  # one that is RUNNING will see to it itself
            with contextlib.suppress(MissingBytes, Unprovable):
                if execution := self.execution_of(child):
                    self.publish(child.info.run_id, execution, child.data.tags.get("dvc.exp_name"))

    def _rivals(self, own: Run, other: Run, experiment: str | None) -> bool:
        """Whether another run shows the same execution in the same place."""
        if own.info.run_id == other.info.run_id:
            return False
        if own.data.tags.get(PARENT) != other.data.tags.get(PARENT):
            return False
        named = other.data.tags.get("dvc.exp_name")
        return named == experiment or (experiment is None and other.info.status == "FINISHED")

    def show_on_parent(self, run: Run, execution: Execution, end_time: int | None = None) -> None:
        """Copy the metrics of a run that read a model to the run that made it; of several such runs, the last one's.

        `end_time` is in milliseconds, given if the run is about to end.
        """
        parent_id = run.data.tags.get(PARENT)
        if not parent_id:
            return
        parent = self.client.get_run(parent_id)
        end_time = end_time or run.info.end_time
        content = self._contents.get(run.info.run_id) or content_of(execution, self.project)
        metrics = parent_metrics(execution, content, self.own_metrics(parent))
        latest = {metric.key: metric.timestamp for metric in parent.data._metric_objs}
        self.log_points(
            parent_id, [(key, value, 0) for key, value in metrics.items() if end_time > latest.get(key, 0)], end_time
        )

    def own_metrics(self, run: Run) -> set[str]:
        """The names of the run's own metrics, without those of the runs that read its model."""
        if content := self._contents.get(run.info.run_id):
            return {*content.metrics, *content.curves}
        children = self.search({PARENT: run.info.run_id}, "FINISHED")
        theirs = {key for child in children for key in child.data.metrics}
        theirs |= {valid_name(f"{child.data.tags['stage']}.{key}") for child in children for key in child.data.metrics}
        execution = self.execution_of(run)
        try:
            content = content_of(execution, self.project) if execution else None
        except MissingBytes:
            content = None
        return {*content.metrics, *content.curves} if content else set(run.data.metrics) - theirs

    def record(self, execution: Execution, experiment: str | None = None) -> tuple[Run, bool]:
        """Create the run of a finished execution if it is missing; return it, and whether it was created.

        Raises MissingBytes or Unprovable if it cannot be created.
        """
        self.problems = []
        if found := self.find(execution, experiment):
            self.show_on_parent(found, execution)
            self._add_absent(found, execution)
            return found, False
        for one in (*execution.upstream, execution):
            if self._is_mistaken(one):
                raise Unprovable(mistaken(one))
        content = content_of(execution, self.project)  # before there is a run: raises MissingBytes
        with interrupts_held():
            return self._make(execution, experiment, content), True

    def _add_absent(self, run: Run, execution: Execution) -> None:
        """Add the images and small outs that could not be had when the run was recorded, if they can now."""
        before = _absent(run) | ({PARTIAL} & run.data.tags.keys())
        if not before:
            return
        with contextlib.suppress(MissingBytes):
            content = content_of(execution, self.project)
            if found := before - _absent_tags(content).keys():
                self._log_files(run.info.run_id, execution, content)
                for tag in found:
                    self.client.delete_tag(run.info.run_id, tag)
                self._know(self.client.get_run(run.info.run_id))

    def _make(self, execution: Execution, experiment: str | None, content: Content) -> Run:
        """Create the run of a finished execution, continuing a killed run if there is one."""
        git = self.project.git(self.project.written()) if self._is_of_this_tree(execution) else Git()
        git = replace(git, author=self.project.author_of(execution))
        # An execution in another commit is not the one that was killed here.
        former = None if experiment or "commit" in self.project.tags() else self.unfinished(execution)
        if former:
            run_id = former.info.run_id
            try:
                self.complete(run_id, execution)
                self.client.set_tag(run_id, "restored", "true")
                return self.publish(run_id, execution, experiment)
            except Conflict:  # it belongs to an attempt with other numbers
                self.terminate(run_id, "KILLED")
        run_id, _ = self.begin(execution, experiment, os.getpid(), self.project.now(), git, False, content)
        try:
            self.complete(run_id, execution, {}, content)
            return self.publish(run_id, execution, experiment)
        except Exception:
            with contextlib.suppress(Exception):
                self.discard(run_id)
            raise

    def mark_mistaken(self, run_id: str, execution: Execution) -> None:
        """Tag the run of what ran: dvc.lock will have this execution in its place."""
        self.client.set_tag(run_id, _mistaken_tag(execution), "true")

    def _is_mistaken(self, execution: Execution) -> bool:
        """Whether this execution never ran, and is in dvc.lock in place of one that did."""
        tag = _mistaken_tag(execution)
        marked = bool(self.search({tag: "true"})) if self.known is None else tag in self._mistaken
        return marked and not self.find_alone(execution)

    def _is_of_this_tree(self, execution: Execution) -> bool:
        """Whether the stage and its upstream would run now as they did."""
        return all(self.project.is_current(one.stage) for one in (*execution.upstream, execution))

    def terminate(self, run_id: str, status: str) -> None:
        """End a run now, or at its start if the clock was set back before that or the run is a past one."""
        self.client.set_terminated(run_id, status, _end_time(self.client.get_run(run_id)))

    def discard(self, run_id: str) -> None:
        """Remove a redundant run and its models."""
        for model in self.client.search_logged_models([self.experiment_id], f"source_run_id = '{run_id}'"):
            self.client.delete_logged_model(model.model_id)
        self.terminate(run_id, "KILLED")
        self.client.delete_run(run_id)

    # Reading runs

    def execution_of(self, run: Run) -> Execution | None:
        """The execution in the run's artifact; None if it is missing or unreadable."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = self.client.download_artifacts(run.info.run_id, EXECUTION, folder)
                return Execution.from_json(Path(path).read_text(encoding="utf-8"))
            except (MlflowException, OSError, ValueError, TypeError, KeyError):
                return None

    def read(self, run: Run, expected: Content) -> Content:
        """The run's content, of the kinds expected of it."""
        tags = run.data.tags
        kept = {key: value for key, value in tags.items() if key in expected.tags or _is_hash(key)}
        models = {}
        for model in self.client.search_logged_models([self.experiment_id], f"source_run_id = '{run.info.run_id}'"):
            for key, value in model.tags.items():
                if key.startswith("dvc.outs.") and model.status == LoggedModelStatus.READY:
                    models[key.removeprefix("dvc.outs.")] = self._model_digest(model, key, value)
        return Content(
            params=run.data.params,
            tags=kept,
            datasets=_datasets(run),
            metrics={k: v for k, v in run.data.metrics.items() if k not in expected.curves},
            curves=self.points(run, {*expected.curves}),
            artifacts=self._artifact_digests(run, expected),
            models=models,
        )

    def _model_digest(self, model: Any, key: str, digest: str) -> str:
        """The hash of the model's bytes in MLflow if it has them, else the hash that it names."""
        name = Path(key.removeprefix("dvc.outs.")).name
        with tempfile.TemporaryDirectory() as folder:
            try:
                mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=folder)
            except (MlflowException, OSError):
                return digest
            found = list(Path(folder).rglob(f"artifacts/{name}"))
            return digest if not found or matches(found[0], digest) else "other bytes"

    def _artifact_digests(self, run: Run, expected: Content) -> dict[str, str]:
        if not expected.artifacts:
            return {}
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            self.client.download_artifacts(run.info.run_id, "", folder)
            for path, digest in expected.artifacts.items():
                file = Path(folder) / path
                if file.exists():
                    found[path] = digest if matches(file, digest) else "other bytes"
        return found

    @contextlib.contextmanager
    def looking_at(self, project: Project) -> Iterator[None]:
        """Record another revision of the project in this context."""
        before, self.project = self.project, project
        try:
            yield
        finally:
            self.project = before

    # Abandoned runs

    def dead(self) -> list[Run]:
        """The runs of this host whose processes are gone: RUNNING ones, and those that were about to be removed."""
        here = {"process.host": HOST}
        left = self.search(here, "RUNNING") + self.search(here | {"restored": "true"}, "KILLED")
        return [run for run in left if not is_alive(run)]

    def stale(self, hours: float) -> list[Run]:
        """The runs of other hosts that have been RUNNING for this many hours."""
        before = (time.time() - hours * 3600) * 1000
        runs = [run for run in self.search({}, "RUNNING") if "process.host" in run.data.tags]
        return [run for run in runs if run.data.tags["process.host"] != HOST and run.info.start_time < before]

    def close(self, run: Run) -> None:
        """End an abandoned run as KILLED, or remove it if it only restored a record, which another run can do."""
        if run.data.tags.get("restored") == "true":
            self.discard(run.info.run_id)
        else:
            self.terminate(run.info.run_id, "KILLED")


class RunFiles:
    """The bytes of outs among a run's artifacts."""

    def __init__(self, store: Store, run: Run) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store.client.download_artifacts(run.info.run_id, "", self._folder.name)
        execution = store.execution_of(run)
        self._entries = execution.entries if execution else {}

    def find(self, path: str, digest: str, most: int | None = None) -> Path | None:
        """The artifact at this path if it has this hash."""
        file = Path(self._folder.name) / path
        return file if matches(file, digest) and (most is None or file.stat().st_size <= most) else None

    def is_larger(self, path: str, digest: str, size: int) -> bool:
        """Whether the file has more bytes than that: what is no artifact may."""
        return True

    def entries(self, path: str, digest: str) -> Mapping[str, str] | None:
        """The hashes of the files in a directory, as the execution records them."""
        return self._entries.get(path)


def parent_metrics(execution: Execution, content: Content, own: set[str]) -> dict[str, float]:
    """The metrics of an execution that read a model, as the run that made the model shows them.

    Metrics nested in a metrics file, such as those of each class, stay with the execution alone.
    """
    shown = {}
    for key, value in content.metrics.items():
        prefix = execution.declared.prefix or (execution.stage if key in own else "")
        if "." not in key:
            shown[valid_name(f"{prefix}.{key}" if prefix else key)] = value
    return shown


def _datasets(run: Run) -> dict[str, str]:
    """The names and digests of the data sets that the run read."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {entry.dataset.name: entry.dataset.digest for entry in inputs}


def _links(model_id: str | None, datasets: Mapping[str, str]) -> dict[str, str]:
    """What a metric names: the model that it is of, and the data set if there is one."""
    links = {"model_id": model_id} if model_id else {}
    if len(datasets) == 1:
        ((links["dataset_name"], links["dataset_digest"]),) = datasets.items()
    return links


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay a signal that ends this process until the end of the block, but not a second signal.

    An interrupted transaction keeps the SQLite file locked, even for this process, which then could not clean up.
    """
    caught: list[int] = []
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hold(number: int, frame: FrameType | None) -> None:
        handler = former[signal.Signals(number)]
        if caught and callable(handler):
            handler(number, frame)
        caught.append(number)

    for number, handler in former.items():
        if callable(handler):  # not ignored
            signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


def describe(error: BaseException) -> str:
    """One line on an error: the user's, the store's with its root cause, or a defect in this package."""
    if isinstance(error, UserError | Unprovable):
        return str(error)
    if isinstance(error, MissingBytes):
        return f"{error} does not match dvc.lock and is not in DVC's cache; `dvc checkout` or `dvc pull` first"
    cause = error
    while deeper := cause.__cause__ or cause.__context__:
        cause = deeper
    reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
    module = type(error).__module__.partition(".")[0]
    if module in ("builtins", "dvc_mlflow") and not isinstance(error, OSError):
        where = error.__traceback__
        while where and where.tb_next:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else "?"
        return without_credentials(f"dvc-mlflow has a defect at {place} ({reason}); please report it")
    if module in ("dvc", "dvc_data", "dvc_objects", "scmrepo"):
        return without_credentials(f"DVC cannot read the project ({reason})")
    return without_credentials(f"MLflow cannot use {mlflow.get_tracking_uri()} ({reason})")


def mistaken(execution: Execution) -> str:
    """One line on an execution in dvc.lock that never ran."""
    return (
        f"params or deps of {execution.stage} changed while it was running, and dvc.lock has the changed ones; "
        f"`dvc repro --force {execution.stage}`"
    )


def tracking_uri(project: Project) -> str:
    """The store's address: MLFLOW_TRACKING_URI, else the one in the project's pyproject.toml, else ""."""
    if address := os.environ.get("MLFLOW_TRACKING_URI"):
        return address
    address = _setting(project, "tracking_uri")
    if address != without_credentials(address):
        raise UserError(
            "expected tracking_uri in pyproject.toml without a user and password, found one with them; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI"
        )
    return address


def _setting(project: Project, key: str) -> str:
    """The value in the section [tool.dvc-mlflow] of pyproject.toml; "" if there is none. Raises UserError."""
    try:
        text = (project.folder / "pyproject.toml").read_text(encoding="utf-8")
        value = tomllib.loads(text).get("tool", {}).get("dvc-mlflow", {}).get(key, "")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, AttributeError) as error:  # ValueError: TOML's and UTF-8's
        raise UserError(f"cannot read pyproject.toml: {one_line(error)}") from None
    if not isinstance(value, str):
        raise UserError(f"expected {key} in pyproject.toml as a string, found {one_line(value)}")
    return value


def experiment_name(project: Project) -> str:
    """The experiment that the project's pyproject.toml names, else the name of its repository or folder."""
    if name := _setting(project, "experiment"):
        return name
    command = ["git", "-C", str(project.root), "config", "--get", "remote.origin.url"]
    with contextlib.suppress(OSError):
        address = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if name := Path(address.rstrip("/").removesuffix(".git")).name:
            return name
    return project.root.name


def sqlite_address(path: Path) -> str:
    """The URI of an SQLite database, in which % starts an escape and ? ends the path."""
    escaped = str(path).replace("%", "%25").replace("?", "%3F")
    # Without the driver's name, MLflow would create a folder with the escaped name.
    return f"sqlite:///{path}" if escaped == str(path) else f"sqlite+pysqlite:///{escaped}"


def create_database(path: Path) -> None:
    """Create an SQLite database with MLflow's tables, whole or not at all: MLflow cannot open a partial one.

    MLflow's migrations write it some fifty times: in memory, that takes 0.35 s instead of 0.55 s.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    in_memory = "file:mlflow?mode=memory&cache=shared"
    with contextlib.closing(sqlite3.connect(in_memory, uri=True)) as connection:
        mlflow.MlflowClient(f"sqlite:///{in_memory}&uri=true").search_experiments()
        connection.execute("VACUUM INTO ?", (str(temporary),))
    temporary.replace(path)


def move_artifacts(database: Path, former: str, current: str) -> None:
    """Correct the artifact locations, which MLflow stores as absolute, of a project that was moved or copied.

    `former` and `current` are the URIs of the folder mlartifacts; locations elsewhere stay as they are.
    """
    if former == current:
        return
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:  # all or nothing
        for table, column in ARTIFACT_LOCATIONS:
            connection.execute(
                f"UPDATE {table} SET {column} = :current || substr({column}, length(:former) + 1) "
                f"WHERE substr({column} || '/', 1, length(:former) + 1) = :former || '/'",
                {"former": former, "current": current},
            )


def environment_tags() -> dict[str, str]:
    """The versions that a run uses: Python, DVC, MLflow, and a hash of all installed packages."""
    packages = set()
    for folder in sys.path:
        with contextlib.suppress(OSError):
            packages |= {entry.name for entry in Path(folder or ".").iterdir() if entry.name.endswith(".dist-info")}
    digest = hashlib.sha256("\n".join(sorted(packages)).encode()).hexdigest()[:16]
    versions = {f"version.{name}": importlib.metadata.version(name) for name in ("dvc", "mlflow")}
    return {**versions, "version.python": platform.python_version(), "version.packages": digest}


def own_tags() -> dict[str, str]:
    """The user's own tags: the JSON object in MLFLOW_TAGS. Raises UserError if it is not one, or has reserved tags."""
    text = os.environ.get("MLFLOW_TAGS") or "{}"
    try:
        tags = {str(key): str(value) for key, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise UserError(f"expected a JSON object in MLFLOW_TAGS, found {one_line(text, 60)}") from None
    if reserved := [key for key in tags if re.match(RESERVED, key)]:
        raise UserError(f"expected other names in MLFLOW_TAGS, found {reserved[0]}, which says what ran")
    return tags


def hardware_tags() -> dict[str, str]:
    """What bits may depend on besides versions: the CPU's model and instruction set, each GPU and its driver."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError:  # not Linux
        cpu = {}
    flags = cpu.get("flags", "").split()
    vectors = [name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX")) if flag in flags]
    tags = {
        "hardware.cpu": cpu.get("model name") or platform.processor() or "unknown",
        "hardware.instruction_set": " ".join([platform.machine(), *vectors[:1]]),
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # there is no nvidia-smi, or it hangs
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        shown = subprocess.run(query, capture_output=True, text=True, timeout=3, check=True).stdout
        if gpus := [", driver ".join(line.split(", ")) for line in shown.splitlines()]:
            tags["hardware.gpu"] = "; ".join(gpus)
    return tags


def changed_params(project: Project, execution: Execution) -> list[str]:
    """The params that differ from the last commit, as `key=value`; the stage's own without its name."""
    committed = project.committed_params(execution)
    if committed is None:
        return []
    before = named_params(committed)
    prefix = f"{execution.stage.rpartition(':')[2].partition('@')[0]}."
    changed = {key: value for key, value in named_params(execution).items() if before.get(key) != value}
    return [f"{key.removeprefix(prefix)}={value}" for key, value in changed.items()]


def source_of(execution: Execution) -> str:
    """The stage with its file, in DVC's notation: `dvc.yaml:train`."""
    return execution.stage if ":" in execution.stage else f"dvc.yaml:{execution.stage}"


def note(execution: Execution, changes: list[str]) -> str:
    """The description on the run's page, in Markdown."""
    params = f"Params: as committed{', except ' + ', '.join(changes) if changes else ''}."
    lines = [execution.declared.desc or execution.stage, params, "`dvc-mlflow lineage RUN_ID` says how to restore it."]
    return "\n\n".join(lines)


def valid_model_name(name: str, digest: str) -> str:
    """A model name that MLflow accepts: without / : . % and quotes."""
    return re.sub(r"[^\w-]", "-", name) + f"-{digest[:8]}"


def process_tags(pid: int) -> dict[str, str]:
    """The owner of a run: host, process, and when that process started; "" if it is gone."""
    created = ""
    with contextlib.suppress(psutil.NoSuchProcess):
        # Setting the clock must not make it another process. Linux keeps the start as time since boot, to which psutil
        # adds the time of the boot, which moves with the clock; macOS keeps the original time of day.
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:  # killed; its new parent may reap it late or never
            created = f"{process.create_time() - (psutil.boot_time() if psutil.LINUX else 0):.2f}"
    return {"process.host": HOST, "process.pid": str(pid), "process.created": created}


def is_alive(run: Run) -> bool:
    """Whether the run's process may still be running; on another host it always may."""
    tags = run.data.tags
    if tags.get("process.host") != HOST:
        return True
    current = process_tags(int(tags["process.pid"]))
    return current["process.created"] != "" and current == {key: tags[key] for key in current}


def _end_time(run: Run) -> int:
    """The end time of a run that ends now, in milliseconds since 1970: not before its start; its start if past."""
    return max(run.info.start_time, 0 if "commit" in run.data.tags else int(time.time() * 1000))


def _save_model(validate_serving_input: bool, **arguments: Any) -> None:
    """Pyfunc's save_model, which runs the model's code. Raises UnusableCode if that fails.

    Only Model.log reads the flag: serving an example here would import the model's code once more.
    """
    with _importable([Path(path) for path in arguments["code_paths"] or []]):
        try:
            mlflow.pyfunc.save_model(**arguments)
        except MlflowException as error:  # it is of the code or its arguments: nothing has been sent
            name, cause = Path(arguments["python_model"]).name, error.__cause__ or error
            raise UnusableCode(f"{name} cannot be loaded ({type(cause).__name__}: {one_line(cause)})") from error


@contextlib.contextmanager
def _importable(code: Sequence[Path]) -> Iterator[None]:
    """Let the model's code import these files and folders, as it can when the model is loaded.

    Afterwards they are forgotten, since another commit has others. Nothing is written beside them: they may be deps.
    """
    paths, modules, writes = [*sys.path], {*sys.modules}, sys.dont_write_bytecode
    sys.path[:0] = dict.fromkeys(str(path.parent) for path in code)
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = paths, writes
        for name in sys.modules.keys() - modules:
            spec = getattr(sys.modules[name], "__spec__", None)
            places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
            if any(Path(place).is_relative_to(one) for place in places if place for one in code):
                del sys.modules[name]


def _code_of(meta: Mapping[str, Any]) -> list[str]:
    """The files and folders of code that a model is served with."""
    return [str(meta["python_model"]), *map(str, meta.get("code_paths") or [])]


def _pinned(package: str) -> str:
    """The requirement, pinned to the installed version if it names none."""
    if not re.fullmatch(r"[\w.-]+", package):
        return package
    try:
        return f"{package}=={importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _absent_tags(content: Content) -> dict[str, str]:
    """The tags that say what of the content is not there."""
    partial = {PARTIAL: "true"} if content.partial else {}
    return {valid_name(f"{ABSENT}{path}"): "true" for path in content.absent} | partial


def _absent(run: Run) -> set[str]:
    """The tags of the images that the run lacks."""
    return {tag for tag in run.data.tags if tag.startswith(ABSENT)}


def _mistaken_tag(execution: Execution) -> str:
    """The tag that marks this entry of dvc.lock as mistaken, whatever its upstream."""
    return f"{MISTAKEN}{replace(execution, upstream=()).id}"


def _is_hash(key: str) -> bool:
    return key.startswith(("dvc.deps.", "dvc.outs."))


def _quoted(value: str) -> str:
    return value.replace("'", "''")


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
