"""Compare params.yaml, dvc.yaml, dvc.lock, the files and MLflow; list each disagreement in one line.

Exits with 1 where there is any. `dvc repro` and `make sync` bring them to agree.

    python -m commands.audit
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.params import read_params, read_values
from stages.pipeline import Pipeline, Record, flatten, lookup
from stages.stage import StageError, cache_path, is_damaged, remove

if TYPE_CHECKING:
    from mlflow.entities import Run

    from stages.store import Store


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from stages.store import Store, describe, quiet

    quiet()
    try:
        read_params()
        store = Store(Path.cwd())
        found = [*audit_files(store.pipeline), *audit_store(store)]
    except StageError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # the store's, of any kind
        sys.exit(f"error: {describe(error)}")
    for line in found:
        print(line)
    if found:
        sys.exit(1)
    print("params.yaml, dvc.yaml, dvc.lock, the files and MLflow agree")


def audit_files(pipeline: Pipeline) -> Iterator[str]:
    """Yield where params.yaml, dvc.yaml or the files are not as dvc.lock says."""
    values = read_values()
    for stage in pipeline.in_order():
        record = pipeline.locked(stage)
        if record is None:
            yield f"{stage}: dvc.yaml has it, dvc.lock does not"
            continue
        if record.cmd != pipeline.cmd(stage):
            yield f"{stage}: dvc.yaml has another command than dvc.lock"
        yield from differences(
            "params.yaml",
            "dvc.lock",
            flatten({key: lookup(values, key) for key in record.params}),
            flatten(record.params),
        )
        yield from differences("dvc.yaml", "dvc.lock", dict.fromkeys(pipeline.deps(stage)), dict.fromkeys(record.deps))
        yield from differences("dvc.yaml", "dvc.lock", dict.fromkeys(pipeline.outs(stage)), dict.fromkeys(record.outs))
        files = {**record.deps, **record.outs}
        found = pipeline.hash(files)
        for path, digest in files.items():
            if found[path] != digest:
                yield f"{path}: dvc.lock ({stage}) has MD5 {digest}, the file {found[path] or 'is missing'}"
        # DVC does not read what it takes from its cache, and says nothing of this.
        for path, digest in record.outs.items():
            if is_damaged(cached := cache_path(digest)):
                whole = found[path] == digest
                cure = f"`{remove(cached)}`" if whole else f"`{remove(Path(path), cached)}`, then `dvc repro`"
                yield f"{path}: DVC's copy is damaged; {cure}"


def audit_store(store: "Store") -> Iterator[str]:
    """Yield where MLflow has not the record of what dvc.lock says, or another content."""
    for stage in store.stages():
        record = store.pipeline.locked(stage)
        if record is None:
            continue
        run = store.find(record)
        if run is None:
            yield f"{stage}: MLflow has no finished run of what dvc.lock records"
            continue
        yield from (f"{stage}: run {run.info.run_id}: {line}" for line in audit_run(store, record, run))
    for run in store.dead():
        yield f"{run.data.tags['stage']}: run {run.info.run_id}: MLflow has it RUNNING, its process is gone"


def audit_run(store: "Store", record: Record, run: "Run") -> Iterator[str]:
    """Yield where the content of a run differs from dvc.lock or from the files."""
    from stages.store import HEADLINE, artifact_path, one, param_values

    # The stages before this one may have run again since, to the same bytes: their params are as they were then.
    upstream = flatten(record.upstream_params)
    shown, expected = (
        {key: value for key, value in params.items() if key not in upstream}
        for params in (run.data.params, param_values(record))
    )
    yield from differences("MLflow", "dvc.lock", shown, expected)
    datasets = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs} if run.inputs else {}
    yield from differences("MLflow", "dvc.lock", datasets, store.datasets(record))
    parent = store.parent(record)
    if parent and run.data.tags.get("mlflow.parentRunId") != parent.info.run_id:
        yield f"its parent is not {parent.info.run_id}, the run that made its model"
    if store.pipeline.missing_outs(record.stage):
        return  # what the files say is not what dvc.lock records
    folder = store.pipeline.folder
    if record.stage == "train":
        with (folder / one(record.outs, "history.csv")).open(newline="") as file:
            rows = list(csv.DictReader(file))
        for key in rows[0].keys() - {"epoch"}:
            history = store.client.get_metric_history(run.info.run_id, key)
            points = {f"{key} of epoch {point.step}": point.value for point in history}
            curve = {f"{key} of epoch {row['epoch']}": float(row[key]) for row in rows}
            yield from differences("MLflow", "history.csv", points, curve)
        path = one(record.outs, ".safetensors")
        yield from differences("MLflow's model", "dvc.lock", {path: store.model_md5(run)}, {path: record.outs[path]})
    if record.stage == "evaluate":
        metrics = store.evaluation(record)
        yield from differences("MLflow", "the metrics files", run.data.metrics, metrics)
        if parent:
            # The train run shows the evaluation that came last. With another batch size, which is another run of
            # evaluate, the last bits of the same model's loss may differ, and dvc.lock may be of either.
            children = store.search({"stage": "evaluate", "mlflow.parentRunId": parent.info.run_id}, "FINISHED")
            evaluations = [{key: child.data.metrics.get(key) for key in HEADLINE} for child in children]
            headline = {key: parent.data.metrics.get(key) for key in HEADLINE}
            if headline not in evaluations:
                scores = {key: metrics[key] for key in HEADLINE}
                yield from differences("MLflow's train run", "the metrics files", headline, scores)
    for path in record.outs:
        artifact = artifact_path(path)
        if artifact and store.artifact_md5(run, artifact) != record.outs[path]:
            yield f"{path}: MLflow's artifact is not the file of dvc.lock"


def differences(one: str, other: str, ones: dict[str, Any], others: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each key that is in but one of two mappings, or has two values."""
    for key in sorted(ones.keys() | others.keys()):
        if key not in others:
            yield f"{key}: {one} has it, {other} does not"
        elif key not in ones:
            yield f"{key}: {other} has it, {one} does not"
        elif ones[key] != others[key]:
            yield f"{key}: {one} has {json.dumps(ones[key])}, {other} {json.dumps(others[key])}"


if __name__ == "__main__":
    main()
