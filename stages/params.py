"""The schema of params.yaml: every value is checked before a stage does anything.

No stage names this module in its deps. That is sound because it only checks: it has no defaults and derives
nothing, and DVC tracks the values themselves.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from ruamel.yaml import YAML, YAMLError

from stages.stage import StageError

PATH = Path("params.yaml")

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Url = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/@]+(/\S*)?$")]  # no password: git keeps params.yaml
FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]  # no folder: it is joined to one
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^\S(.*\S)?$")]
Device = Literal["auto", "cuda", "cpu"]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class File(Section):
    name: FileName
    bytes: PositiveInt
    sha256: Sha256


class Files(Section):
    train_images: File
    train_labels: File
    test_images: File
    test_labels: File


class Fetch(Section):
    mirrors: list[Url]
    files: Files
    classes: Annotated[list[Name], Field(min_length=10, max_length=10)]


class Train(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    validation_size: Annotated[int, Field(ge=0)]
    lr: Annotated[float, Field(gt=0)]
    batch_size: PositiveInt
    epochs: PositiveInt
    schedule: Literal["one_cycle", "constant"]
    warmup_fraction: Fraction
    activation: Literal["sigmoid", "relu"]
    init: Literal["xavier", "default"]
    standardize: bool
    checkpoint_epochs: Annotated[int, Field(ge=0)]
    device: Device
    threads: PositiveInt


class Evaluate(Section):
    batch_size: PositiveInt
    device: Device
    threads: PositiveInt


class Params(Section):
    fetch: Fetch
    train: Train
    evaluate: Evaluate


def read_params(path: Path = PATH) -> Params:
    """Read and check the parameters.

    Raises StageError that lists every mistake: its key, what was found, what is allowed.
    """
    try:
        return Params.model_validate(read_values(path))
    except ValidationError as error:
        mistakes = [_describe(dict(detail)) for detail in error.errors(include_url=False)]
        raise StageError("\n  ".join([f"{path} has {len(mistakes)} mistake(s):", *mistakes])) from None


def read_values(path: Path = PATH) -> Any:
    """Read what the file says, as DVC reads it, unchecked. Raises StageError for a file that is not YAML."""
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # YAML 1.2
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"cannot read {path}: {error}; `git checkout {path}` brings it back") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise StageError(f"{path} is not YAML: {where}{getattr(error, 'problem', None) or error}") from None


def _describe(mistake: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in mistake["loc"]) or "the file"
    match mistake["type"]:
        case "missing":
            return f"{key}: expected a value, found nothing"
        case "extra_forbidden":
            near = difflib.get_close_matches(key, _keys(Params), n=1)
            return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        case "model_type":
            expected = "a mapping of keys to values"
        case _:
            message = mistake["msg"].removeprefix("Input ").removeprefix("should be ").removeprefix("should ")
            expected = message[0].lower() + message[1:]
    found = repr(mistake["input"])
    return f"{key}: expected {expected}, found {found if len(found) <= 80 else found[:77] + '...'}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and not isinstance(kind, UnionType) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
