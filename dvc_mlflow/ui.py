"""The MLflow UI of the store, opened in a view for comparing runs."""

import base64
import json
import os
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import mlflow
from mlflow.entities import Run

from dvc_mlflow.execution import Execution, MissingBytes, content_of, metric_keys
from dvc_mlflow.project import Unprovable
from dvc_mlflow.store import PARENT, Store, parent_metrics
from dvc_mlflow.text import VALUE_LENGTH, valid_name

VIEW = "dvc-mlflow"  # the key of the saved view
NOT_CHILDREN = f"tags.`{PARENT}` IS NULL"
MOST_COLUMNS = 20  # for metrics, and for params
HIGHER = r"accuracy|acc$|auc|auroc|f1|f_score|precision|recall|r2|map\d*$|bleu|rouge|iou|dice|score|reward|correct"
LOWER = r"loss|error|err$|mse|mae|mape|perplexity|ppl|ece|wer|cer|rmse|nll|brier|distance"


# Open an address in the browser as soon as something listens on the port.
OPEN = """
import socket, sys, time, webbrowser
for _ in range(300):
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[2])), 1).close()
    except OSError:
        time.sleep(0.1)
    else:
        webbrowser.open(sys.argv[1])
        break
"""


def ui(store: Store, port: int) -> None:
    """Print the addresses of a table and of charts of the runs; unless a server serves them already, serve them here.

    On a desktop, opens the table in the browser. Does not return if it serves.
    """
    uri = mlflow.get_tracking_uri()
    save_view(store)
    base = store.server or f"http://127.0.0.1:{port}"
    query = f"viewStateShareKey={VIEW}&workflowType=machine_learning"
    table = f"{base}/#/experiments/{store.experiment_id}/runs?{query}"
    print(f"table   {table}\ncharts  {table}&compareRunsMode=CHART", flush=True)
    if store.server:
        return
    if sys.stdout.isatty() and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        subprocess.Popen([sys.executable, "-c", OPEN, table, str(port)], stdout=subprocess.DEVNULL)
    # One worker and no job processes, which only GenAI uses: a sixth of the memory, half of the wait.
    # The URI may contain a password, which a command line would show to all users.
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri}
    env.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execve(sys.executable, command, env)


def save_view(store: Store) -> None:
    """Store the view as a tag of the experiment, where MLflow's UI keeps its saved views."""
    now = int(time.time() * 1000)
    for most in (MOST_COLUMNS, MOST_COLUMNS // 2, MOST_COLUMNS // 4):
        state = json.dumps(view(store, most), separators=(",", ":"))
        packed = "deflate;" + base64.b64encode(zlib.compress(state.encode(), 9)).decode()
        value = json.dumps({"name": "dvc-mlflow", "createdAt": now, "updatedAt": now, "state": packed})
        if len(value) <= VALUE_LENGTH:  # fewer columns if their names are very long
            break
    store.client.set_experiment_tag(store.experiment_id, f"mlflow.sharedViewState.{VIEW}", value)


def view(store: Store, most: int) -> dict[str, Any]:
    """The state of MLflow's table of runs: at most `most` metrics and `most` params, the best run first if known."""
    runs = store.client.search_runs(
        [store.experiment_id], f"{NOT_CHILDREN} and attributes.status = 'FINISHED'", max_results=1000
    )
    metrics, best = columns(store, runs)
    shown = [f"metrics.`{name}`" for name in metrics[:most]]
    shown += [f"params.`{name}`" for name in varying(runs)[:most]]
    order = {"orderByKey": f"metrics.`{best[0]}`", "orderByAsc": best[1]} if best else {}
    return {"searchFilter": NOT_CHILDREN, **order, "selectedColumns": shown, "columnOrder": shown}


def columns(store: Store, runs: Sequence[Run]) -> tuple[list[str], tuple[str, bool] | None]:
    """The metrics that dvc.yaml declares, as rows show them, and the one to sort by, with True if lower is better.

    If their bytes are unavailable, those that the rows have.
    """
    project = store.project
    names: dict[str, int] = {}  # by metric: 0 if its stage reads a model, else 1
    said: tuple[str, bool] | None = None
    for address, stage in project.stages.items():
        try:
            execution = project.locked(address)
            if execution is None:
                continue
            found = _shown(store, execution)
        except (MissingBytes, Unprovable):
            continue
        child = execution.maker_of_model() is not None
        names |= dict.fromkeys(found, 0 if child else 1)
        meta = stage.meta if isinstance(stage.meta, Mapping) else {}
        for key, ascending in (("maximize", False), ("minimize", True)):
            for name in (name for name, one in found.items() if one == str(meta.get(key))):
                said = name, ascending
    if not names:
        names = dict.fromkeys(sorted({key for run in runs for key in run.data.metrics if "." not in key}), 0)
    best = said or _by_name(names)
    order = {name: place for place, name in enumerate(names)}
    ordered = sorted(names, key=lambda name: (best is None or name != best[0], "." in name, names[name], order[name]))
    return ordered, best


def _shown(store: Store, execution: Execution) -> dict[str, str]:
    """The metrics of an execution that a table row shows: the key in the file, by the name in the row."""
    keys = metric_keys(execution, store.project)
    maker = execution.maker_of_model()
    if maker is None:
        return keys
    content = content_of(maker, store.project)
    own = {*content.metrics, *content.curves}
    shown = parent_metrics(execution, content_of(execution, store.project), own)
    return {
        one: key
        for name, key in keys.items()
        for one in (name, valid_name(f"{execution.declared.prefix or execution.stage}.{name}"))
        if one in shown
    }


def _by_name(names: Mapping[str, int]) -> tuple[str, bool] | None:
    """The metric to sort by, chosen by its name, test metrics before training metrics; None if no name fits."""
    found = []
    for name, of_training in names.items():
        for rank, (pattern, ascending) in enumerate(((HIGHER, False), (LOWER, True))):
            if re.search(pattern, name.lower()):
                part = 0 if "test" in name.lower() else 1 if "val" in name.lower() else 2
                found.append((of_training, part, rank, list(names).index(name), name, ascending))
                break
    return min(found)[4:] if found else None


def varying(runs: Sequence[Run]) -> list[str]:
    """The params whose values differ between the runs that have them, sorted."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.data.params.items():
            values.setdefault(key, set()).add(value)
    return sorted(key for key, found in values.items() if len(found) > 1)
