"""Compare two results honestly: what differs, and whether the difference is more than chance.

python -m commands.compare HEAD~1 workspace       git revisions; `workspace` is the current files
python -m commands.compare main slower            DVC experiments, by name
python -m commands.compare 0f3c…  9b1d…           MLflow runs, by id: train or evaluate
python -m commands.compare --md main slower       for a pull request; --json for a program

The predictions of A and B are paired by test image. The interval is Agresti and Min's (2005) for a difference of paired
proportions; the test is McNemar's exact test. Results that were not made with the code, params and data beside them are
refused. The exit code is 3 if B is worse, 1 if the two cannot be compared.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
WORSE = 3  # the exit code


@dataclass(frozen=True)
class Result:
    """One of the two results; `predictions` has a row per image, as evaluate writes them."""

    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    predictions: "pd.DataFrame"
    commit: str = ""  # short; "" for the workspace and for runs

    @property
    def heading(self) -> str:
        return heading(self.name, self.commit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("A", "B"):
        parser.add_argument(name, help="git revision, DVC experiment, workspace or MLflow run id")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--md", action="store_true", help="print Markdown")
    args = parser.parse_args()
    from dvc_mlflow.command import open_project

    with open_project() as project:
        a, b = read_result(project, args.A), read_result(project, args.B)
        comparison = compare(a, b)
        if args.json:
            print(json.dumps(comparison, indent=2, ensure_ascii=False))
        elif args.md:
            print(markdown(comparison, a, b))
        else:
            show(comparison, a, b)
    if comparison["verdict"] == "worse":
        sys.exit(WORSE)


def read_result(project: "Project", name: str) -> Result:
    """Read a result by git revision, DVC experiment, `workspace` or MLflow run id.

    Raises UserError if there is none, or if it was not made with the code, params and data beside it.
    """
    if re.fullmatch("[0-9a-f]{32}", name):
        return _read_run(name)
    from dvc_mlflow.status import changed
    from dvc_mlflow.text import UserError

    with at(project, name) as (there, commit):
        if found := list(changed(there)):
            raise UserError(
                f"expected results made with {name}'s own code, params and data, found others: {first_of(found)}; "
                "`dvc repro`, then commit dvc.lock"
            )
        return read_revision(there, name, commit)


def first_of(found: Sequence[str]) -> str:
    return f"{found[0]}, and {len(found) - 1} more" if len(found) > 1 else found[0]


@contextlib.contextmanager
def at(project: "Project", name: str) -> Iterator[tuple["Project", str]]:
    """The project in a git revision or DVC experiment, and the commit; `workspace` is as it is, without a commit.

    Raises UserError if there is no such revision.
    """
    from dvc.exceptions import DvcException
    from dvc.scm import resolve_rev
    from scmrepo.exceptions import SCMError

    from dvc_mlflow.text import UserError, one_line

    if name == "workspace":
        yield project, ""
        return
    try:
        rev = resolve_rev(project.repo.scm, name)
    except (DvcException, SCMError, NotImplementedError) as error:  # NotImplementedError: there is no git
        raise UserError(
            f"expected a git revision or a DVC experiment, found {one_line(name)}: {one_line(error)}; "
            "`git fetch origin` gets what this clone lacks, `dvc exp show` lists experiments"
        ) from None
    with project.repo.switch(rev):
        yield project.at_this_revision(), rev


def read_revision(there: "Project", name: str, commit: str) -> Result:
    """Read the result in the workspace or commit that DVC looks at. Raises UserError if there is none."""
    import dvc.api
    import pandas as pd

    from dvc_mlflow.execution import flatten
    from dvc_mlflow.text import UserError, one_line

    rev = commit or None
    try:
        data = read_file(PREDICTIONS, rev)
        predictions = pd.read_parquet(io.BytesIO(data))
        params, metrics = dvc.api.params_show(rev=rev), _read_metrics(there, rev)
    except Exception as error:  # of DVC, its remote or the file, of many kinds
        raise UserError(
            f"expected a result named {name}, found none: {one_line(str(error).partition(chr(10))[0]).rstrip('.')}; "
            "`make pull` gets what others pushed, `dvc exp show` lists experiments"
        ) from None
    digests = [one.outs.get(PREDICTIONS) for address in there.stages if (one := there.locked_alone(address))]
    if hashlib.md5(data).hexdigest() not in digests:  # DVC does not verify what it takes from its cache
        raise UserError(
            f"expected {name}'s {PREDICTIONS} as in dvc.lock, found other bytes; `dvc-mlflow audit` says where"
        )
    of_all = {key: value for key, value in metrics.items() if not isinstance(value, dict)}  # not per class
    return Result(short(name), flatten(params), of_all, predictions, short(commit))


def _read_metrics(there: "Project", rev: str | None) -> dict[str, Any]:
    """The content of all metrics files. DVC's metrics_show fails if the workspace, which nobody asked for, has none."""
    from dvc.utils.serialize import PARSERS

    metrics: dict[str, Any] = {}
    for path in there.metrics_files():
        metrics |= PARSERS[Path(path).suffix](read_file(path, rev).decode(), path)
    return metrics


def read_file(path: str, rev: str | None) -> bytes:
    """The bytes of a file of a commit, or of the workspace: from git, DVC's cache or the remote. Raises any error."""
    import dvc.api

    return dvc.api.read(path, rev=rev, mode="rb", config=remotes())


def remotes() -> dict[str, Any]:
    """The DVC remotes of the workspace, as a config: a commit may be older than the remote that has its results."""
    from dvc.config import Config

    config = Config.from_cwd()
    default = {"remote": config["core"]["remote"]} if "remote" in config["core"] else {}
    return {"core": default, "remote": config["remote"]}


def heading(name: str, commit: str) -> str:
    """A name with its commit, both short: `main (321e479)`."""
    return short(name) if short(commit) in ("", short(name)) else f"{short(name)} ({short(commit)})"


def short(name: str) -> str:
    """The first 7 digits of a commit's hash; other names as they are."""
    return name[:7] if re.fullmatch("[0-9a-f]{40}", name) else name


def _read_run(run_id: str) -> Result:
    import pandas as pd

    from dvc_mlflow.command import open_store
    from dvc_mlflow.text import UserError

    with open_store(f"expected a train or evaluate run, found {run_id}") as store:
        run = store.client.get_run(run_id)
        evaluation = run
        if run.data.tags.get("stage") == "train":
            children = store.search({"stage": "evaluate", "mlflow.parentRunId": run_id}, "FINISHED")
            if not children:
                raise UserError("it has no evaluation; `dvc repro` and `make sync` make one")
            evaluation = children[-1]  # the last one
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
    """The comparison of B with A. Raises UserError if the two were not tested on the same images and classes."""
    from scipy.stats import binomtest

    from dvc_mlflow.text import UserError

    labels = a.predictions["label"].to_numpy()
    classes, of_b = (list(one.predictions.columns[3:]) for one in (a, b))
    if classes != of_b:
        raise UserError(
            f"expected the same classes, found {_listed(classes, of_b)} in {a.name} and {_listed(of_b, classes)} in "
            f"{b.name}; compare results on the same test set"
        )
    if not a.predictions["label"].equals(b.predictions["label"]):
        raise UserError(
            f"expected predictions for the same test images, found {len(labels):,} in {a.name} and "
            f"{len(b.predictions):,} in {b.name}, with different labels; compare results on the same test set"
        )
    hits_a, hits_b = (one.predictions["predicted"].to_numpy() == labels for one in (a, b))
    only_a, only_b = int((hits_a & ~hits_b).sum()), int((hits_b & ~hits_a).sum())
    low, high = interval(only_a, only_b, len(labels))
    p = float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    found = verdict(only_a, only_b, p)
    moved = [
        {"class": name, "a": float(hits_a[labels == label].mean()), "b": float(hits_b[labels == label].mean())}
        for label, name in enumerate(classes)
        if (labels == label).any()
    ]
    moved.sort(key=lambda row: abs(row["b"] - row["a"]), reverse=True)
    return {
        "a": a.name,
        "b": b.name,
        "commits": {"a": a.commit, "b": b.commit},
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
        pair = f"{b} and {a} ({chance})"
        return f"There is no evidence of a difference between {pair}: the 95 % interval is within ±{most:.2%}."
    return f"{b} is {found} than {a}, by {abs(low + high) / 2:.2%} of the test images ({chance})."


def tables(comparison: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The title and rows of each table that has rows: a name, the value of A, that of B and, of numbers, the change."""
    found: list[tuple[str, list[tuple[str, ...]]]] = [
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
    return [(title, rows) for title, rows in found if rows]


def lines(comparison: Mapping[str, Any]) -> list[str]:
    """The interval and the test, a line each."""
    a, b, difference, test = (comparison[key] for key in ("a", "b", "accuracy_difference", "mcnemar"))
    return [
        f"accuracy, {b} less {a}: {difference['b_minus_a']:+.4f}, 95 % interval {difference['low']:+.4f} to "
        f"{difference['high']:+.4f}",
        f"of {test['images']:,} test images, only {b} has {test['only_b_right']:,} right, only {a} "
        f"{test['only_a_right']:,}: McNemar's exact test, p = {test['p']:.2g}",
    ]


def show(comparison: Mapping[str, Any], a: Result, b: Result) -> None:
    """Print the comparison as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for title, rows in tables(comparison):
        console.print(f"[bold]{title}[/bold]")
        table = Table()
        for name, justify in (("", "left"), (a.heading, "right"), (b.heading, "right"), ("change", "right")):
            if name != "change" or len(rows[0]) == 4:
                table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("\n".join(lines(comparison)), soft_wrap=True)
    console.print(f"\n[bold]{comparison['sentence']}[/bold]", soft_wrap=True)


def markdown(comparison: Mapping[str, Any], a: Result, b: Result, sentence: bool = True) -> str:
    """The comparison as Markdown, with or without its last sentence."""
    parts = [
        "\n".join([f"### {title}", "", markdown_table(("", a.heading, b.heading, "change")[: len(rows[0])], rows)])
        for title, rows in tables(comparison)
    ]
    parts.append("\n".join(f"- {line}" for line in lines(comparison)))
    parts += [f"**{comparison['sentence']}**"] if sentence else []
    return "\n\n".join(parts)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in (heads, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (escaped[0], ["---"] * len(heads), *escaped[1:]))


def _listed(ones: Sequence[str], others: Sequence[str]) -> str:
    """The classes that only the first has, or all if they are in another order."""
    return ", ".join([one for one in ones if one not in others] or ones) or "none"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _change(row: Mapping[str, float | None]) -> str:
    return f"{row['b'] - row['a']:+.4f}" if row["a"] is not None and row["b"] is not None else "-"


if __name__ == "__main__":
    main()
