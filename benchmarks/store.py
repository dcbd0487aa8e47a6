"""Fill an MLflow store with ten thousand runs: python -m benchmarks.store URI --runs 10000."""

import argparse
import uuid
from typing import Any

from mlflow.entities import RunStatus
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import insert, select

OTHER = ("dvc.fingerprint", "dvc.execution", "dvc.deps.", "dvc.outs.")  # tags that differ between runs
BATCH = 200  # runs in one transaction


def fill(uri: str, runs: int) -> None:
    """Add `runs` copies of the database's finished runs, of other executions, from years ago."""
    store = SqlAlchemyStore(uri, "mlartifacts")
    parts = (SqlParam, SqlTag, SqlLatestMetric, SqlMetric)
    with store.engine.connect() as connection:
        finished = SqlRun.__table__.c.status == RunStatus.to_string(RunStatus.FINISHED)
        models = [dict(row._mapping) for row in connection.execute(select(SqlRun.__table__).where(finished))]
        rows: dict[str, dict[Any, list[dict[str, Any]]]] = {}
        for model in models:
            of = {part: part.__table__.c.run_uuid == model["run_uuid"] for part in parts}
            rows[model["run_uuid"]] = {
                part: [dict(row._mapping) for row in connection.execute(select(part.__table__).where(of[part]))]
                for part in parts
            }
    for first in range(0, runs, BATCH):
        new: dict[Any, list[dict[str, Any]]] = {part: [] for part in (SqlRun, *parts)}
        ids: dict[str, str] = {}
        for number in range(first, min(first + BATCH, runs)):
            model = models[number % len(models)]
            run_id = ids[model["run_uuid"]] = uuid.uuid4().hex
            uri_of_artifacts = str(model["artifact_uri"]).replace(model["run_uuid"], run_id)
            times = {"start_time": number, "end_time": number + 1}
            new[SqlRun].append({**model, "run_uuid": run_id, "artifact_uri": uri_of_artifacts, **times})
            for part in parts:
                copies = [{**row, "run_uuid": run_id} for row in rows[model["run_uuid"]][part]]
                for row in copies if part is SqlTag else ():
                    if row["key"].startswith(OTHER):
                        row["value"] = uuid.uuid4().hex
                    if row["key"] == "mlflow.parentRunId":
                        row["value"] = ids.get(row["value"], row["value"])
                new[part] += copies
        with store.engine.begin() as connection:
            for part, values in new.items():
                connection.execute(insert(part.__table__), values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("uri")
    parser.add_argument("--runs", type=int, default=10_000)
    arguments = parser.parse_args()
    fill(arguments.uri, arguments.runs)
