"""Get Fashion-MNIST, verified byte for byte, from the first source that has it.

    python -m stages.fetch --train data/fashion-mnist/train.safetensors --test data/fashion-mnist/test.safetensors

Sources, in order: the folder FASHION_MNIST_DIR names; the folder of Debian's package dataset-fashion-mnist;
fetch.mirrors; and, where apt-get exists, that package downloaded with it (this needs no root).
"""

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from stages import stage, tracking

if __name__ == "__main__":
    stage.prepare()
    tracking.start_recorder()  # its imports take as long as those that follow

import numpy as np
import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from stages.dataset import Dataset, check_dataset, write_dataset
from stages.params import Fetch, File, read_params
from stages.stage import StageError, hide_credentials

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
CONNECT_SECONDS, READ_SECONDS = 10, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="training set to write (safetensors)")
    parser.add_argument("--test", type=Path, required=True, help="test set to write (safetensors)")
    args = parser.parse_args()
    params = read_params()

    with tracking.run("fetch") as run:
        source, contents = fetch(params.fetch)
        run.set_tag("source", source)
        for path, part in ((args.train, "train"), (args.test, "test")):
            images = parse_idx(contents[f"{part}_images"], dimensions=3)
            labels = parse_idx(contents[f"{part}_labels"], dimensions=1)
            check_dataset(f"{part} set", images, labels)
            write_dataset(path, Dataset(images, labels, params.fetch.classes))
            print(f"{path}: {len(images):,} images")


# A source: its name, and a function from a file's entry in params to its gzip bytes, which may raise.
Source = tuple[str, Callable[[File], bytes]]


def sources(params: Fetch) -> Iterator[Source]:
    """Yield the sources in the order in which they are tried."""
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


def fetch(params: Fetch) -> tuple[str, dict[str, bytes]]:
    """Return the name of the source that completed the set, and the verified content of each file by its key.

    Raises StageError that names each source and its reason when all fail.
    """
    wanted = {key: getattr(params.files, key) for key in type(params.files).model_fields}
    contents: dict[str, bytes] = {}
    failures = []
    for name, read in sources(params):
        try:
            for key in wanted.keys() - contents.keys():
                contents[key] = unpack(read(wanted[key]), wanted[key])
        # requests' errors are OSErrors, but a TypeError for a proxy without a host; urllib3's come from the body.
        except (StageError, OSError, TypeError, HTTPError, subprocess.SubprocessError) as error:
            failures.append(hide_credentials(f"{name}: {error}"))  # a proxy's address may have a password
            print(f"not from {failures[-1]}", file=sys.stderr)
        else:
            print(f"fetched from {name}")
            return name, contents
    raise StageError("\n  ".join(["no source has the data set; put its files into FASHION_MNIST_DIR:", *failures]))


def read(folder: Path, file: File) -> bytes:
    """Read a gzip file. Raises OSError where that fails."""
    with (folder / file.name).open("rb") as stream:
        return stream.read(packed_limit(file))


def download(mirror: str, file: File) -> bytes:
    """Download a gzip file, with a progress bar on a terminal.

    Raises requests.RequestException or urllib3's HTTPError, or StageError for an answer that is too long.
    """
    content = io.BytesIO()
    with requests.get(
        f"{mirror.rstrip('/')}/{file.name}", stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)
    ) as response:
        response.raise_for_status()
        # The files are gzip themselves: a server may declare that as the encoding, so take the bytes as sent.
        response.raw.decode_content = False
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        with tqdm(desc=file.name, total=total, unit="B", unit_scale=True, disable=None) as bar:
            for chunk in response.raw.stream(1 << 16):
                content.write(chunk)
                bar.update(len(chunk))
                if content.tell() > packed_limit(file):
                    raise StageError(f"{file.name} is longer than the {packed_limit(file):,} bytes it can have")
    return content.getvalue()


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
            raise StageError(f"expected the package to have an ordinary file {file.name}, found none")
        return read(path.parent, file)

    def _run(self, command: list[str]) -> None:
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if line.startswith("E:")]
            raise StageError(f"{command[0]} failed: {lines[-1] if lines else result.returncode}")


def packed_limit(file: File) -> int:
    """The most bytes that the gzip file can have: it adds some 0.01 % and a header to what it cannot shrink."""
    return file.bytes + file.bytes // 1000 + 65536


def unpack(packed: bytes, file: File) -> bytes:
    """Return the verified content of a gzip file, never holding more of it than the bytes it should have.

    Raises StageError that says what was found instead.
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


def parse_idx(content: bytes, dimensions: int) -> np.ndarray:
    """Parse an IDX file of unsigned bytes: uint8 array of `dimensions` dimensions.

    Raises StageError where the header does not fit the content.
    Source: http://yann.lecun.com/exdb/mnist/, "the IDX file format".
    """
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise StageError(f"expected an IDX file of uint8 in {dimensions} dimensions, found {content[:4]!r}")
    shape = [int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4)]
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise StageError(f"expected {expected:,} bytes for an IDX file of shape {shape}, found {len(content):,}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


if __name__ == "__main__":
    stage.run(main)
