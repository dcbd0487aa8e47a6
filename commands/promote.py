"""Register a model in MLflow and give it the alias that users load, unless it is worse than the one that has it.

python -m commands.promote                  the model of dvc.lock
python -m commands.promote RUN_ID           the model of a train run
python -m commands.promote --force RUN_ID   without a comparison: to go back, for example

The model is registered as `fashion-mnist-lenet`; `models:/fashion-mnist-lenet@champion` loads the last promoted one.
Nothing else moves that alias. Models are compared as by `python -m commands.compare`.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from commands.compare import compare, read_result

if TYPE_CHECKING:
    from mlflow.entities import Run

    from dvc_mlflow.store import Store

NAME = "fashion-mnist-lenet"
ALIAS = "champion"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN_ID", help="a train run (default: the one of dvc.lock)")
    parser.add_argument("--force", action="store_true", help="promote it without a comparison")
    args = parser.parse_args()
    from dvc_mlflow.command import open_store

    with open_store() as store:
        promote(store, find_run(store, args.run), args.force)


def find_run(store: "Store", run_id: str | None) -> "Run":
    if run_id is None:
        execution = store.project.locked("train")
        run = store.find(execution) if execution else None
        if run is None:
            sys.exit("error: expected MLflow to have the train run of dvc.lock, found none; `make sync` records it")
        return run
    run = store.client.get_run(run_id)
    if run.data.tags.get("stage") != "train":
        sys.exit(f"error: expected a train run, found {run.info.run_name}; `make ui` shows the runs")
    return run


def promote(store: "Store", run: "Run", force: bool) -> None:
    """Register the run's model if needed, and move the alias to it. Exits if it is worse."""
    from dvc_mlflow.store import MlflowException

    client = store.client
    try:
        champion = client.get_model_version_by_alias(NAME, ALIAS)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
            raise
        champion = None
    if champion and champion.run_id == run.info.run_id:
        print(f"{run.info.run_name} is the {ALIAS} already: {NAME} version {champion.version}")
        return
    if champion and champion.run_id and not force:
        comparison = compare(read_result(store.project, champion.run_id), read_result(store.project, run.info.run_id))
        print(comparison["sentence"])
        if comparison["verdict"] == "worse":
            sys.exit(f"error: not promoted; version {champion.version} stays the {ALIAS}. --force promotes it anyway")
    try:
        client.create_registered_model(
            NAME, description="LeNet on Fashion-MNIST. `python -m commands.promote` moves its alias."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = [v for v in client.search_model_versions(f"name = '{NAME}'") if v.run_id == run.info.run_id]
    if not versions:
        model_id = store.model_id(run)
        if model_id is None:
            sys.exit(f"error: expected {run.info.run_name} to have a model, found none; `make sync` completes it")
        versions = [client.create_model_version(NAME, f"models:/{model_id}", run.info.run_id, model_id=model_id)]
    client.set_registered_model_alias(NAME, ALIAS, versions[0].version)
    print(f"{run.info.run_name}: {NAME} version {versions[0].version} is the {ALIAS} now; load models:/{NAME}@{ALIAS}")


if __name__ == "__main__":
    main()
