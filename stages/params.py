"""The schema of params.yaml: every value is checked before a stage does anything.

No stage lists this module in its deps. That is sound because it only checks: it has no defaults and derives
nothing, and DVC tracks the values themselves.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from stages.stage import StageError, shorten

PATH = Path("params.yaml")
MAX_BYTES, MAX_DEPTH = 100_000, 20  # far above what the schema can need
SHOWN = 20  # mistakes listed one by one


def _check_url(url: str) -> str:
    """Raise ValueError if the URL may contain a secret: git keeps this file, and MLflow shows it."""
    if not re.fullmatch(r"https?://([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[\w.~!$&'()*+,;=:@%/-]*)?", url, re.ASCII):
        raise ValueError(
            "an http or https address without user and password (requests takes them from ~/.netrc), query or fragment"
        )
    return url


def _check_classes(classes: list[str]) -> list[str]:
    """Raise ValueError unless the names and the reserved ones can be columns of one table."""
    if len({*classes, *RESERVED}) != len(classes) + len(RESERVED):
        raise ValueError(f"names that differ from each other and from {', '.join(RESERVED)}")
    return classes


RESERVED = ("class", "index", "label", "predicted")  # the other columns of predictions
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # many thousands end the process: OpenMP cannot start them
# Lists are kept short enough for an MLflow param, 6,000 characters of JSON.
Url = Annotated[str, StringConstraints(max_length=500), AfterValidator(_check_url)]
FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$", max_length=100)]  # no folder: it is joined to one
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# Printable words, with a space between: \p{C} is Unicode's category Other (control characters), \p{Z} separators.
Name = Annotated[str, StringConstraints(pattern=r"^[^\p{C}\p{Z}]+( [^\p{C}\p{Z}]+)*$", max_length=40)]
Device = Literal["auto", "cuda", "cpu"]
Bits = Literal["portable", "native"]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class File(Section):
    name: FileName
    bytes: Annotated[int, Field(ge=1, le=2**30)]
    sha256: Sha256


class Files(Section):
    train_images: File
    train_labels: File
    test_images: File
    test_labels: File


class Fetch(Section):
    mirrors: Annotated[list[Url], Field(max_length=10)]
    files: Files
    classes: Annotated[list[Name], Field(min_length=2, max_length=100), AfterValidator(_check_classes)]


class Train(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    validation_size: Annotated[int, Field(ge=0, le=1_000_000)]
    lr: Annotated[float, Field(gt=0, le=100)]
    batch_size: Count
    epochs: Count
    schedule: Literal["one_cycle", "constant"]
    warmup_fraction: Fraction
    activation: Literal["sigmoid", "relu"]
    init: Literal["xavier", "default"]
    standardize: bool
    checkpoint_epochs: Annotated[int, Field(ge=0, le=1_000_000)]
    device: Device
    threads: Threads
    bits: Bits


class Evaluate(Section):
    batch_size: Count
    device: Device
    threads: Threads
    bits: Bits


class Params(Section):
    fetch: Fetch
    train: Train
    evaluate: Evaluate


def read_params(path: Path = PATH) -> Params:
    """Read and check the parameters.

    Raises StageError that lists the mistakes: the key of each, what was found, what is allowed.
    """
    try:
        return Params.model_validate(read_values(path))
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        lines = [_describe(dict(detail)) for detail in mistakes[:SHOWN]]
        if len(mistakes) > SHOWN:
            lines.append(f"and {len(mistakes) - SHOWN:,} more")
        raise StageError("\n  ".join([f"{path} has {len(mistakes)} mistake(s):", *lines])) from None


def read_values(path: Path = PATH) -> Any:
    """Read the file as DVC does, unchecked. Raises StageError if it is not YAML."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise StageError(
                f"{path}: expected at most {MAX_BYTES:,} bytes, found more; `git checkout {path}` restores it"
            )
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"cannot read {path}: {error}; `git checkout {path}` restores it") from None
    yaml = YAML(typ="safe")  # YAML 1.2
    try:
        _check_structure(path, yaml, text)
        return yaml.load(text)
    except StageError:
        raise
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise StageError(f"{path} is not YAML: {where}{shorten(getattr(error, 'problem', None) or error)}") from None
    except Exception as error:  # whatever int(), float(), date() and the like raise on a value: ruamel lets it through
        reason = shorten(f"{type(error).__name__}: {error}")
        raise StageError(f"{path} has a value that cannot be read ({reason}); `git diff {path}` may show it") from None


def _check_structure(path: Path, yaml: YAML, text: str) -> None:
    """Raise StageError for structures that make a small file huge or endless once it is read.

    These are deep nesting, and mappings and lists repeated in each other by aliases ("billion laughs").
    """
    depth = 0
    for event in yaml.parse(text):
        where = f"{path}, line {event.start_mark.line + 1}"
        if isinstance(event, CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise StageError(f"{where}: expected mappings and lists at most {MAX_DEPTH} deep, found more")
            if event.anchor is not None:
                raise StageError(
                    f"{where}: expected anchors (&) on single values only, found {shorten(event.anchor, 40)} on more"
                )
        elif isinstance(event, CollectionEndEvent):
            depth -= 1


def _describe(mistake: dict[str, Any]) -> str:
    key = shorten(".".join(str(part) for part in mistake["loc"])) or "the file"
    match mistake["type"]:
        case "missing":
            return f"{key}: expected a value, found nothing"
        case "extra_forbidden":
            near = difflib.get_close_matches(key, _keys(Params), n=1)
            return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        case "model_type":
            expected = "a mapping of keys to values"
        case "value_error":  # from the functions above
            expected = str(mistake["ctx"]["error"])
        case _:
            message = mistake["msg"].removeprefix("Input ").removeprefix("should be ").removeprefix("should ")
            expected = message[0].lower() + message[1:]
    try:
        found = repr(mistake["input"])
    except ValueError:  # an integer in hexadecimal, which may be longer than Python writes in decimal
        found = "a number with thousands of digits"
    if key.startswith("fetch.mirrors"):  # which may contain secrets, not to be logged
        found = re.sub(r"//.*@", "//***@", re.sub(r"[?#].*", "***", found))
    return f"{key}: expected {expected}, found {shorten(found, 80)}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and not isinstance(kind, UnionType) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
