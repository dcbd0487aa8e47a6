"""Get Fashion-MNIST, verified byte for byte, from the first source that has it.

    python -m stages.fetch --train data/fashion-mnist/train.safetensors --test data/fashion-mnist/test.safetensors

Sources, in order: the folder named by FASHION_MNIST_DIR; the folder of Debian's package dataset-fashion-mnist;
fetch.mirrors; and, if apt-get exists, that package downloaded with it (this needs no root).
"""

import argparse
import contextlib
import hashlib
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from stages import stage

if __name__ == "__main__":
    stage.prepare()

import numpy as np
import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from stages.dataset import Dataset, check_dataset, write_dataset
from stages.params import Fetch, File, read_params
from stages.stage import StageError, hide_credentials, shorten

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
CONNECT_SECONDS, READ_SECONDS = 10, 30
# A mirror that is slower than this many bytes in this many seconds is abandoned.
LOWEST_BYTES, LOWEST_SECONDS = 300_000, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="training set to write (safetensors)")
    parser.add_argument("--test", type=Path, required=True, help="test set to write (safetensors)")
    args = parser.parse_args()
    params = read_params()

    contents = fetch(params.fetch)
    for path, part in ((args.train, "train"), (args.test, "test")):
        images, labels = (parse_idx(contents[f"{part}_{kind}"]) for kind in ("images", "labels"))
        check_dataset(f"{part} set", images, labels, params.fetch.classes)
        write_dataset(path, Dataset(images, labels, params.fetch.classes))
        print(f"{path}: {len(images):,} images")


# A source: its name, and a function from a file's entry in params to its gzip bytes, which may raise.
Source = tuple[str, Callable[[File], bytes]]


def sources(params: Fetch) -> Iterator[Source]:
    """Yield the sources in the order they are tried."""
    if folder := os.environ.get("FASHION_MNIST_DIR"):
        yield f"FASHION_MNIST_DIR ({folder})", partial(read, Path(folder))
    if DEBIAN_DIR.is_dir():
        yield str(DEBIAN_DIR), partial(read, DEBIAN_DIR)
    for mirror in params.mirrors:
        yield mirror, partial(download, mirror)
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        with tempfile.TemporaryDirectory() as folder:
            package = DebianPackage(Path(folder))
            yield f"apt-get download {DEBIAN_PACKAGE}", package.read


def fetch(params: Fetch) -> dict[str, bytes]:
    """Return the verified content of each file by its key, and print which source completed the set.

    Raises StageError if all sources fail, with the reason of each.
    """
    wanted = {key: getattr(params.files, key) for key in type(params.files).model_fields}
    contents: dict[str, bytes] = {}
    failures = []
    for name, read in sources(params):
        try:
            for key in wanted.keys() - contents.keys():
                contents[key] = unpack(read(wanted[key]), wanted[key])
        # requests raises OSErrors, a ValueError for a redirect without an address and a TypeError for a proxy without
        # a host; urllib3's errors come from the body.
        except (StageError, OSError, ValueError, TypeError, HTTPError, subprocess.SubprocessError) as error:
            # A proxy's address may contain a password.
            failures.append(shorten(hide_credentials(f"{name}: {error}"), 600))
            print(f"not from {failures[-1]}", file=sys.stderr)
        else:
            print(f"fetched from {name}")
            return contents
    raise StageError("\n  ".join(["no source has the data set; put its files into FASHION_MNIST_DIR:", *failures]))


def read(folder: Path, file: File) -> bytes:
    """Read a gzip file. Raises OSError if that fails, or StageError if it is too long or not a regular file."""
    path = folder / file.name
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise StageError(f"{path} is not a file")
    check_length(status.st_size, file)
    return path.read_bytes()


def download(mirror: str, file: File) -> bytes:
    """Download a gzip file, with a progress bar on a terminal.

    Raises requests.RequestException, urllib3's HTTPError or ValueError, or StageError for a response that is too long
    or too slow.
    """
    content = io.BytesIO()
    with (
        give_up_when_slow(content),
        requests.get(
            f"{mirror.rstrip('/')}/{file.name}",
            stream=True,
            timeout=(CONNECT_SECONDS, READ_SECONDS),
            hooks={"response": drop_redirect_body},
        ) as response,
    ):
        response.raise_for_status()
        length = response.raw.length_remaining
        check_length(length or 0, file)
        with tqdm(desc=file.name, total=length, unit="B", unit_scale=True, disable=None) as bar:
            # The files are gzip already: a server may declare that as the encoding, so take the bytes as sent.
            # read1, since stream() waits for 64 KiB, and accepts a chunk-size line of any length.
            while chunk := response.raw.read1(1 << 16, decode_content=False):
                content.write(chunk)
                bar.update(len(chunk))
                check_length(content.tell(), file)
    return content.getvalue()


def drop_redirect_body(response: requests.Response, **_: object) -> None:
    """Drop the body of a redirect: requests would read all of it, however long."""
    if response.is_redirect and response.headers["Location"]:  # it does not follow an empty one
        response.raw.close()
        response.raw = io.BytesIO()


@contextlib.contextmanager
def give_up_when_slow(content: io.BytesIO) -> Iterator[None]:
    """Raise StageError in this context when `content` grows by less than LOWEST_BYTES in LOWEST_SECONDS.

    A timer signal does this (in the main thread, where a stage runs), since requests' timeout applies to each receive:
    a server that sends a byte now and then, even of its headers or TLS handshake, could continue for ever.
    """
    seen = 0

    def check(*_: object) -> None:
        nonlocal seen
        if content.tell() - seen < LOWEST_BYTES:
            raise StageError(f"too slow: under {LOWEST_BYTES:,} bytes in {LOWEST_SECONDS:g} s")
        seen = content.tell()

    former = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, LOWEST_SECONDS, LOWEST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


class DebianPackage:
    """Debian's package of the data set, downloaded and unpacked into `folder` when first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def read(self, file: File) -> bytes:
        unpacked = self.folder / "root"
        if not unpacked.exists():
            lists, cache = self.folder / "lists", self.folder / "cache"
            (lists / "partial").mkdir(parents=True)
            (cache / "archives/partial").mkdir(parents=True)
            options = [f"-oDir::State::Lists={lists}", f"-oDir::Cache={cache}", "-oDebug::NoLocking=1", "-q"]
            for command in ("update", f"download {DEBIAN_PACKAGE}"):
                self._run(["apt-get", *options, *command.split()])
            archives = list(self.folder.glob("*.deb"))
            if not archives:
                raise StageError("apt-get left no package behind")
            self._run(["dpkg-deb", "-x", str(archives[0]), str(unpacked)])
        path = unpacked / DEBIAN_DIR.relative_to("/") / file.name
        if path.resolve() != path or not path.is_file():  # a link leads out of the folder, a pipe never ends
            raise StageError(f"expected the package to have a regular file {file.name}, found none")
        return read(path.parent, file)

    def _run(self, command: list[str]) -> None:
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, errors="replace", timeout=300)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if line.startswith("E:")]
            raise StageError(f"{command[0]} failed: {lines[-1] if lines else result.returncode}")


def packed_limit(file: File) -> int:
    """The most bytes that the gzip file can have: gzip adds some 0.01 % and a header to incompressible data."""
    return file.bytes + file.bytes // 1000 + 65536


def check_length(length: int, file: File) -> None:
    """Raise StageError if a gzip file is longer than it can be."""
    if length > packed_limit(file):
        raise StageError(f"{file.name} is longer than the {packed_limit(file):,} bytes it can have")


def unpack(packed: bytes, file: File) -> bytes:
    """Return the verified content of a gzip file, never holding more of it than the bytes it should have.

    Raises StageError with what was found instead.
    """
    if packed[:2] != b"\x1f\x8b":
        raise StageError(f"{file.name} is not a gzip file: it starts with {packed[:24]!r}")
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        content = inflater.decompress(packed, file.bytes + 1)
    except zlib.error as error:
        raise StageError(f"{file.name} is damaged: {error}") from None
    if len(content) != file.bytes or not inflater.eof:
        found = "more" if len(content) > file.bytes or inflater.unconsumed_tail else f"{len(content):,}, cut short"
        raise StageError(f"{file.name}: expected {file.bytes:,} bytes unpacked, found {found}")
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise StageError(f"{file.name}: expected SHA-256 {file.sha256}, found {found}")
    return content


def parse_idx(content: bytes) -> np.ndarray:
    """Parse an IDX file of unsigned bytes: uint8 array of 1 to 4 dimensions.

    Raises StageError if the header does not match the content.
    Source: http://yann.lecun.com/exdb/mnist/, "the IDX file format".
    """
    dimensions = content[3] if len(content) > 3 else 0
    header = 4 + 4 * dimensions
    if len(content) < header or content[:3] != bytes([0, 0, 8]) or not 1 <= dimensions <= 4:
        raise StageError(f"expected an IDX file of uint8 in 1 to 4 dimensions, found {content[:4]!r}")
    shape = [int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4)]
    expected = header + int(np.prod(shape, dtype=object))
    if 0 in shape:
        raise StageError(f"expected an IDX file that is not empty, found one of shape {shape}")
    if len(content) != expected:
        raise StageError(f"expected {expected:,} bytes for an IDX file of shape {shape}, found {len(content):,}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


if __name__ == "__main__":
    stage.run(main)
