"""A diff of what a project's dvc.yaml could declare so that its records show more."""

import csv
import difflib
import io
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvc.stage import PipelineStage
from dvc.utils.serialize import PARSERS
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from dvc_mlflow.execution import flatten, is_number
from dvc_mlflow.project import Project, plot_files

MODELS = (".pt", ".pth", ".ckpt", ".safetensors", ".onnx", ".pkl", ".pickle", ".joblib", ".h5", ".keras")
DATA = (".csv", ".tsv", ".parquet", ".feather", ".npz", ".npy", ".arrow", ".jsonl", ".h5", ".hdf5", ".tfrecord")
STEPS = ("step", "epoch", "iteration", "iter", "round")  # columns that count up
MOST_BYTES = 10_000_000  # larger files are not inspected
SHELL = re.compile(r"[|&;<>()`\n]|^\s*\w+=|^\s*(cd|export|source|set)\s")


def init(project: Project, live: bool, apply: bool) -> Iterator[str]:
    """Yield what could be declared, as a diff of each dvc.yaml; `apply` writes it, `live` prefixes the commands."""
    changed = False
    for path in sorted({Path(stage.path) for stage in project.stages.values()}):
        name = path.relative_to(project.folder).as_posix()
        text = path.read_text(encoding="utf-8")
        new, notes = proposal(project, path, text, live)
        yield from (f"{name}: {note}" for note in notes)
        if new == text:
            continue
        changed = True
        yield from difflib.unified_diff(text.splitlines(), new.splitlines(), name, name, lineterm="")
        if apply:
            temporary = path.with_name(f"{path.name}.tmp")
            temporary.write_text(new, encoding="utf-8")
            temporary.replace(path)
    if not changed:
        yield "dvc.yaml already declares everything that init looks for"
    elif apply:
        yield "written; new records (`dvc-mlflow sync`) will show it"
    else:
        yield "nothing was written; `dvc-mlflow init --apply` writes it"


def proposal(project: Project, path: Path, text: str, live: bool) -> tuple[str, list[str]]:
    """The text of a dvc.yaml with the proposed declarations, and lines on what could not be changed."""
    yaml = _yaml(text)
    content = yaml.load(text)
    notes: list[str] = []
    before = repr(content)
    declared = {posixpath.normpath(str(one.get("path"))) for one in (content.get("artifacts") or {}).values()}
    artifacts: dict[str, CommentedMap] = {}
    plots = [plot for plot in content.get("plots") or [] if isinstance(plot, Mapping)]
    for plot in plots:
        _name_step(plot, path.parent)
    plotted = {path.parent / file for plot in plots for file, curves in plot_files("", plot) if curves}
    for stage in content.get("stages", {}).values():
        definition = stage.get("do", stage)
        folder = path.parent / str(definition.get("wdir", "."))
        _declare_metrics(definition, folder)
        _declare_steps(definition, folder, plotted)
        if live and not _prefix(definition):
            notes.append(f"`{str(definition['cmd']).splitlines()[0]}` uses shell syntax; add `dvc-mlflow run` by hand")
    for file, kind in _artifacts(project, path):
        if file not in declared:
            name = re.sub(r"[^a-z0-9-]+", "-", Path(file).stem.lower()).strip("-") or kind
            while name in artifacts or name in (content.get("artifacts") or {}):
                name += f"-{kind}"
            artifacts[name] = CommentedMap(path=file, type=kind)
    if artifacts:
        content.setdefault("artifacts", CommentedMap())
        content["artifacts"] = content["artifacts"] or CommentedMap()
        content["artifacts"].update(artifacts)
    if repr(content) == before:
        return text, notes
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue(), notes


def _declare_metrics(stage: Any, folder: Path) -> None:
    """Turn plain outs that are files of numbers into metrics."""
    for out in [*(stage.get("outs") or [])]:
        file = _path(out)
        if Path(file).suffix in (".json", ".yaml", ".yml", ".toml") and _is_metrics(folder / file):
            stage["outs"].remove(out)
            stage.setdefault("metrics", []).append(out)
    if "outs" in stage and not stage["outs"]:
        del stage["outs"]


def _is_metrics(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > MOST_BYTES:
        return False
    try:
        values = PARSERS[file.suffix](file.read_text(encoding="utf-8"), str(file))
    except Exception:  # a parser may raise anything on arbitrary input
        return False
    if not isinstance(values, dict):
        return False
    leaves = flatten({str(key): value for key, value in values.items()}).values()
    numbers = [one for one in leaves if is_number(one)]
    return 0 < len(leaves) <= 2 * len(numbers)


def _declare_steps(stage: Any, folder: Path, plotted: Collection[Path]) -> None:
    """Set x on plots without one, and turn plain outs that are tables over a step into plots.

    The `plotted` files have their x at the top level of dvc.yaml.
    """
    for out in [*(stage.get("outs") or [])]:
        file = _path(out)
        if folder / file not in plotted and (step := _step(folder / file)):
            stage["outs"].remove(out)
            properties = CommentedMap(out[file]) if isinstance(out, Mapping) else CommentedMap()
            properties["x"] = step
            stage.setdefault("plots", []).append(CommentedMap({file: properties}))
    if "outs" in stage and not stage["outs"]:
        del stage["outs"]
    plots = stage.get("plots") or []
    for place, plot in enumerate(plots):
        if isinstance(plot, str) and (step := _step(folder / plot)):
            plots[place] = CommentedMap({plot: CommentedMap(x=step)})
        elif isinstance(plot, Mapping):
            _name_step(plot, folder)


def _name_step(plot: Any, folder: Path) -> None:
    """Set a plot's x if it has none and its files have a step column."""
    ((name, properties),) = plot.items()
    if properties is None or (isinstance(properties, Mapping) and "x" not in properties):
        y = (properties or {}).get("y")
        steps = {_step(folder / file) for file in (y if isinstance(y, Mapping) else [name])}
        if len(steps) == 1 and (step := steps.pop()):
            plot[name] = CommentedMap({"x": step, **(properties or {})})


def _step(file: Path) -> str:
    """The column of a table that counts up in whole numbers; "" if there is none."""
    if file.suffix not in (".csv", ".tsv", ".json") or not file.is_file() or file.stat().st_size > MOST_BYTES:
        return ""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            rows = PARSERS[".json"](text, str(file))
        else:
            rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if file.suffix == ".tsv" else ","))
        for name in rows[0] if isinstance(rows, list) and rows else ():
            values = [float(row[name]) for row in rows] if str(name).lower() in STEPS else []
            if values and values == sorted(values) and all(value == int(value) for value in values):
                return str(name)
    except Exception:  # the input is arbitrary
        return ""
    return ""


def _artifacts(project: Project, path: Path) -> Iterator[tuple[str, str]]:
    """The models and data sets of a dvc.yaml's stages: path relative to its folder, and type."""
    index, seen = project.index, set()
    read = {dep.fs_path for stage in index.stages for dep in stage.deps}
    named = {
        posixpath.normpath(posixpath.join(posixpath.dirname(dvcfile), str(value["path"])))
        for dvcfile, values in index._artifacts.items()
        for value in values.values()
    }
    for stage in index.stages:
        mine = isinstance(stage, PipelineStage) and Path(stage.path) == path
        first = min((Path(one.path) for one in project.stages.values()), default=path)
        for out in stage.outs:
            # The first dvc.yaml names what .dvc files track.
            if not (mine or (path == first and not isinstance(stage, PipelineStage))):
                continue
            if out.metric or out.plot or out.protocol != "local":
                continue
            if isinstance(stage, PipelineStage) and (_step(Path(out.fs_path)) or _is_metrics(Path(out.fs_path))):
                continue
            file, suffix = Path(out.fs_path).as_posix(), Path(out.fs_path).suffix.lower()
            words = re.split(r"[^a-z]+", Path(file).name.lower())
            if suffix in MODELS or "model" in words:
                kind = "model"
            elif file in read and (suffix in DATA or out.is_dir_checksum or not isinstance(stage, PipelineStage)):
                kind = "dataset"
            else:
                continue
            if file not in named and file not in seen:
                seen.add(file)
                yield posixpath.relpath(file, path.parent.as_posix()), kind


def _prefix(stage: Any) -> bool:
    """Prefix a stage's command, the last of a list, with `dvc-mlflow run`; return whether it has the prefix."""
    command = stage["cmd"][-1] if isinstance(stage["cmd"], list) else stage["cmd"]
    if command.startswith("dvc-mlflow run "):
        return True
    if SHELL.search(re.sub(r"\$\{[^}]*\}", "", command.strip())):
        return False
    if isinstance(stage["cmd"], list):
        stage["cmd"][-1] = f"dvc-mlflow run {command}"
    else:
        stage["cmd"] = f"dvc-mlflow run {command}"
    return True


def _path(out: Any) -> str:
    return str(next(iter(out))) if isinstance(out, Mapping) else str(out)


def _yaml(text: str) -> YAML:
    """A YAML that preserves the text's comments, quotes and indents."""
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 10_000
    indented = re.search(r"^( *)[^\s#-][^\n]*:[ ]*\n\1( *)- ", text, re.MULTILINE)
    offset = len(indented[2]) if indented else 2
    yaml.indent(mapping=2, sequence=offset + 2, offset=offset)
    return yaml
