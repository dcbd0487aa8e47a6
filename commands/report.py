"""Report what a change does to the results, in Markdown, as a pull request shows it.

python -m commands.report origin/main                    HEAD against the branch that it is to be merged into
python -m commands.report v1.0 slower                    any git revisions, DVC experiments, or `workspace`
python -m commands.report --output report origin/main    also as report/report.md, with the figures of both beside it

It prints which stages ran again and why, and the comparison of `python -m commands.compare`. If dvc.lock does not match
the code, params and data beside it, the first line says so, and that side's results are left out. Results may come
from DVC's remote. If an MLflow server is named, the rows are linked. The exit code is 3 if HEAD is worse, 1 if the two
cannot be compared.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from commands.compare import (
    WORSE,
    Result,
    at,
    compare,
    first_of,
    heading,
    markdown,
    markdown_table,
    read_file,
    read_revision,
    tables,
)

if TYPE_CHECKING:
    from dvc_mlflow.execution import Execution
    from dvc_mlflow.project import Project

MARK = "<!-- commands.report -->"  # by which .ci/comment finds the comment that it wrote before


@dataclass(frozen=True)
class Side:
    """BASE or HEAD. If there is no result, `problem` says why."""

    heading: str
    executions: "Mapping[str, Execution | None]"  # by stage
    result: Result | None
    problem: str
    stale: Sequence[str]  # where dvc.lock is not what the code, params and data beside it say
    figures: Mapping[str, bytes]  # by path
    lacking: Sequence[str]  # the figures that are neither here nor in the remote


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="git revision or DVC experiment to compare with")
    parser.add_argument("head", metavar="HEAD", nargs="?", default="HEAD", help="what changed (default: HEAD)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write report.md and the figures there")
    args = parser.parse_args()
    from dvc_mlflow.command import open_project
    from dvc_mlflow.text import UserError

    with open_project() as project:
        base, head = read_side(project, args.base), read_side(project, args.head)
        problems = [side.problem for side in (head, base) if side.problem]
        comparison = None
        if base.result and head.result:
            try:
                comparison = compare(base.result, head.result)
            except UserError as error:
                problems.append(str(error))
        parts = [f"**{problem}**" for problem in problems]
        if comparison and base.result and head.result:
            parts += [f"**{comparison['sentence']}**", *stages(base, head)]
            parts.append(markdown(comparison, base.result, head.result, sentence=False))
        else:
            parts += [*stages(base, head), *_metrics(base, head)]
        parts += [*rows(project, base, head), *_lacking(base, head)]
        if args.output:
            write_report(args.output, parts, base, head)
        print("\n\n".join([*parts, MARK]))
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))
    if comparison and comparison["verdict"] == "worse":
        sys.exit(WORSE)


def read_side(project: "Project", name: str) -> Side:
    """What a revision, an experiment or the workspace has. Raises UserError if there is none of that name."""
    from dvc_mlflow.status import changed
    from dvc_mlflow.text import UserError

    with at(project, name) as (there, commit):
        title = heading(name, commit)
        executions = {address: there.locked_alone(address) for address in there.stages}
        result, figures, lacking = None, {}, []
        if not any(executions.values()):
            problem = f"expected results in {title}, found none in dvc.lock; `dvc repro`, then commit dvc.lock"
            return Side(title, executions, None, problem, [], {}, [])
        if found := list(changed(there)):
            problem = f"dvc.lock of {title} is stale: {first_of(found)}; `dvc repro`, then commit dvc.lock"
            return Side(title, executions, None, problem, found, {}, [])
        problem = ""
        try:
            result = read_revision(there, name, commit)
        except UserError as error:
            problem = str(error)
        for path, digest in pictures(executions):
            try:
                data = read_file(path, commit or None)
            except Exception:  # of a cache or remote, of any kind
                data = b""
            if hashlib.md5(data).hexdigest() == digest:
                figures[path] = data
            else:
                lacking.append(path)
    return Side(title, executions, result, problem, [], figures, lacking)


def pictures(executions: "Mapping[str, Execution | None]") -> Iterator[tuple[str, str]]:
    """The path and hash of each PNG file among the stages' plots."""
    for execution in executions.values():
        for path in execution.declared.plots if execution else ():
            if execution and path.endswith(".png") and path in execution.outs:
                yield path, execution.outs[path]


def stages(base: Side, head: Side) -> Iterator[str]:
    """A table of the stages: which ran again, and why; if a side is stale, what changed since it ran."""
    if base.stale or head.stale:
        for side in (base, head):
            if side.stale:
                yield f"### changed in {side.heading} since it ran\n\n" + "\n".join(f"- {line}" for line in side.stale)
        return
    made = {path for side in (base, head) for one in side.executions.values() if one for path in one.outs}
    found = [
        (address, *_change(base.executions.get(address), head.executions.get(address), made))
        for address in {**base.executions, **head.executions}
    ]
    yield "### stages\n\n" + markdown_table(("stage", "", f"changed since {base.heading}"), found)


def _change(base: "Execution | None", head: "Execution | None", made: set[str]) -> tuple[str, str]:
    """Whether a stage ran again, and because of what."""
    from dvc_mlflow.execution import named_params

    if base is None or head is None:
        return ("new" if head else "removed" if base else "not run"), ""
    before, after = named_params(base), named_params(head)
    names = ["the command"] if base.cmd != head.cmd else []
    names += [f"`{key}`" for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    paths = [path for path in sorted({*base.deps, *head.deps}) if base.deps.get(path) != head.deps.get(path)]
    names += [f"`{path}`" for path in sorted(paths, key=lambda path: path in made)]  # code first
    if base.fingerprint == head.fingerprint:
        return ("unchanged", "") if base.outs == head.outs else ("different results from the same inputs", "")
    return "ran again" + (", same results" if base.outs == head.outs else ""), ", ".join(names)


def _metrics(base: Side, head: Side) -> Iterator[str]:
    """The metrics of the sides that have results, if the two cannot be compared."""
    a, b = (side.result.metrics if side.result else {} for side in (base, head))
    shown = {"params": {}, "metrics": {key: {"a": a.get(key), "b": b.get(key)} for key in {**a, **b}}, "classes": []}
    for title, found in tables(shown):
        yield f"### {title}\n\n" + markdown_table(("", base.heading, head.heading, "change"), found)


def rows(project: "Project", base: Side, head: Side) -> Iterator[str]:
    """Links to the rows of both sides in MLflow, if a server is named."""
    from dvc_mlflow.store import Store, describe, tracking_uri

    if not tracking_uri(project).startswith(("http:", "https:")):
        return
    try:
        store = Store(project, create=False)
        found = []
        for address in {**base.executions, **head.executions}:
            cells = [address]
            for side in (base, head):
                execution = side.executions.get(address)
                run = store.find_alone(execution) if execution else None
                cells.append(f"[{run.info.run_name}]({store.page(run)})" if run else "no row")
            found.append(cells)
    except Exception as error:  # the store's, of any kind
        yield f"No links to MLflow: {describe(error)}"
    else:
        yield "### MLflow\n\n" + markdown_table(("stage", base.heading, head.heading), found)


def _lacking(base: Side, head: Side) -> Iterator[str]:
    for side in (base, head):
        if side.lacking:
            yield f"Figures of {side.heading} that are neither here nor in the remote: {', '.join(side.lacking)}."


def write_report(folder: Path, parts: Sequence[str], base: Side, head: Side) -> None:
    """Write the figures, then report.md, which shows them side by side. Raises UserError if it cannot."""
    from dvc_mlflow.text import UserError
    from stages.stage import StageError, write

    sides, found = (("base", base), ("head", head)), []
    files = {f"{name}/{path}": data for name, side in sides for path, data in side.figures.items()}
    for path in {**base.figures, **head.figures}:
        places = (f"{name}/{path}" for name, _ in sides)
        found.append([path, *(f"![{path}]({place})" if place in files else "-" for place in places)])
    figures = [f"### figures\n\n{markdown_table(('', base.heading, head.heading), found)}"] if found else []
    files["report.md"] = "\n\n".join([*parts, *figures]).encode() + b"\n"
    try:
        for name, data in files.items():
            write(folder / name, data)
    except StageError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    main()
