"""An execution of a stage, as dvc.lock records it, and its content: what MLflow shows of it.

The content is a function of the execution, the declarations in dvc.yaml and the bytes of the outs. `sync` writes it,
`audit` compares it, and a live record is the same content, only earlier.
"""

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from dvc_mlflow.text import valid_name, valid_value

SMALL_BYTES = 1_000_000  # outs of at most this size are artifacts
TABLES = (".csv", ".tsv", ".json", ".yaml", ".yml")  # files with curves
SMALL_FILES = 100  # ... and directories of at most this many files
MOST_METRICS = 10_000  # in a file: more are not metrics to compare
INFINITY = 1.7976931348623157e308  # MLflow's stores replace an infinite metric with this


@dataclass(frozen=True)
class Curves:
    """A plot over a whole number: the file or folder, the x column, and the columns to show (all if none)."""

    path: str
    x: str
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declared:
    """What dvc.yaml declares about a stage's files. Paths are relative to the DVC project's root."""

    desc: str = ""
    metrics: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()
    curves: tuple[Curves, ...] = ()
    datasets: Mapping[str, str] = field(default_factory=dict)  # name: path
    models: Mapping[str, str] = field(default_factory=dict)  # name: path
    model_meta: Mapping[str, Any] = field(default_factory=dict)  # name: meta, with the `desc` of the artifact
    models_read: Mapping[str, str] = field(default_factory=dict)  # name: path, of the models among its deps
    prefix: str = ""  # for its metrics on the run that made its model, if several stages read that model


@dataclass(frozen=True)
class Execution:
    """One execution of a stage: its command, params by file and key, and the hashes of deps and outs by path."""

    stage: str  # its address from the root: train, train@0, sub/dvc.yaml:train
    cmd: str
    params: Mapping[str, Mapping[str, Any]]
    deps: Mapping[str, str]
    outs: Mapping[str, str] = field(default_factory=dict)  # empty while it runs
    declared: Declared = field(default_factory=Declared)
    entries: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of small directories: hashes by path
    upstream: tuple["Execution", ...] = ()  # those that made what it read, earliest first

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the outs: command, params and deps."""
        return _sha256([self.cmd, self.params, self.deps])

    @property
    def id(self) -> str:
        """SHA-256 of the whole execution, with its outs and upstream params; equal ids mean the same execution."""
        before = {one.stage: one.params for one in self.upstream if one.params}
        return _sha256([self.stage, self.fingerprint, self.outs, before])

    def chain(self) -> Iterator["Execution"]:
        """The upstream executions and this one, each with its own upstream."""
        whole: list[Execution] = []
        for one in self.upstream:
            near = [other for other in whole if any(meet(dep, out) for dep in one.deps for out in other.outs)]
            before = {other.stage: other for maker in near for other in (*maker.upstream, maker)}
            whole.append(replace(one, upstream=tuple(other for other in whole if other.stage in before)))
        yield from (*whole, self)

    def to_json(self) -> str:
        """The execution with its upstream, as the run's artifact."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, default=str)

    def maker_of_model(self) -> "Execution | None":
        """The execution that made the model that this one reads; None if it reads no model made by a stage."""
        for path in self.declared.models_read.values():
            for other in self.chain():
                if other is not self and any(inside(path, out) for out in other.outs):
                    return other
        return None

    @classmethod
    def from_json(cls, text: str) -> "Execution":
        """The execution in a run's artifact. Raises ValueError, TypeError or KeyError if the text is not one."""
        return cls._from_dict(json.loads(text))

    @classmethod
    def _from_dict(cls, values: dict[str, Any]) -> "Execution":
        declared = dict(values["declared"])
        declared["curves"] = tuple(Curves(c["path"], c["x"], tuple(c["columns"])) for c in declared["curves"])
        for key in ("metrics", "plots"):
            declared[key] = tuple(declared[key])
        upstream = tuple(cls._from_dict(other) for other in values["upstream"])
        return cls(**{**values, "declared": Declared(**declared), "upstream": upstream})


@dataclass(frozen=True)
class Content:
    """What MLflow shows of an execution."""

    params: Mapping[str, str]
    tags: Mapping[str, str]
    datasets: Mapping[str, str]  # name: digest
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # by column and step
    artifacts: Mapping[str, str] = field(default_factory=dict)  # path: hash
    models: Mapping[str, str] = field(default_factory=dict)  # name: hash
    absent: tuple[str, ...] = ()  # plots without numbers, such as images, that cannot be had
    partial: bool = False  # whether other outs cannot be had that may be small
    problems: tuple[str, ...] = ()  # what cannot be shown, one line each


class Files(Protocol):
    """A source of the bytes of outs."""

    def find(self, path: str, digest: str, most: int | None = None) -> Path | None:
        """A local copy of a file with this hash, of at most `most` bytes; None if there is none."""

    def is_larger(self, path: str, digest: str, size: int) -> bool:
        """Whether there is a local copy of more than `size` bytes, of whatever hash."""

    def entries(self, path: str, digest: str) -> Mapping[str, str] | None:
        """The hashes of the files in a directory, by path relative to it; None if unavailable."""


class MissingBytes(Exception):  # noqa: N818
    """The bytes of an out that MLflow would show are unavailable."""


def start_of(execution: Execution, files: Files) -> Content:
    """The part of the content that is known before the outs exist: params, tags, data sets."""
    params: dict[str, str] = {}
    for one in (*execution.upstream, execution):  # the stage's own params come last and win
        params |= {key: valid_value(value) for key, value in named_params(one).items()}
    tags = {
        "stage": execution.stage,
        "dvc.fingerprint": execution.fingerprint,
        "dvc.cmd": execution.cmd,
        **{f"dvc.deps.{path}": digest for path, digest in execution.deps.items()},
    }
    datasets = {
        valid_name(name): digest[:36]  # MLflow's limit, which a directory's MD5 just fits
        for name, path in execution.declared.datasets.items()
        if (digest := _digest(execution, path, files))
    }
    return Content(params, {valid_name(key): valid_value(value) for key, value in tags.items()}, datasets)


def content_of(execution: Execution, files: Files) -> Content:
    """The whole content of a finished execution.

    Raises MissingBytes if a file that MLflow would show is unavailable.
    """
    start, declared = start_of(execution, files), execution.declared
    leaves, problems = _leaves(execution, files), list[str]()
    metrics: dict[str, float] = {}
    tags = dict(start.tags)
    values = _named_metrics(execution, files, leaves, problems)
    for name, (_, value) in values.items():
        if is_number(value):
            metrics[name] = stored(value)
        else:
            tags[name] = valid_value(value if isinstance(value, str) else json.dumps(value, default=str))
    curves: dict[str, dict[int, float]] = {}
    for plot in declared.curves:
        for table in tables(plot, leaves):
            found, problem = read_curves(table, _bytes(table.path, files, leaves))
            problems += [problem] if problem else []
            for column, points in found.items():
                curves.setdefault(curve_name(plot, table, column), {}).update(points)
    for name in curves.keys() & metrics.keys():  # the last point shows it already; another value gets another name
        last = curves[name][max(curves[name])]
        value = metrics.pop(name)
        if not same(value, last):
            metrics[valid_name(f"{name}.final")] = value
    tags |= {valid_name(f"dvc.outs.{path}"): digest for path, digest in execution.outs.items()}
    tags["dvc.execution"] = execution.id
    models = {name: leaves[path] for name, path in declared.models.items() if path in leaves}
    kept = {*declared.models.values(), *declared.datasets.values()}
    artifacts, absent, partial = {}, [], False
    for path, digest in leaves.items():
        if any(inside(path, one) for one in kept):
            continue
        shown = is_shown(execution, path)
        if digest.endswith(".dir"):
            partial = partial or files.entries(path, digest) is None
            continue
        if files.find(path, digest, None if shown else SMALL_BYTES):
            artifacts[path] = digest
        elif shown and (path in declared.metrics or PurePosixPath(path).suffix in TABLES):
            raise MissingBytes(path)
        elif shown:
            absent.append(path)
        else:
            partial = partial or not files.is_larger(path, digest, SMALL_BYTES)
    return Content(
        start.params, tags, start.datasets, metrics, curves, artifacts, models, tuple(absent), partial, tuple(problems)
    )


def is_shown(execution: Execution, path: str) -> bool:
    """Whether the file is declared as metrics or plots: then the record has it, whatever its size."""
    declared = execution.declared
    return path in declared.metrics or any(inside(path, one) for one in declared.plots)


def metric_keys(execution: Execution, files: Files) -> dict[str, str]:
    """The keys of the numbers in the declared metrics files, by their names in MLflow. Raises MissingBytes."""
    values = _named_metrics(execution, files, _leaves(execution, files), [])
    return {name: key for name, (key, value) in values.items() if is_number(value)}


def _named_metrics(
    execution: Execution, files: Files, leaves: Mapping[str, str], problems: list[str]
) -> dict[str, tuple[str, Any]]:
    """The values in the declared metrics files, nested keys joined by dots: key and value, by the name in MLflow.

    A key that two files have gets the file's name. Adds to `problems` what cannot be read; raises MissingBytes.
    """
    read = {path: _read_metrics(path, files, leaves) for path in execution.declared.metrics}
    problems += [problem for _, problem in read.values() if problem]
    times = Counter(key for values, _ in read.values() for key in values)
    return {
        valid_name(f"{path}:{key}" if times[key] > 1 else key): (key, value)
        for path, (values, _) in read.items()
        for key, value in values.items()
    }


def is_number(value: object) -> bool:
    """Whether MLflow can show it as a metric; a bool is a tag."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _digest(execution: Execution, path: str, files: Files) -> str:
    """The hash of a dep or an out, or of a file in one; "" if unknown."""
    known = {**execution.deps, **execution.outs}
    if path in known:
        return known[path]
    for folder, digest in known.items():
        if inside(path, folder) and (entries := files.entries(folder, digest)):
            return entries.get(path.removeprefix(f"{folder}/"), "")
    return ""


def stored(value: float) -> float:
    """The number as MLflow's stores return it."""
    if value and math.isinf(value):
        return math.copysign(INFINITY, value)
    try:
        return float(value)
    except OverflowError:  # an integer beyond the largest float
        return math.copysign(INFINITY, value)


def named_params(execution: Execution) -> dict[str, str]:
    """The stage's own params as MLflow shows them: `key`, or `file:key` for files other than params.yaml.

    Other orders of the keys in a value are the same value, and so the same text.
    """
    values = {}
    for path, params in execution.params.items():
        for key, value in flatten(params).items():
            name = valid_name(key if path == "params.yaml" else f"{path}:{key}")
            values[name] = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, as in `dvc params diff`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def tables(plot: Curves, paths: Iterable[str]) -> Iterator[Curves]:
    """The plot for each of these files that is the plot's own file or a table in its folder."""
    for path in paths:
        if PurePosixPath(path).suffix in TABLES and inside(path, plot.path):
            yield replace(plot, path=path)


def curve_name(plot: Curves, table: Curves, column: str) -> str:
    """A curve's name: its column; in a folder of tables with the table's path, as DVCLive nests it in metrics.json.

    DVCLive's `train/loss.tsv` has the column `loss`, and metrics.json `{"train": {"loss": 0.1}}`: `train.loss`.
    """
    parts: list[str] = []
    if table.path != plot.path:
        relative = PurePosixPath(table.path).relative_to(plot.path).with_suffix("")
        parts = [*relative.parts[:-1], *([relative.name] if relative.name != column else [])]
    return valid_name(".".join([*parts, column]))


def read_curves(plot: Curves, data: bytes) -> tuple[dict[str, dict[int, float]], str]:
    """The points of each column by x, and a line on what cannot be shown ("" if all can).

    A last line of CSV or TSV without a newline is skipped: it may be incomplete.
    """
    suffix = PurePosixPath(plot.path).suffix
    try:
        text = data.decode()
        if suffix in (".csv", ".tsv"):
            whole = text[: text.rfind("\n") + 1]
            rows: Any = list(csv.DictReader(io.StringIO(whole), delimiter="\t" if suffix == ".tsv" else ","))
        else:
            rows = _parse(plot.path, text)
            if isinstance(rows, dict):  # DVC takes the first list that it finds
                rows = next((value for value in rows.values() if isinstance(value, list)), [])
    except Exception as error:  # a parser may raise anything on arbitrary input
        return {}, f"{plot.path}: expected a table, found something else ({type(error).__name__}); no curves shown"
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if not isinstance(row, dict) or row.get(plot.x) is None:
            return {}, f"{plot.path}: expected a whole number as {plot.x}, found none; no curves shown"
        step = _number(row[plot.x])
        if step is None or not step.is_integer():  # a plot of another kind, such as a ROC curve
            return {}, ""
        for column in plot.columns or [key for key in row if key not in (plot.x, None)]:
            value = _number(row.get(column))
            if value is not None:
                curves.setdefault(column, {})[int(step)] = stored(value)
    return curves, ""


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, bool) else number


def _read_metrics(path: str, files: Files, leaves: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The values of a metrics file, nested keys joined by dots, and a line on what cannot be shown."""
    if path not in leaves:
        return {}, ""
    try:
        values = _parse(path, _bytes(path, files, leaves).decode())
    except MissingBytes:
        raise
    except Exception as error:  # a parser may raise anything on arbitrary input
        return {}, f"{path}: expected metrics, found something else ({type(error).__name__}); no metrics shown"
    if is_number(values):
        values = {PurePosixPath(path).stem: values}
    if not isinstance(values, dict):
        return {}, f"{path}: expected a mapping of names to numbers, found {type(values).__name__}; no metrics shown"
    flat = flatten({str(key): value for key, value in values.items()})
    if len(flat) > MOST_METRICS:
        return {}, f"{path}: expected at most {MOST_METRICS:,} metrics, found {len(flat):,}; no metrics shown"
    return flat, ""


def _parse(path: str, text: str) -> Any:
    from dvc.utils.serialize import PARSERS

    return PARSERS[PurePosixPath(path).suffix or ".yaml"](text, path)


def _bytes(path: str, files: Files, leaves: Mapping[str, str]) -> bytes:
    found = files.find(path, leaves[path])
    if found is None:
        raise MissingBytes(path)
    return found.read_bytes()


def _leaves(execution: Execution, files: Files) -> dict[str, str]:
    """The hashes of the outs by path, including the files in directories of which something is shown."""
    leaves = dict(execution.outs)
    declared = execution.declared
    named = [*declared.metrics, *declared.plots, *(c.path for c in declared.curves), *declared.models.values()]
    for path, digest in execution.outs.items():
        if digest.endswith(".dir"):
            wanted = any(meet(one, path) for one in named)
            entries = files.entries(path, digest)
            if entries is None:
                if wanted and path not in declared.models.values():
                    raise MissingBytes(path)
            elif wanted or len(entries) <= SMALL_FILES:
                leaves |= {f"{path}/{name}": value for name, value in entries.items()}
    return leaves


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, or both are NaN."""
    return one == other or (one != one and other != other)


def inside(path: str, folder: str) -> bool:
    """Whether a path is the folder, or in it."""
    return path == folder or path.startswith(f"{folder}/") or folder == "."


def meet(path: str, other: str) -> bool:
    """Whether one of the paths is the other, or in it."""
    return inside(path, other) or inside(other, path)


def differences(one: Content, other: Content) -> Iterator[tuple[str, Any, Any]]:
    """Yield each difference: its name and both values, None if absent."""
    for part in ("params", "tags", "datasets", "metrics", "artifacts", "models"):
        yield from _compare(part, getattr(one, part), getattr(other, part))
    for column in sorted({*one.curves, *other.curves}):
        yield from _compare(f"curve {column} at step", one.curves.get(column, {}), other.curves.get(column, {}))


def _compare(part: str, ones: Mapping[Any, Any], others: Mapping[Any, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*ones, *others}):
        a, b = ones.get(key), others.get(key)
        if not same(a, b):
            yield f"{part} {key}", a, b


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
