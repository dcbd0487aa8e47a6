"""Compare two results honestly: what differs, and whether the difference is more than chance.

python -m commands.compare HEAD~1 workspace       git revisions; `workspace` is the current files
python -m commands.compare main slower            DVC experiments, by name
python -m commands.compare 0f3c…  9b1d…           MLflow runs, by id: train or evaluate
python -m commands.compare --md main slower       for a pull request; --json for a program

The predictions of A and B are paired by test image. The interval is Agresti and Min's (2005) for a difference of paired
proportions; the test is McNemar's exact test.
"""

import argparse
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from dvc_mlflow.project import Project

PREDICTIONS = "metrics/predictions.parquet"
SIGNIFICANCE = 0.05
Z = 1.959964  # of a 95 % interval
MOVED = 3  # classes to list


@dataclass(frozen=True)
class Result:
    """One of the two results; `predictions` has a row per image, as evaluate writes them."""

    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    predictions: "pd.DataFrame"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("A", "B"):
        parser.add_argument(name, help="git revision, DVC experiment, workspace or MLflow run id")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--md", action="store_true", help="print Markdown")
    args = parser.parse_args()
    a, b = read_result(args.A), read_result(args.B)
    comparison = compare(a, b)
    if args.json:
        print(json.dumps(comparison, indent=2, ensure_ascii=False))
    else:
        show(comparison, a.name, b.name, markdown=args.md)


def read_result(name: str) -> Result:
    """Read a result by git revision, DVC experiment, `workspace` or MLflow run id. Exits if there is none."""
    return _read_run(name) if re.fullmatch("[0-9a-f]{32}", name) else _read_revision(name)


def _read_revision(name: str) -> Result:
    import dvc.api
    import pandas as pd
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    from dvc_mlflow.execution import flatten
    from dvc_mlflow.project import Project
    from dvc_mlflow.text import UserError

    rev = None if name == "workspace" else name
    try:
        predictions = pd.read_parquet(io.BytesIO(dvc.api.read(PREDICTIONS, rev=rev, mode="rb")))
        params, metrics = dvc.api.params_show(rev=rev), dvc.api.metrics_show(rev=rev)
        project = Project(Path.cwd())
        with project.repo.switch(name):
            stale = _not_run(project.at_this_revision(), params)
    except (DvcException, SCMError, OSError, UserError, ValueError) as error:  # ValueError: not Parquet
        reason = str(error).splitlines()[0]
        sys.exit(f"error: expected a result named {name}, found none: {reason}; `dvc exp show` lists them")
    if stale:
        sys.exit(f"error: expected up-to-date results in {name}, found none for {stale}; `dvc repro` first")
    of_all = {key: value for key, value in metrics.items() if not isinstance(value, dict)}  # not per class
    return Result(name, flatten(params), of_all, predictions)


def _not_run(project: "Project", params: Mapping[str, Any]) -> str | None:
    """The first param, or stage input, that the results were not made with; None if there is none."""
    from dvc_mlflow.project import lookup

    executions = [found for address in project.stages if (found := project.locked_alone(address))]
    outs = {path: md5 for execution in executions for path, md5 in execution.outs.items()}
    for execution in executions:
        for key, value in execution.params.get("params.yaml", {}).items():
            if lookup(params, key) != value:
                return f"params.yaml's {key}"
        for path, md5 in execution.deps.items():
            if outs.get(path, md5) != md5:
                return f"the new {path}"
    return None


def _read_run(run_id: str) -> Result:
    import pandas as pd

    from dvc_mlflow.command import open_store

    with open_store(f"expected a train or evaluate run, found {run_id}") as store:
        run = store.client.get_run(run_id)
        evaluation = run
        if run.data.tags.get("stage") == "train":
            children = store.search({"stage": "evaluate", "mlflow.parentRunId": run_id}, "FINISHED")
            if not children:
                sys.exit(
                    f"error: expected an evaluation of run {run_id}, found none; `dvc repro` and `make sync` make it"
                )
            evaluation = children[0]
        with tempfile.TemporaryDirectory() as folder:
            path = store.client.download_artifacts(evaluation.info.run_id, PREDICTIONS, folder)
            predictions = pd.read_parquet(path)
    params = {key: _value(value) for key, value in evaluation.data.params.items()}
    metrics = {key: value for key, value in evaluation.data.metrics.items() if key.startswith("test_")}
    return Result(run.info.run_name or run_id, params, metrics, predictions)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def compare(a: Result, b: Result) -> dict[str, Any]:
    """The comparison of B with A. Exits if the two were not tested on the same images."""
    from scipy.stats import binomtest

    labels = a.predictions["label"].to_numpy()
    if not a.predictions["label"].equals(b.predictions["label"]):
        sys.exit(
            f"error: expected predictions for the same test images, found {len(labels):,} in {a.name} and "
            f"{len(b.predictions):,} in {b.name}, with different labels; compare results on the same test set"
        )
    hits_a, hits_b = (one.predictions["predicted"].to_numpy() == labels for one in (a, b))
    only_a, only_b = int((hits_a & ~hits_b).sum()), int((hits_b & ~hits_a).sum())
    low, high = interval(only_a, only_b, len(labels))
    p = float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    found = verdict(only_a, only_b, p)
    classes = list(a.predictions.columns[3:])
    moved = [
        {"class": name, "a": float(hits_a[labels == label].mean()), "b": float(hits_b[labels == label].mean())}
        for label, name in enumerate(classes)
        if (labels == label).any()
    ]
    moved.sort(key=lambda row: abs(row["b"] - row["a"]), reverse=True)
    return {
        "a": a.name,
        "b": b.name,
        "verdict": found,
        "sentence": sentence(a.name, b.name, found, p, low, high),
        "params": {
            key: {"a": a.params.get(key), "b": b.params.get(key)}
            for key in sorted(a.params.keys() | b.params.keys())
            if a.params.get(key) != b.params.get(key)
        },
        "metrics": {
            key: {"a": a.metrics.get(key), "b": b.metrics.get(key)} for key in {**a.metrics, **b.metrics}
        },
        "accuracy_difference": {"b_minus_a": (only_b - only_a) / len(labels), "low": low, "high": high},
        "mcnemar": {"only_a_right": only_a, "only_b_right": only_b, "images": len(labels), "p": p},
        "classes": moved,
    }  # fmt: skip


def interval(only_a: int, only_b: int, images: int) -> tuple[float, float]:
    """95 % interval of accuracy B minus accuracy A, from the images that only one of them gets right.

    Source: Agresti and Min 2005, https://doi.org/10.1002/sim.1781 (half an image is added to each of the four counts).
    """
    n, b, c = images + 2, only_b + 0.5, only_a + 0.5
    difference = (b - c) / n
    error = Z * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return difference - error, difference + error


def verdict(only_a: int, only_b: int, p: float) -> str:
    if p >= SIGNIFICANCE:
        return "no evidence of a difference"
    return "better" if only_b > only_a else "worse"


def sentence(a: str, b: str, found: str, p: float, low: float, high: float) -> str:
    chance = f"p {'< 0.0001' if p < 0.0001 else f'= {p:.4f}'}"
    if found == "no evidence of a difference":
        most = max(abs(low), abs(high))
        return f"There is no evidence of a difference between {b} and {a} ({chance}): it is at most {most:.2%}."
    return f"{b} is {found} than {a}, by {abs(low + high) / 2:.2%} of the test images ({chance})."


def show(comparison: Mapping[str, Any], a: str, b: str, markdown: bool) -> None:
    """Print the comparison as tables."""
    difference, test = comparison["accuracy_difference"], comparison["mcnemar"]
    tables: list[tuple[str, list[tuple[str, ...]]]] = [
        ("params that differ", [(key, _text(row["a"]), _text(row["b"])) for key, row in comparison["params"].items()]),
        (
            "metrics",
            [(key, _number(row["a"]), _number(row["b"]), _change(row)) for key, row in comparison["metrics"].items()],
        ),
        (
            "classes that moved most, by test accuracy",
            [
                (row["class"], _number(row["a"]), _number(row["b"]), _change(row))
                for row in comparison["classes"][:MOVED]
                if row["a"] != row["b"]
            ],
        ),
    ]
    lines = [
        f"accuracy, {b} less {a}: {difference['b_minus_a']:+.4f}, 95 % interval {difference['low']:+.4f} to "
        f"{difference['high']:+.4f}",
        f"of {test['images']:,} test images, only {b} has {test['only_b_right']:,} right, only {a} "
        f"{test['only_a_right']:,}: McNemar's exact test, p = {test['p']:.2g}",
    ]
    if markdown:
        print("\n\n".join([_markdown(title, rows, a, b) for title, rows in tables if rows]))
        print("\n" + "\n".join(f"- {line}" for line in lines) + f"\n\n**{comparison['sentence']}**")
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for title, rows in tables:
        if rows:
            console.print(f"[bold]{title}[/bold]")
            table = Table()
            for name, justify in (("", "left"), (a, "right"), (b, "right"), ("change", "right")):
                if name != "change" or len(rows[0]) == 4:
                    table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
            for row in rows:
                table.add_row(*row)
            console.print(table)
    console.print("\n".join(lines), soft_wrap=True)
    console.print(f"\n[bold]{comparison['sentence']}[/bold]", soft_wrap=True)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _change(row: Mapping[str, float | None]) -> str:
    return f"{row['b'] - row['a']:+.4f}" if row["a"] is not None and row["b"] is not None else "-"


def _markdown(title: str, rows: list[tuple[str, ...]], a: str, b: str) -> str:
    heads = ["", a, b, "change"][: len(rows[0])]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
    return "\n".join([f"### {title}", "", *lines])


if __name__ == "__main__":
    main()
