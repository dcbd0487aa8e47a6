"""What a sweep found: tables, importances and figures, here and as an MLflow run."""

import io
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.compare import markdown_table
from commands.trials import Baseline

if TYPE_CHECKING:
    from optuna import Study

    from dvc_mlflow.store import Store

SHOWN = 10  # rows of the table
RESULT = "sweep.result"  # the tag of the run that shows a sweep: its name and commit


def importances(study: "Study") -> dict[str, float]:
    """How much of the difference between trials each param makes, 0..1; {} if there are too few trials to say."""
    from optuna.importance import get_param_importances
    from optuna.trial import TrialState

    if len({trial.value for trial in study.get_trials(states=[TrialState.COMPLETE])}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "too small to compute importances"
        try:
            return get_param_importances(study)
        except (UserWarning, ValueError, RuntimeError):
            return {}


def draw(study: "Study", metric: str, folder: Path) -> list[Path]:
    """Write the optimisation history and the parallel coordinates as PNG; return their paths."""
    from optuna.trial import TrialState

    if not study.get_trials(states=[TrialState.COMPLETE]):
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization.matplotlib import plot_optimization_history, plot_parallel_coordinate

    paths = []
    for name, plot in (("history", plot_optimization_history), ("parallel", plot_parallel_coordinate)):
        figure = plot(study, target_name=metric).get_figure(root=True)
        assert figure
        figure.set_size_inches(9, 4.5)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


def show(result: Mapping[str, Any], markdown: bool) -> str:
    """The best trials, the importances, why trials failed, and how to apply the best."""
    key = result["metric"].rpartition(":")[2]
    sign = -1 if result["direction"] == "maximize" else 1
    budgets = list(dict.fromkeys(row.get("budget") for row in result["trials"]))
    succeeded = [row for row in result["trials"] if row["value"] is not None]
    ranked = sorted(succeeded, key=lambda row: (-budgets.index(row.get("budget")), sign * row["value"]))
    params = list(dict.fromkeys(param for row in ranked for param in row["params"]))
    table = [
        (row["experiment"], _number(row["value"]), *(_number(row["params"][param]) for param in params))
        for row in ranked[:SHOWN]
    ]
    parts = [_table(["experiment", key, *params], table, markdown)] if table else []
    if len(ranked) > SHOWN:
        parts.append(f"… and {len(ranked) - SHOWN} more: --json has them all")
    if result["importances"]:
        listed = [(param, f"{value:.2f}") for param, value in result["importances"].items()]
        parts.append(_table(["param", "importance"], listed, markdown))
    failed = [f"{row['experiment']} failed: {row['reason']}" for row in result["trials"] if "reason" in row]
    if failed:
        parts.append("\n".join(f"- {line}" if markdown else line for line in failed))
    if result["figures"]:
        parts.append("Figures: " + ", ".join(result["figures"]))
    if result["best"]:
        command = f"dvc exp apply {result['best']}"
        parts.append(f"Apply the best: `{command}`" if markdown else f"Apply the best: {command}")
    return "\n\n".join(parts)


def _table(heads: list[str], rows: Sequence[tuple[str, ...]], markdown: bool) -> str:
    if markdown:
        return markdown_table(heads, rows)
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=None if sys.stdout.isatty() else 120)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def publish(store: "Store", baseline: Baseline, result: Mapping[str, Any]) -> None:
    """Show the result as a run in MLflow: one for a sweep of a commit, which each call brings up to date.

    Raises any error of the store.
    """
    client, identity = store.client, f"{result['name']} {baseline.rev}"
    runs = store.search({RESULT: identity})
    tags = {RESULT: identity, "sweep": result["name"], "mlflow.source.git.commit": baseline.rev}
    created = runs or [client.create_run(store.experiment_id, tags=tags, run_name=f"sweep {result['name']}")]
    run_id = created[0].info.run_id
    client.set_tag(run_id, "mlflow.note.content", show(result, markdown=True))
    client.set_tag(run_id, "sweep.best", result["best"] or "none")
    values = {row["experiment"]: row["value"] for row in result["trials"]}
    if result["best"]:
        client.log_metric(run_id, result["metric"].rpartition(":")[2], values[result["best"]])
    for param, value in result["importances"].items():
        client.log_metric(run_id, f"importance.{param}", value)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "result.json").write_text(json.dumps(result, indent=2, ensure_ascii=False))
        (Path(scratch) / "result.md").write_text(show(result, markdown=True) + "\n")
        for figure in result["figures"]:
            (Path(scratch) / Path(figure).name).write_bytes((baseline.folder / figure).read_bytes())
        client.log_artifacts(run_id, scratch)
    client.set_terminated(run_id, "FINISHED")
