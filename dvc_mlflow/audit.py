"""List where DVC, the files and MLflow disagree."""

import json
import posixpath
import shlex
from collections.abc import Iterator
from pathlib import Path

from mlflow.entities import Run

from dvc_mlflow.execution import Execution, MissingBytes, content_of, differences, is_shown, same, start_of
from dvc_mlflow.project import Project, Unprovable, matches
from dvc_mlflow.status import changed_declarations, digest_of
from dvc_mlflow.store import CLAIM, EXECUTION, PARENT, PARTIAL, RunFiles, Store, parent_metrics


def audit_store(store: Store, everything: bool = False) -> Iterator[str]:
    """Yield where MLflow differs from dvc.lock."""
    project = store.project
    for address in project.stages:
        try:
            execution = project.locked(address)
        except Unprovable as error:
            alone = project.locked_alone(address)
            if not (alone and store.find_alone(alone)):
                yield f"{address}: {error}, so it has no run; `dvc repro`"
            continue
        if execution is None:
            continue
        run = store.find(execution)
        if run is None:  # it may be the child of a run other than its model's
            run = next(iter(store.search({CLAIM: execution.id}, "FINISHED")), None)
        if run is None:
            yield f"{address}: MLflow has no finished run for the execution in dvc.lock; `dvc-mlflow sync`"
            continue
        yield from (f"{address}: run {run.info.run_id}: {line}" for line in audit_run(store, run, execution))
    for run in store.dead():
        yield f"{run.data.tags['stage']}: run {run.info.run_id}: MLflow has it RUNNING, but its process is gone"
    if everything:
        for run in store.search({}, "FINISHED"):
            if CLAIM in run.data.tags:
                lines = audit_run(store, run, None)
                yield from (f"{run.data.tags['stage']}: run {run.info.run_id}: {line}" for line in lines)


def notes(store: Store) -> Iterator[str]:
    """Yield notes, not disagreements: where other hardware made other outs from the same command, params and inputs."""
    for address in store.project.stages:
        try:
            execution = store.project.locked(address)
        except Unprovable:
            continue
        run = store.find(execution) if execution else None
        if execution is None or run is None:
            continue
        here = _hardware(run)
        for other, same_outs in store.alike(execution):
            there = _hardware(other)
            if not same_outs and here and there and here != there:
                yield (
                    f"{address}: run {other.info.run_id} made different bytes from the same command, params and inputs "
                    f"on {there}; run {run.info.run_id} was on {here}"
                )


def _hardware(run: Run) -> str:
    """The CPU and GPUs in the run's tags; "" if there are none."""
    return ", ".join(value for key, value in sorted(run.data.tags.items()) if key.startswith("hardware."))


def audit_files(project: Project) -> Iterator[str]:
    """Yield where dvc.yaml, the params or the files differ from dvc.lock."""
    for address in project.stages:
        execution = project.locked_alone(address)
        if execution is None:
            yield f"{address}: dvc.yaml has it, dvc.lock does not"
            continue
        yield from changed_declarations(project, address, execution)
        for path, digest in {**execution.deps, **execution.outs}.items():
            if "://" in path:
                continue
            found = digest_of(project, path, digest)
            if found != digest:
                yield f"{path}: dvc.lock ({address}) has MD5 {digest}, the file {found or 'is missing'}"
            # DVC does not read what it takes from its cache, so it does not report damage.
            if path in execution.outs:
                for cached, of in damaged(project, path, digest):
                    remove = [cached] if found == digest else [project.folder / path, cached]
                    cure = shlex.join(
                        ["rm", "-rf" if digest.endswith(".dir") and found != digest else "-f", *map(str, remove)]
                    )
                    yield f"{of}: DVC's copy is damaged; `{cure}`" + ("" if found == digest else ", then `dvc repro`")


def damaged(project: Project, path: str, digest: str) -> Iterator[tuple[Path, str]]:
    """Yield an out's objects in DVC's cache that do not match their hash: the object, and the path it belongs to."""
    for cached in project.cached(digest):
        if cached.exists() and digest.endswith(".dir"):
            entries = project.entries(path, digest)
            if not matches(cached, digest.removesuffix(".dir")):
                yield cached, path
            for name, one in (entries or {}).items():
                for part in project.cached(one):
                    if part.exists() and not matches(part, one):
                        yield part, posixpath.join(path, name)
            return
        if cached.exists() and not matches(cached, digest):
            yield cached, path
            return


def audit_run(store: Store, run: Run, locked: Execution | None) -> Iterator[str]:
    """Yield where a run differs from its execution, or where its execution is impossible."""
    execution = store.execution_of(run)
    if execution is None:
        yield f"its artifact {EXECUTION} cannot be read"
        return
    if execution.id != run.data.tags.get(CLAIM) or (locked and locked.id != execution.id):
        yield f"its artifact {EXECUTION} belongs to another execution"
        return
    for path, digest in execution.deps.items():
        for one in execution.upstream:
            if path in one.outs and one.outs[path] != digest:
                yield f"{path}: it read {digest}, but {one.stage} upstream made {one.outs[path]}"
    files = store.project if locked else RunFiles(store, run)
    try:
        expected = content_of(locked or execution, files)
    except MissingBytes as error:
        if locked is None:
            yield f"its artifacts do not have {error}"
            return
        expected = start_of(locked, store.project)
        found = store.read(run, expected)
        for name, one, other in differences(found, expected):
            if name.startswith(("params", "datasets")):
                yield _line(name, one, other)
        return
    found = store.read(run, expected)
    theirs = _of_children(store, run, {*expected.metrics, *expected.curves})
    for name, one, other in differences(found, expected):
        key = name.partition(" ")[2]
        if name.startswith("models"):
            continue
        partial = one is None and PARTIAL in run.data.tags
        if partial and name.startswith("artifacts") and not is_shown(locked or execution, key):
            continue  # a small out that was not there when the record was made
        if name.startswith("metrics") and other is None:
            if not any(same(one, value) for value in theirs.get(key, [])):
                yield _line(name, one, other)
        else:
            yield _line(name, one, other)
    paths = {(locked or execution).declared.models[name]: digest for name, digest in expected.models.items()}
    for path in sorted({*paths, *found.models}):
        if paths.get(path) != found.models.get(path):
            yield _line(f"model {path}", found.models.get(path), paths.get(path))
    for key, values in theirs.items():
        if key not in found.metrics and key not in expected.curves and values:
            yield f"metrics {key}: its child runs have it, but it does not"
    maker = execution.maker_of_model()
    if maker:
        parent_id = run.data.tags.get(PARENT)
        parent = store.client.get_run(parent_id) if parent_id else None
        if parent is None or parent.data.tags.get(CLAIM) != maker.id:
            yield "its parent is not the run that made its model"


def _of_children(store: Store, run: Run, own: set[str]) -> dict[str, list[float]]:
    """The metrics of this run's children, as this run shows them: name and values."""
    values: dict[str, list[float]] = {}
    if not (run.outputs and run.outputs.model_outputs):
        return values
    for child in store.search({PARENT: run.info.run_id}, "FINISHED"):
        execution = store.execution_of(child)
        if execution is None:
            continue
        try:
            content = content_of(execution, RunFiles(store, child))
        except MissingBytes:
            continue
        for key, value in parent_metrics(execution, content, own).items():
            values.setdefault(key, []).append(value)
    return values


def _line(name: str, found: object, expected: object) -> str:
    here, there = (json.dumps(value, ensure_ascii=False) for value in (found, expected))
    if found is None:
        return f"{name}: MLflow does not have it; expected {there}"
    return f"{name}: MLflow has {here}; expected {'nothing' if expected is None else there}"
