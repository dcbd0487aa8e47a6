"""fetch tries each source in turn, trusts none, and reports what was wrong with each."""

import contextlib
import gzip
import hashlib
import http.server
import os
import shutil
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from support.data import TEST_SIZE, TRAIN_SIZE, make_idx
from support.project import ROOT

from stages import fetch
from stages.dataset import read_dataset
from stages.params import Fetch, File, read_params
from stages.stage import StageError


@pytest.fixture
def no_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)


@pytest.fixture
def params(tiny_files: dict[str, bytes], mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """The section fetch for the tiny files, on a machine without Debian's package."""
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setattr(fetch, "DEBIAN_DIR", tmp_path / "debian")
    files = read_params(ROOT / "params.yaml").fetch.files
    entries = {
        key: File(name=getattr(files, key).name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for key, content in tiny_files.items()
    }
    classes = [str(digit) for digit in range(10)]
    return Fetch(mirrors=[mirror], files=type(files)(**entries), classes=classes)


class Fetched(NamedTuple):
    source: str  # its name in the one line on standard output
    contents: dict[str, bytes]
    errors: str  # standard error


@pytest.fixture
def fetched(capsys: pytest.CaptureFixture[str]) -> Callable[[Fetch], Fetched]:
    """Call fetch, which must print one line with the source of the data set."""

    def call(params: Fetch) -> Fetched:
        contents = fetch.fetch(params)
        said = capsys.readouterr()
        (line,) = said.out.splitlines()
        assert line.startswith("fetched from ")
        return Fetched(line.removeprefix("fetched from "), contents, said.err)

    return call


def fill(folder: Path, params: Fetch, contents: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for key, content in contents.items():
        (folder / getattr(params.files, key).name).write_bytes(gzip.compress(content))


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def bad_mirror() -> Iterator[Callable[[Answer], str]]:
    """Start a server that answers every request by a function; return its address.

    The function may continue until the client hangs up.
    """
    servers = []

    def start(answer: Answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def respond(body: bytes, length: int | None = None, status: int = 200) -> Answer:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        request.wfile.write(body)

    return answer


def say(text: bytes, again: bytes = b"", pause: float = 0.0) -> Answer:
    """Send one text, and then another one for ever."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(text)
        while again:
            request.wfile.write(again)
            time.sleep(pause)

    return answer


def stall(request: http.server.BaseHTTPRequestHandler) -> None:
    request.connection.recv(1)  # the client hung up


def reset(request: http.server.BaseHTTPRequestHandler) -> None:
    """Send the beginning of a file, then reset the connection."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n\x1f\x8b")
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.shutdown(socket.SHUT_RD)
    request.connection.close()


OK = b"HTTP/1.1 200 OK\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nLocation: "
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
PACKED = gzip.compress(b"x" * 100)
TOO_SLOW = "too slow: under 300,000 bytes in 2 s"


def test_the_environment_s_folder_comes_first(
    params: Fetch,
    tiny_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fetched: Callable[[Fetch], Fetched],
) -> None:
    fill(tmp_path / "mine", params, tiny_files)
    fill(tmp_path / "debian", params, tiny_files)
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path / "mine"))
    source, contents, _ = fetched(params)
    assert source == f"FASHION_MNIST_DIR ({tmp_path / 'mine'})"
    assert contents == tiny_files


def test_debian_s_folder_comes_before_the_mirrors(
    params: Fetch, tiny_files: dict[str, bytes], tmp_path: Path, fetched: Callable[[Fetch], Fetched]
) -> None:
    fill(tmp_path / "debian", params, tiny_files)
    assert fetched(params)[:2] == (str(tmp_path / "debian"), tiny_files)


def test_a_mirror_serves_when_no_folder_does(
    params: Fetch, tiny_files: dict[str, bytes], mirror: str, fetched: Callable[[Fetch], Fetched]
) -> None:
    assert fetched(params)[:2] == (mirror, tiny_files)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (respond(b"<!DOCTYPE html><p>Sign in to this network"), "is not a gzip file: it starts with b'<!DOCTYPE html>"),
        (respond(gzip.compress(b"x" * 100)[:-12]), "damaged|cut short"),
        (respond(gzip.compress(b"x" * 100), length=10_000), "Connection broken|IncompleteRead|cut short"),
        (respond(gzip.compress(bytes(4_000_000))), "found more"),
        (respond(b"\x1f\x8b" + bytes(4_000_000)), "is longer than"),
        (respond(b"\x1f\x8b" + b"\xff" * 100), "is damaged"),
        (respond(b"", status=404), "404"),
        (respond(b"", status=500), "500"),
        (respond(PACKED, length=10), "damaged|cut short"),
        (respond(PACKED, length=-1), "unpacked, found 100, cut short"),
        (say(OK + b"Content-Length: 1e3\r\n\r\n" + PACKED), "unpacked, found 100, cut short"),
        (say(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + PACKED), "unpacked, found 100, cut short"),
        (say(OK + b"Content-Length: " + b"9" * 4000 + b"\r\n\r\n" + PACKED), "is longer than"),
    ],
    ids=[
        "html",
        "truncated",
        "short",
        "bomb",
        "long",
        "garbage",
        "404",
        "500",
        "less",
        "negative",
        "no number",
        "long number",
        "huge",
    ],
)
def test_a_wrong_answer_is_reported_and_the_next_source_tried(
    answer: Answer,
    reason: str,
    params: Fetch,
    tiny_files: dict[str, bytes],
    mirror: str,
    bad_mirror: Callable[[Answer], str],
    fetched: Callable[[Fetch], Fetched],
) -> None:
    bad = bad_mirror(answer)
    source, contents, errors = fetched(params.model_copy(update={"mirrors": [bad, mirror]}))
    assert source == mirror
    assert contents == tiny_files
    (line,) = [line for line in errors.splitlines() if line.startswith("not from ")]
    assert line.startswith(f"not from {bad}: ")
    assert any(word in line for word in reason.split("|")), line


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (stall, "Read timed out"),
        (say(OK + b"Content-Length: 60000\r\n\r\n\x1f\x8b", b"x", 0.02), TOO_SLOW),
        (say(OK + b"\r\n\x1f\x8b", b"x", 0.02), TOO_SLOW),
        (say(CHUNKED, b"1\r\nx\r\n", 0.02), TOO_SLOW),
        (say(CHUNKED, b"1", 0.02), TOO_SLOW),
        (say(OK + b"X-Header: ", b"x", 0.02), TOO_SLOW),
        (say(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02), TOO_SLOW),
        (say(MOVED + b"/\r\n\r\n", b"x", 0.02), "Exceeded 30 redirects"),
        (say(MOVED + b"/\r\n\r\n", bytes(1 << 20)), "Exceeded 30 redirects"),
        (say(MOVED + b"/\r\nContent-Length: 0\r\n\r\n"), "Exceeded 30 redirects"),
        (say(MOVED + b"file:///etc/passwd\r\n\r\n"), "No connection adapters"),
        (say(MOVED + b"\xff\r\n\r\n"), "codec can't decode"),
        (say(MOVED + b"http://[\r\n\r\n"), "Invalid IPv6 URL"),
        (say(MOVED + b"\r\n\r\nnowhere"), "is not a gzip file: it starts with b'nowhere'"),
        (say(OK + b"\r\n\x1f\x8b", bytes(1 << 20)), "is longer than"),
        (say(CHUNKED, b"1" * 65536), "IncompleteRead|Connection broken"),
        (say(OK + b"X-Header: ", b"x" * 65536), "got more than 65536 bytes"),
        (say(OK, b"X-Header: x\r\n" * 1000), "got more than"),
        (reset, "reset by peer"),
        (say(b""), "without response"),
    ],
    ids=[
        "stall",
        "drip",
        "drip without length",
        "drip of chunks",
        "drip of a chunk's length",
        "drip of headers",
        "drip of answers",
        "drip at a redirect",
        "much at a redirect",
        "redirects",
        "redirect to a file",
        "redirect to no text",
        "redirect to no address",
        "redirect to nothing",
        "much",
        "long length of a chunk",
        "long header",
        "many headers",
        "reset",
        "nothing",
    ],
)
def test_a_slow_or_endless_mirror_costs_little_time_and_memory(
    answer: Answer,
    reason: str,
    params: Fetch,
    tiny_files: dict[str, bytes],
    mirror: str,
    bad_mirror: Callable[[Answer], str],
    monkeypatch: pytest.MonkeyPatch,
    fetched: Callable[[Fetch], Fetched],
) -> None:
    monkeypatch.setattr(fetch, "LOWEST_SECONDS", 2.0)
    monkeypatch.setattr(fetch, "READ_SECONDS", 0.5)
    start = time.monotonic()
    tracemalloc.start()
    source, contents, errors = fetched(params.model_copy(update={"mirrors": [bad_mirror(answer), mirror]}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - start < 20
    assert peak < 30_000_000
    assert (source, contents) == (mirror, tiny_files)
    (line,) = [line for line in errors.splitlines() if line.startswith("not from ")]
    assert any(word in line for word in reason.split("|")), line
    assert len(line) < 500


def serve(params: Fetch, tiny_files: dict[str, bytes], header: bytes, pieces: int = 1, pause: float = 0.0) -> Answer:
    """Send the file that is asked for, in some pieces."""
    names = {getattr(params.files, key).name: gzip.compress(content) for key, content in tiny_files.items()}

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        packed = names[request.path.removeprefix("/")]
        size = -(-len(packed) // pieces)
        request.wfile.write(OK + header + b"\r\n")
        for start in range(0, len(packed), size):
            piece = packed[start : start + size]
            request.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if b"chunked" in header else piece)
            time.sleep(pause)
        if b"chunked" in header:
            request.wfile.write(b"0\r\n\r\n")

    return answer


@pytest.mark.parametrize("header", [b"", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n"])
def test_a_mirror_may_omit_the_length_and_declare_an_encoding(
    header: bytes,
    params: Fetch,
    tiny_files: dict[str, bytes],
    bad_mirror: Callable[[Answer], str],
    fetched: Callable[[Fetch], Fetched],
) -> None:
    url = bad_mirror(serve(params, tiny_files, header, pieces=3))
    assert fetched(params.model_copy(update={"mirrors": [url]}))[:2] == (url, tiny_files)


def test_a_mirror_may_redirect(
    params: Fetch,
    tiny_files: dict[str, bytes],
    mirror: str,
    bad_mirror: Callable[[Answer], str],
    fetched: Callable[[Fetch], Fetched],
) -> None:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(MOVED + mirror.encode() + request.path.encode() + b"\r\n\r\nelsewhere")

    url = bad_mirror(answer)
    assert fetched(params.model_copy(update={"mirrors": [url]}))[:2] == (url, tiny_files)


def test_a_mirror_at_the_lowest_rate_serves(
    params: Fetch,
    tiny_files: dict[str, bytes],
    bad_mirror: Callable[[Answer], str],
    monkeypatch: pytest.MonkeyPatch,
    fetched: Callable[[Fetch], Fetched],
) -> None:
    monkeypatch.setattr(fetch, "LOWEST_SECONDS", 0.3)
    monkeypatch.setattr(fetch, "LOWEST_BYTES", 10)
    url = bad_mirror(serve(params, tiny_files, b"", pieces=6, pause=0.12))
    assert fetched(params.model_copy(update={"mirrors": [url]}))[:2] == (url, tiny_files)


@pytest.mark.usefixtures("no_apt")
def test_a_failure_leaves_nothing_behind_and_the_next_try_works(
    params: Fetch,
    mirror: str,
    bad_mirror: Callable[[Answer], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "data"
    monkeypatch.setattr("sys.argv", ["fetch", "--train", str(folder / "train"), "--test", str(folder / "test")])
    monkeypatch.setattr(fetch, "read_params", lambda: mock.Mock(fetch=params))
    before = sorted(tmp_path.rglob("*"))
    for answer in (reset, respond(b"", status=503), serve(params, {}, b"")):
        params = params.model_copy(update={"mirrors": [bad_mirror(answer)]})
        with pytest.raises(StageError, match="no source has the data set"):
            fetch.main()
        assert sorted(tmp_path.rglob("*")) == before
    params = params.model_copy(update={"mirrors": [mirror]})
    fetch.main()
    assert [path.name for path in sorted(folder.iterdir())] == ["test", "train"]
    assert len(read_dataset(folder / "train").images) == TRAIN_SIZE


@pytest.mark.parametrize("kind", ["folder", "pipe", "long"])
def test_a_folder_a_pipe_or_an_excessive_file_is_not_read(
    kind: str,
    params: Fetch,
    tiny_files: dict[str, bytes],
    mirror: str,
    tmp_path: Path,
    fetched: Callable[[Fetch], Fetched],
) -> None:
    path = tmp_path / "debian" / params.files.train_images.name
    fill(tmp_path / "debian", params, {key: content for key, content in tiny_files.items() if key != "train_images"})
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening it would wait for a writer
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    assert fetched(params)[:2] == (mirror, tiny_files)


@pytest.mark.usefixtures("no_apt")
def test_other_content_is_refused_by_its_checksum(params: Fetch, tiny_files: dict[str, bytes], tmp_path: Path) -> None:
    last = tiny_files["test_labels"][-1]
    fill(tmp_path / "debian", params, tiny_files | {"test_labels": tiny_files["test_labels"][:-1] + bytes([last ^ 1])})
    with pytest.raises(StageError, match=r"t10k-labels.*expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        fetch.fetch(params.model_copy(update={"mirrors": []}))


@pytest.mark.usefixtures("no_apt")
def test_if_all_sources_fail_each_is_listed_with_its_reason(
    params: Fetch, bad_mirror: Callable[[Answer], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path / "nowhere"))
    mirrors = [bad_mirror(respond(b"", status=503)), "http://127.0.0.1:1"]
    with pytest.raises(StageError) as raised:
        fetch.fetch(params.model_copy(update={"mirrors": mirrors}))
    first, *reasons = str(raised.value).splitlines()
    assert "FASHION_MNIST_DIR" in first
    for line, (source, reason) in zip(
        reasons,
        [("FASHION_MNIST_DIR", "No such file"), (mirrors[0], "503"), (mirrors[1], "refused")],
        strict=True,
    ):
        assert source in line
        assert reason in line


@pytest.mark.skipif(not shutil.which("apt-get"), reason="apt-get is Debian's")
def test_debian_s_package_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package and the real data: the only test that needs a network, for Debian's packages."""
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    params = read_params(ROOT / "params.yaml").fetch.model_copy(update={"mirrors": []})
    *_, (name, read) = fetch.sources(params)
    assert name == "apt-get download dataset-fashion-mnist"
    assert len(fetch.unpack(read(params.files.test_labels), params.files.test_labels)) == 10_008


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08\x03",
        struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 28, 28) + bytes(784),
        struct.pack(">4B3I", 0, 0, 9, 3, 1, 28, 28) + bytes(784),
        struct.pack(">4B3I", 0, 0, 8, 3, 1, 28, 28) + bytes(783),
        struct.pack(">4B5I", 0, 0, 8, 5, 1, 1, 1, 28, 28) + bytes(784),
    ],
)
def test_an_idx_file_that_does_not_fit_its_header_is_refused(content: bytes) -> None:
    with pytest.raises(StageError, match="expected"):
        fetch.parse_idx(content)


def test_idx_is_parsed_as_torchvision_does(params: Fetch, tiny_files: dict[str, bytes], tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for key, content in tiny_files.items():
        (raw / getattr(params.files, key).name.removesuffix(".gz")).write_bytes(content)
    for part, size in (("train", TRAIN_SIZE), ("test", TEST_SIZE)):
        reference = FashionMNIST(str(tmp_path), train=part == "train")
        assert np.array_equal(fetch.parse_idx(tiny_files[f"{part}_images"]), reference.data.numpy())
        assert np.array_equal(fetch.parse_idx(tiny_files[f"{part}_labels"]), reference.targets.numpy())
        assert len(reference) == size


def test_make_idx_and_parse_idx_are_inverse() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(fetch.parse_idx(make_idx(array)), array)
