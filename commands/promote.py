"""Register a model in MLflow and give it the alias that users load, unless it is worse than the one that has it.

python -m commands.promote                  the model of dvc.lock
python -m commands.promote RUN_ID           the model of a train run
python -m commands.promote --force RUN_ID   without a comparison: to go back, for example

The model is registered as `fashion-mnist-lenet`; `models:/fashion-mnist-lenet@champion` loads the last promoted one.
Nothing else moves that alias. Models are compared as by `python -m commands.compare`. Identical weights are one
version, whose tags say who promoted it and when, what it replaced, and the verdict. The exit code is 3 if the model
is worse.
"""

import argparse
import getpass
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from commands.compare import WORSE, compare, read_result

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

    from dvc_mlflow.store import Store

NAME = "fashion-mnist-lenet"
ALIAS = "champion"
MODEL = "models/lenet.safetensors"
WEIGHTS = f"dvc.outs.{MODEL}"  # the tag, of runs and of versions, with the hash of the weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN_ID", help="a train run (default: the one of dvc.lock)")
    parser.add_argument("--force", action="store_true", help="promote it without a comparison")
    args = parser.parse_args()
    from dvc_mlflow.command import open_store

    with open_store() as store:
        promote(store, find_run(store, args.run), args.force)


def find_run(store: "Store", run_id: str | None) -> "Run":
    """The train run of this id, or of dvc.lock if this clone has its model. Raises UserError."""
    from dvc_mlflow.status import changed, digest_of
    from dvc_mlflow.store import MlflowException
    from dvc_mlflow.text import UserError

    if run_id:
        try:
            run = store.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"expected the id of a run, found {run_id}; `make ui` shows the runs") from None
        if run.data.tags.get("stage") != "train":
            raise UserError(f"expected a train run, found {run.info.run_name}; `make ui` shows the runs")
        return run
    if stale := next(changed(store.project), None):
        raise UserError(f"expected dvc.lock to match code, params and data, found {stale}; `dvc repro`, or name a run")
    execution = store.project.locked("train")
    if execution and digest_of(store.project, MODEL, execution.outs[MODEL]) != execution.outs[MODEL]:
        raise UserError(f"expected {MODEL} as in dvc.lock, found none; `dvc pull` gets it, or name a run")
    found = store.find(execution) if execution else None
    if found is None:
        raise UserError("expected MLflow to have the train run of dvc.lock, found none; `make sync` records it")
    return found


def promote(store: "Store", run: "Run", force: bool) -> None:
    """Register the run's model if needed, and move the alias to it. Exits if it is worse."""
    from dvc_mlflow.store import MlflowException
    from dvc_mlflow.text import UserError, valid_value

    client, champion = store.client, None
    # A server with authentication forbids to ask for the alias of a model that is not there.
    if client.search_registered_models(f"name = '{NAME}'"):
        try:
            champion = client.get_model_version_by_alias(NAME, ALIAS)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such alias
                raise
    digest, model_id = run.data.tags.get(WEIGHTS), store.model_id(run)
    if digest is None or model_id is None:
        raise UserError(f"expected {run.info.run_name} to have a model, found none; `make sync` completes it")
    if champion and weights(store, champion) == digest:
        print(f"{run.info.run_name} is the {ALIAS} already: {NAME} version {champion.version}")
        return
    verdict = "not compared: there was no other" if champion is None else "not compared: --force"
    if champion and not force:
        if not champion.run_id:
            raise UserError(
                f"expected version {champion.version}, the {ALIAS}, to name the run that made it, found none; "
                "--force promotes without a comparison"
            )
        try:
            comparison = compare(
                read_result(store.project, champion.run_id), read_result(store.project, run.info.run_id)
            )
        except UserError as error:
            raise UserError(f"{error}; --force promotes without a comparison") from None
        verdict = comparison["sentence"]
        print(verdict)
        if comparison["verdict"] == "worse":
            line = f"error: not promoted; version {champion.version} stays the {ALIAS}. --force promotes it anyway"
            print(line, file=sys.stderr)
            sys.exit(WORSE)
    try:
        client.create_registered_model(
            NAME, description="LeNet on Fashion-MNIST. `python -m commands.promote` moves its alias."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    registered = sorted(client.search_model_versions(f"name = '{NAME}'"), key=lambda one: int(one.version))
    version = next((one for one in registered if weights(store, one) == digest), None)
    if version is None:
        version = client.create_model_version(NAME, f"models:/{model_id}", run.info.run_id, model_id=model_id)
    tags = {
        WEIGHTS: digest,
        "promoted.by": store.project.author() or getpass.getuser(),
        "promoted.at": datetime.now(UTC).isoformat(timespec="seconds"),
        "promoted.instead_of": f"version {champion.version}, run {champion.run_id}" if champion else "none",
        "promoted.verdict": verdict,
    }
    for key, value in tags.items():  # before the alias: a champion always has them
        client.set_model_version_tag(NAME, version.version, key, valid_value(value))
    client.set_registered_model_alias(NAME, ALIAS, version.version)
    print(f"{run.info.run_name}: {NAME} version {version.version} is the {ALIAS} now; load models:/{NAME}@{ALIAS}")


def weights(store: "Store", version: "ModelVersion") -> str | None:
    """The hash of a version's weights; None if its run is gone."""
    from dvc_mlflow.store import MlflowException

    if WEIGHTS in version.tags or not version.run_id:
        return version.tags.get(WEIGHTS)
    try:
        return store.client.get_run(version.run_id).data.tags.get(WEIGHTS)
    except MlflowException:
        return None


if __name__ == "__main__":
    main()
