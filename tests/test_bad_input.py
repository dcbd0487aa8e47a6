"""Any file is accepted, or refused in one clear line: nothing else is raised, and nothing hangs.

Hypothesis makes the inputs: the same ones each time or, with --stress, many more that differ each time.
"""

import gzip
import io
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, configuration, given, settings
from PIL import Image
from pydantic import ValidationError
from ruamel.yaml import YAML
from support.data import make_idx, make_images
from support.project import ROOT, Project

from commands.predict import read_image
from stages import fetch
from stages.checkpoint import Checkpoint
from stages.dataset import Dataset, check_dataset, read_dataset, write_dataset
from stages.device import set_up_device
from stages.evaluate import bin_confidence, score_classes, write_predictions
from stages.evaluation_figures import plot_confusion, plot_mistakes, plot_per_class
from stages.figure import write_png
from stages.lenet import LeNet, predict, read_model, write_model
from stages.params import RESERVED, Fetch, File, Train, read_params
from stages.stage import StageError
from stages.training import train

SLOW = 10  # CPU seconds that no input may take
STRESS = 20  # times as many inputs
TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
VALUES = YAML(typ="safe").load(TEXT)
CLASSES = [f"class {label}" for label in range(10)]

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

TryAll = Callable[[st.SearchStrategy, Callable[[Any], object], int], None]


@pytest.fixture
def try_all(
    stress: bool, record_property: Callable[[str, object], None], tmp_path_factory: pytest.TempPathFactory
) -> TryAll:
    """Call a function with many values of a strategy: each is accepted, or refused with one well-formed StageError."""
    configuration.set_hypothesis_home_dir(tmp_path_factory.getbasetemp() / "hypothesis")

    def run(strategy: st.SearchStrategy, claim: Callable[[Any], object], inputs: int) -> None:
        tried = 0

        @settings(
            max_examples=inputs * (STRESS if stress else 1),
            derandomize=not stress,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def each(value: Any) -> None:
            nonlocal tried
            tried += 1
            start = time.process_time()
            try:
                claim(value)
            except StageError as error:
                check_message(str(error))
            assert time.process_time() - start < SLOW

        each()
        record_property("inputs tried", tried)

    return run


def check_message(message: str) -> None:
    """One line, or one for each mistake in params.yaml; none is long or has control characters."""
    first, *others = message.split("\n")
    assert len(others) <= 21
    assert not others or first.endswith(("mistake(s):", "FASHION_MNIST_DIR:"))
    for line in (first, *others):
        assert 0 < len(line) < 900
        assert line.isprintable()


def unchanged(path: Path, content: bytes, read: Callable[[Path], object]) -> None:
    """Read a file with this content: afterwards it is unchanged, and alone in its folder."""
    path.write_bytes(content)
    try:
        read(path)
    finally:
        assert path.read_bytes() == content
        assert [other.name for other in path.parent.iterdir()] == [path.name]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with a few faults, at its beginning as often as anywhere."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, min(len(content), 120)) | st.integers(0, len(content)))
        end = start + draw(st.integers(0, 8))
        match draw(st.sampled_from(["replace", "flip", "cut", "repeat"])):
            case "replace":
                content[start:end] = draw(st.binary(max_size=8))
            case "flip" if start < len(content):
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[start:]
            case "repeat":
                content[start:start] = content[start:end] * draw(st.integers(1, 100))
    return bytes(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**4000),
    lambda values: st.lists(values, max_size=12) | st.dictionaries(st.text(max_size=9), values, max_size=4),
    max_leaves=12,
)

# --- params.yaml

YAML_VALUES = [
    "",
    "9" * 5000,
    "0x" + "f" * 5000,
    "-0",
    "1e999",
    "-.inf",
    ".nan",
    "!!int ''",
    "!!float x",
    "!!bool x",
    "!!timestamp x",
    "2001-99-99",
    "2001-12-31T23:59:60Z",
    "!!binary x",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!python/object/apply:os.getcwd []",
    "!unknown x",
    "!!null x",
    "&a 1",
    "&a [*a]",
    "*nowhere",
    "<<",
    "{<<: 1}",
    "{? [a, b] : 1}",
    "{? {a: b} : 1}",
    "{1: 2, 1.5: 3, ~: 4, true: 5}",
    "{? 0x" + "f" * 5000 + " : 1}",
    "{a: 1, a: 2}",
    '"\\ud800"',
    '"\\e[31m\\n\\r\\x85\\u2028"',
    '{"\\e[31m\\n": 1, "\\ud800": 2}',
    "[" * 500 + "]" * 500,
    "[" + "1, " * 3000 + "]",
    "{" + ", ".join(f"k{number}: 1" for number in range(200)) + "}",
    "x" * 50_000,
    "\x00",
    "\x1b[31m",
]
PATHS = [
    (),
    *((section,) for section in VALUES),
    *((section, key) for section in VALUES for key in VALUES[section]),
    ("fetch", "mirrors", 0),
    ("fetch", "classes", 3),
    *(("fetch", "files", key) for key in VALUES["fetch"]["files"]),
    *(("fetch", "files", "test_labels", key) for key in ("name", "bytes", "sha256")),
]


@st.composite
def changed_params(draw: st.DrawFn) -> bytes:
    """params.yaml with another value at a key, without the key, or with an extra key beside it."""
    values = json.loads(json.dumps(VALUES))
    *parents, last = draw(st.sampled_from(PATHS[1:]))
    place = values
    for part in parents:
        place = place[part]
    value = draw(st.sampled_from(YAML_VALUES) | json_values.map(json.dumps))
    match draw(st.sampled_from(["set", "set", "set", "add", "drop"])):
        case "set":
            place[last] = "@value@"
        case "add" if isinstance(place, dict):
            place[draw(st.sampled_from(["lrr", "\x1b[31m", "a\nb", "x" * 2000]) | st.text(max_size=20))] = "@value@"
        case _:
            del place[last]
    return json.dumps(values).replace('"@value@"', value).encode(errors="surrogatepass")


whole_params = (
    damaged(TEXT.encode())
    | st.binary(max_size=300)
    | st.text(max_size=300).map(str.encode)
    | st.text("[]{}:,-&*!|>%@`'\"#?\n\t ab01.~<=\\", max_size=80).map(str.encode)
    | st.sampled_from(YAML_VALUES).map(str.encode)
    | st.tuples(st.sampled_from(["- ", "[", "{a: ", "? ", "a:\n ", "!!set ", "&a "]), st.integers(1, 20_000)).map(
        lambda pair: (pair[0] * pair[1]).encode()
    )
)


@pytest.mark.parametrize(("strategy", "inputs"), [(changed_params(), 100), (whole_params, 75)], ids=["value", "file"])
def test_params(strategy: st.SearchStrategy, inputs: int, try_all: TryAll, tmp_path: Path) -> None:
    try_all(strategy, lambda content: unchanged(tmp_path / "params.yaml", content, read_params), inputs)


# --- what fetch receives

IDX_IMAGES = make_idx(make_images(np.arange(3, dtype=np.uint8), np.random.default_rng(0)))
IDX_LABELS = make_idx(np.arange(3, dtype=np.uint8))


@st.composite
def idx_files(draw: st.DrawFn) -> bytes:
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 28, 2**31, 2**32 - 1]), max_size=4))
    sizes = draw(st.just(sizes) | st.permutations([0, 2**32 - 1, 2**32 - 1]))
    header = draw(st.sampled_from([b"\0\0\x08", b"\0\0\x08", b"\0\0\x09", b"\1\0\x08"])) + bytes([len(sizes)])
    content = bytes(draw(st.just(0) | st.integers(0, 2000)))
    return header + struct.pack(f">{len(sizes)}I", *sizes) + content


def test_idx_files(try_all: TryAll) -> None:
    def claim(content: bytes) -> None:
        try:
            array = fetch.parse_idx(content)
            assert 1 <= array.ndim <= 4
            check_dataset("this set", array, array, CLASSES)
        except StageError as error:
            check_message(str(error))

    try_all(damaged(IDX_IMAGES) | damaged(IDX_LABELS) | idx_files() | st.binary(max_size=50), claim, 150)


def test_gzip_files(try_all: TryAll, tmp_path: Path) -> None:
    """A file in a folder: its content has the expected checksum, or it is refused."""
    whole = gzip.compress(IDX_LABELS, mtime=0)

    def claim(case: tuple[bytes, int]) -> None:
        content, size = case
        file = File(name="labels.gz", bytes=size, sha256="0" * 64)
        with pytest.raises(StageError) as raised:
            unchanged(tmp_path / "labels.gz", content, lambda path: fetch.unpack(fetch.read(tmp_path, file), file))
        check_message(str(raised.value))

    files = damaged(whole) | st.just(gzip.compress(bytes(500_000))) | st.binary(max_size=100)
    files |= st.binary(max_size=100).map(lambda content: whole[:10] + content)
    try_all(st.tuples(files, st.sampled_from([1, len(IDX_LABELS), 2**30]) | st.integers(1, 2**30)), claim, 50)


RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\nContent-Type: x\r\n\r\n" + gzip.compress(b"x" * 100)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"


@st.composite
def http_answers(draw: st.DrawFn) -> bytes:
    lengths = ["0", "-1", "5", "5, 6", "²", "9" * 4000, "9" * 5000]
    places = [
        "/",
        "//",
        "?",
        "http://[",
        "http://a..b/",
        "http://" + "a" * 300,
        "http://127.0.0.1:99999/",
        "file:///",
        "é",
    ]
    encodings = ["chunked", "gzip", "chunked, gzip", "identity", ""]
    texts = st.text(st.characters(max_codepoint=255), max_size=20)
    header = st.one_of(
        st.tuples(st.just("Content-Length"), st.sampled_from(lengths) | texts),
        st.tuples(st.just("Location"), st.sampled_from(places) | texts),
        st.tuples(st.sampled_from(["Transfer-Encoding", "Content-Encoding"]), st.sampled_from(encodings) | texts),
        st.tuples(st.sampled_from(["Connection", "Set-Cookie", "X-Other", "\x1b"]), texts),
    )
    lines = [draw(st.sampled_from(["HTTP/1.1 200 OK", "HTTP/1.0 302 Found", "HTTP/1.1 206 \x1b[31m", "HTTP/9 x"]))]
    lines += [f"{name}: {content}" for name, content in draw(st.lists(header, max_size=4))]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + draw(st.binary(max_size=80))


def test_http_answers(try_all: TryAll, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a mirror answers, fetch reports it and tries the next source, here until none is left."""
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setattr(fetch, "DEBIAN_DIR", tmp_path / "debian")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(fetch, "LOWEST_SECONDS", 5.0)  # an endless answer is abandoned then
    monkeypatch.setattr(fetch, "READ_SECONDS", 5.0)
    answer = b""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    mirrors = [f"http://127.0.0.1:{listener.getsockname()[1]}"]
    params = Fetch.model_validate(VALUES["fetch"]).model_copy(update={"mirrors": mirrors})

    def claim(content: bytes) -> None:
        nonlocal answer
        answer = content
        with pytest.raises(StageError) as raised:
            fetch.fetch(params)
        first, line = str(raised.value).split("\n")
        assert first.startswith("no source has the data set")
        assert line.startswith(f"  {mirrors[0]}: ")
        check_message(str(raised.value))

    try_all(http_answers() | damaged(RESPONSE) | damaged(CHUNKED) | st.binary(max_size=100), claim, 150)
    listener.close()


# --- safetensors

DTYPES = ["BOOL", "F4", "F6_E2M3", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32"]
DTYPES += ["F32", "C64", "F64", "I64", "none"]
metadata_values = (
    json_values.map(json.dumps)
    | st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN", "null", json.dumps(CLASSES)])
    | st.builds(
        lambda activation, classes, shape: json.dumps({"activation": activation, "classes": classes, "shape": shape}),
        st.sampled_from(["sigmoid", "relu", "tanh", "", None, [], {}, 1]),
        st.sampled_from([CLASSES, CLASSES[:9], [1] * 10, "abcdefghij", dict.fromkeys(CLASSES), None]) | json_values,
        st.sampled_from([[28, 28], [28, 28, 3], [28], [28, 29], [2**31, 2**31], [0, 0], [-1, 28], None]) | json_values,
    )
    | st.text(max_size=20)
)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def changed_tensors(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file with other metadata, or another type, shape, name or content of a tensor."""
    header, data = split(whole)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        entry = header[name]
        match draw(
            st.sampled_from(
                ["metadata", "metadata", "metadata", "dtype", "shape", "both", "drop", "rename", "more", "values"]
            )
        ):
            case "metadata":
                key = draw(st.sampled_from(["lenet", "classes"]))
                header["__metadata__"] = draw(
                    st.just({}) | st.builds(lambda text, key=key: {key: text}, metadata_values)
                )
            case "dtype":
                entry["dtype"] = draw(st.sampled_from(DTYPES))
            case "shape":
                sizes = st.sampled_from([0, 1, 2, 28, 784, 2**32, 2**62]) | st.integers(-1, 300)
                entry["shape"] = draw(st.lists(sizes, max_size=4) | st.just([1] * 784))
            case "both":  # what fits the data's length
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                entry["dtype"], width = draw(
                    st.sampled_from([("U8", 1), ("I8", 1), ("F16", 2), ("I32", 4), ("F32", 4)])
                )
                entry["shape"] = draw(st.sampled_from([[size // width], [1, size // width], [size // width, 1]]))
            case "drop" if len(header) > 2:
                del header[name]
            case "rename":
                header[draw(st.text(max_size=9) | st.sampled_from(["images", "labels", "mean"]))] = header.pop(name)
            case "more":
                header["another"] = {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]}
            case "values":
                number = struct.pack("<f", draw(st.floats(width=32)))
                start, end = entry["data_offsets"]
                data = data[:start] + number * ((end - start) // 4) + data[start + (end - start) // 4 * 4 :]
    return join(header, data)


@pytest.fixture(scope="module")
def whole_dataset(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    labels = np.arange(3, dtype=np.uint8)
    path = tmp_path_factory.mktemp("whole") / "dataset"
    write_dataset(path, Dataset(make_images(labels, np.random.default_rng(0)), labels, CLASSES))
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model"
    torch.manual_seed(0)
    write_model(path, LeNet("sigmoid", CLASSES, (28, 28)))
    return path.read_bytes()


def test_data_sets(try_all: TryAll, whole_dataset: bytes, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        dataset = read_dataset(path)
        check_dataset("this set", *dataset)
        assert dataset.labels.max() < len(dataset.classes)

    files = damaged(whole_dataset) | changed_tensors(whole_dataset) | st.binary(max_size=100)
    try_all(files, lambda content: unchanged(tmp_path / "set.safetensors", content, read), 150)


def test_models(try_all: TryAll, whole_model: bytes, tmp_path: Path) -> None:
    """A model that is accepted predicts, or reports that its numbers are not finite."""
    images = torch.from_numpy(make_images(np.arange(3, dtype=np.uint8), np.random.default_rng(0)))

    def read(path: Path) -> None:
        model = read_model(path)
        assert predict(model, images, 2).isfinite().all()
        assert len(model.classes) == 10

    files = damaged(whole_model) | changed_tensors(whole_model) | st.binary(max_size=100)
    try_all(files, lambda content: unchanged(tmp_path / "model.safetensors", content, read), 150)


# --- pictures


def save(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def make_pictures() -> list[bytes]:
    grey = Image.fromarray(make_images(np.array([3], np.uint8), np.random.default_rng(0))[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    pictures = [save(grey.convert(mode), format="PNG", exif=exif) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    pictures += [save(wide, format="PNG"), save(grey.convert("P"), format="PNG", transparency=3)]
    pictures += [save(grey.convert(mode), format="JPEG", exif=exif) for mode in ("L", "RGB", "CMYK")]
    pictures += [save(grey, format="JPEG", progressive=True), save(grey.convert("RGB"), format="JPEG", comment=b"x")]
    pictures += [save(grey, format="MPO", save_all=True, append_images=[grey]), save(grey, format="GIF")]
    return pictures


PICTURES = make_pictures()
PNGS = [picture for picture in PICTURES if picture.startswith(b"\x89PNG")]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def chunks(picture: bytes) -> list[tuple[bytes, bytes]]:
    """The kind and the content of each chunk of a PNG."""
    found, at = [], 8
    while at < len(picture):
        (length,) = struct.unpack_from(">I", picture, at)
        found.append((picture[at + 4 : at + 8], picture[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png(parts: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@st.composite
def changed_pngs(draw: st.DrawFn) -> bytes:
    """A PNG with faults in its chunks, whose checksums are right."""
    parts = chunks(draw(st.sampled_from(PNGS)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(parts) - 1))
        kind, content = parts[at]
        match draw(st.sampled_from(["content", "kind", "more", "size", "drop"])):
            case "content":
                parts[at] = (kind, draw(damaged(content)))
            case "kind":
                parts[at] = (draw(st.binary(min_size=4, max_size=4)), content)
            case "more":
                names = ["tRNS", "PLTE", "gAMA", "cHRM", "iCCP", "sRGB", "tEXt", "zTXt", "iTXt", "eXIf", "pHYs", "IDAT"]
                names += ["acTL", "fcTL", "fdAT", "IHDR", "IEND"]
                parts.insert(at, (draw(st.sampled_from(names)).encode(), draw(st.binary(max_size=40))))
            case "size" if parts[0][0] == b"IHDR":
                side = st.sampled_from([0, 1, 29, 9000, 100_000, 2**31 - 1, 2**32 - 1])
                parts[0] = (b"IHDR", struct.pack(">2I", draw(side), draw(side)) + parts[0][1][8:])
            case "drop" if len(parts) > 1:
                del parts[at]
    return png(parts)


def test_pictures(try_all: TryAll, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        image, inverted = read_image(path, (28, 28))
        assert (image.dtype, image.shape) == (np.uint8, (28, 28))
        assert isinstance(inverted, bool)

    files = st.sampled_from(PICTURES).flatmap(damaged) | changed_pngs()
    files |= st.binary(max_size=100).map(lambda content: PNGS[0][:8] + content) | st.binary(max_size=100)
    try_all(files, lambda content: unchanged(tmp_path / "picture", content, read), 200)


# --- params that are valid, and extreme


SETS = {size: make_images(np.arange(size, dtype=np.uint8) % 10, np.random.default_rng(0)) for size in (1, 2, 41)}
SETS[3] = np.full((3, 28, 28), 255, np.uint8)
EXTREMES = {
    "seed": st.sampled_from([0, 2**32 - 1]) | st.integers(0, 2**32 - 1),
    "validation_size": st.sampled_from([0, 0, 0, 1, 2, 40, 1_000_000]),
    "lr": st.sampled_from([5e-324, 1e-38, 1, 100]) | st.floats(0, 100, exclude_min=True),
    "batch_size": st.sampled_from([1, 1, 1, 2, 3, 40, 41, 1_000_000]),
    "epochs": st.integers(1, 2),
    "schedule": st.sampled_from(["one_cycle", "constant"]),
    "warmup_fraction": st.sampled_from([0, 5e-324, 1 - 2**-53, 1]) | st.floats(0, 1),
    "activation": st.sampled_from(["sigmoid", "relu"]),
    "init": st.sampled_from(["xavier", "default"]),
    "standardize": st.booleans(),
    "checkpoint_epochs": st.sampled_from([0, 1, 2, 1_000_000]),
    "device": st.just("cpu"),
    "threads": st.just(1),
    "bits": st.sampled_from(["portable", "native"]),
}
extreme_params = st.fixed_dictionaries(
    {key: EXTREMES.get(key, st.just(value)) for key, value in VALUES["train"].items()}
)


def train_model(dataset: Dataset, params: Train) -> tuple[LeNet, list[dict]]:
    device = set_up_device("cpu", 1)
    reported: list[int] = []
    model, history = train(
        dataset, params, device, Checkpoint(params, dataset, device), lambda rows: reported.append(len(rows))
    )
    assert reported == sorted({*reported})
    assert 0 not in reported
    return model, history


def test_extreme_params(try_all: TryAll, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They either give a model that can be written, read and evaluated, or are refused."""
    monkeypatch.chdir(tmp_path)

    def claim(case: tuple[int, dict[str, Any]]) -> None:
        size, values = case
        dataset = Dataset(SETS[size], np.arange(size, dtype=np.uint8) % 10, CLASSES)
        model, history = train_model(dataset, Train.model_validate(values))
        assert len(history) == values["epochs"]
        assert np.isfinite([list(row.values()) for row in history]).all()
        write_model(tmp_path / "model", model)
        logits = predict(read_model(tmp_path / "model"), torch.from_numpy(dataset.images), values["batch_size"])
        bins = bin_confidence(dataset.labels, logits.softmax(1).numpy())
        assert sum(row["images"] for row in bins) == size

    try_all(st.tuples(st.sampled_from([1, 2, 3, 41, 41, 41]), extreme_params), claim, 40)


def test_a_last_step_that_breaks_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss, computed before the step, is finite, and there may be no validation split to show it."""
    monkeypatch.chdir(tmp_path)
    values = VALUES["train"] | {"validation_size": 0, "epochs": 1, "batch_size": 41, "schedule": "constant"}
    params = Train.model_validate(values).model_copy(update={"lr": 1e39})
    with pytest.raises(StageError, match=r"found infinite weights in epoch 1; try a train\.lr below 1e\+39"):
        train_model(Dataset(SETS[41], np.arange(41, dtype=np.uint8) % 10, CLASSES), params)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_numbers_that_overflow_inside_the_model_are_refused() -> None:
    model = LeNet("relu", CLASSES, (28, 28))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1e38)
    with pytest.raises(StageError, match="expected finite numbers from the model"):
        predict(model, torch.from_numpy(SETS[2]), 2)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "name", ["$\\frac$", "a_b^{$x$}", "50 $", "\\", "<b>&amp;", "%s {0}", "W" * 40, "日本", "=1+1", '"', "mean"]
)
def test_every_name_that_a_class_may_have_can_be_written_and_drawn(name: str, tmp_path: Path) -> None:
    classes = [name, *CLASSES[1:9], name[1:] + "$"]
    Fetch.model_validate(VALUES["fetch"] | {"classes": classes})
    labels = np.arange(10, dtype=np.uint8)
    probabilities = np.full((10, 10), 0.1, np.float32)
    rows = score_classes(labels, labels[::-1], classes)
    write_predictions(tmp_path / "predictions.parquet", labels, labels[::-1], probabilities, classes)
    write_png(tmp_path / "confusion.png", plot_confusion(labels, labels[::-1], classes))
    write_png(tmp_path / "per_class.png", plot_per_class(rows))
    images = np.zeros((10, 28, 28), np.uint8)
    write_png(tmp_path / "mistakes.png", plot_mistakes(images, labels, probabilities, classes))


@pytest.mark.parametrize("name", [*RESERVED, CLASSES[1], " a", "a  b", "", "a\nb", "\x1b[31m", "x" * 41])
def test_a_name_that_would_break_a_table_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        Fetch.model_validate(VALUES["fetch"] | {"classes": [name, *CLASSES[1:]]})


# --- files that would take all memory

BOMBS = """
import gzip, os, re, resource, struct, sys, time, zlib
from pathlib import Path

from commands.predict import read_image
from stages import fetch
from stages.dataset import read_dataset
from stages.params import File, read_params
from stages.stage import StageError

path = Path(sys.argv[1])
file = File(name=path.name, bytes=1000, sha256="0" * 64)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\\x89PNG\\r\\n\\x1a\\n" + header + b"".join(chunks)


def zeros(wbits):
    packer = zlib.compressobj(1, wbits=wbits)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(400)) + packer.flush()


def read_grey(path):
    return read_image(path, (28, 28))


def laughs(kind):
    line = {"list": "a%d: &a%d [%s]", "merge": "a%d: &a%d {<<: [%s]}"}[kind]
    return "a0: &a0 {lol: lol}\\n" + "\\n".join(line % (n, n, ", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 12))


params = Path("params.yaml").read_text()
claims_too_much = gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 28, 28) + bytes(984))
with_profile = png(1, 1, chunk(b"iCCP", b"x\\0\\0" + zeros(15)), chunk(b"IDAT", zlib.compress(bytes(4))))
huge = png(100_000, 100_000, chunk(b"IDAT", zeros(15)))
bombs = {
    "YAML aliases": (laughs("list"), read_params, "anchors"),
    "YAML merges": (laughs("merge"), read_params, "anchors"),
    "YAML of 300 MB": (300 << 20, read_params, "at most 100,000 bytes"),
    "YAML, deep": ("[" * 90_000, read_params, "at most 20 deep"),
    "bytes: 2^62": (re.sub("(?<=bytes: )[0-9]+", str(2**62), params), read_params, "less than or equal to 1073741824"),
    "gzip": (zeros(31), lambda path: fetch.unpack(path.read_bytes(), file), "found more"),
    "file of 300 MB": (300 << 20, lambda path: fetch.read(path.parent, file), "longer than"),
    "IDX": (claims_too_much, lambda path: fetch.parse_idx(fetch.unpack(path.read_bytes(), file)), "SHA-256"),
    "IDX, unpacked": (gzip.decompress(claims_too_much), lambda path: fetch.parse_idx(path.read_bytes()), "for an"),
    "PNG of 100,000 x 100,000": (huge, read_grey, "at most 89,478,485 pixels"),
    "PNG with a profile of 400 MB": (with_profile, read_grey, "damaged|Decompressed data too large"),
    "safetensors": (struct.pack("<Q", 2**62) + b"{}", read_dataset, "not a data set"),
}
before = resource.getrlimit(resource.RLIMIT_AS)
for name, (content, read, expected) in bombs.items():
    if isinstance(content, int):
        path.touch()
        os.truncate(path, content)  # a hole takes no disk
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    del content
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (150 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    start = time.process_time()
    try:
        read(path)
    except StageError as error:
        assert any(part in str(error) for part in expected.split("|")), (name, str(error))
    else:
        sys.exit(f"{name}: accepted")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < 10, name
    path.unlink()
print(len(bombs))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory (RLIMIT_AS)")
def test_a_small_file_that_would_fill_the_memory_is_refused_within_150_mb(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BOMBS), str(tmp_path / "bomb")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    record_property("inputs tried", int(result.stdout))


# --- the commands themselves


@pytest.mark.parametrize("text", ["&a [*a]", re.sub("seed: .*", "seed: " + "9" * 5000, TEXT)])
def test_a_stage_says_what_is_wrong_with_params_in_one_line(text: str, new_project: Project) -> None:
    (new_project.folder / "params.yaml").write_text(text)
    before = new_project.run("git", "status", "--porcelain").stdout
    outs = ["--train", "data/fashion-mnist/train.safetensors", "--test", "data/fashion-mnist/test.safetensors"]
    check_command(new_project.run("python", "-m", "stages.fetch", *outs, check=False))
    assert new_project.run("git", "status", "--porcelain").stdout == before


def test_train_says_what_is_wrong_with_params_in_one_line(new_project: Project) -> None:
    new_project.set("train.threads", 10**9)
    outs = ["--model", "m", "--metrics", "j", "--history", "h", "--plots", "p"]
    result = new_project.run("python", "-m", "stages.train", "data", *outs, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert result.stderr == (
        "error: params.yaml has 1 mistake(s):\n  train.threads: expected less than or equal to 1024, found 1000000000\n"
    )
    assert not any((new_project.folder / name).exists() for name in "mjhp")


@pytest.mark.parametrize("content", [b"", PNGS[2][:-30], PICTURES[-1], PNGS[4][:60] + b"\xff" * 99])
def test_predict_says_what_is_wrong_with_a_picture_in_one_line(
    content: bytes, fresh_project: Project, tmp_path: Path
) -> None:
    (tmp_path / "picture.png").write_bytes(content)
    check_command(fresh_project.command("predict", str(tmp_path / "picture.png"), check=False))


def check_command(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    check_message(line)
