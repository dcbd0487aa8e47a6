"""Files are whole or missing, unrelated ones are refused, and a stage ends with a clear line."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from support.project import Project

from stages.dataset import Dataset, read_dataset, write_dataset
from stages.lenet import read_model
from stages.stage import StageError, write


def test_write_replaces_a_file_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write(path, b"one")
    write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: a write fails halfway."""
    code = """
import resource, signal, sys
from pathlib import Path
from stages import stage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
stage.run(lambda: stage.write(Path(sys.argv[1]), bytes(1_000_000)))
"""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot write {path}: ")
    assert len(result.stderr.splitlines()) == 1
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_data_set_is_read_as_it_was_written_to_the_same_bytes_each_time(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    dataset = Dataset(images, np.arange(20, dtype=np.uint8) % 10, [f"class {label}" for label in range(10)])
    for name in ("one", "two"):
        write_dataset(tmp_path / name, dataset)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = read_dataset(tmp_path / "one")
    assert np.array_equal(again.images, images)
    assert np.array_equal(again.labels, dataset.labels)
    assert again.classes == dataset.classes


CLASSES = {"classes": '["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]'}
FOREIGN = {
    "missing": None,
    "empty": b"",
    "text": b"<!DOCTYPE html>",
    "pickle": b"\x80\x04K\x01.",
    "a header of 2^60 bytes": b"\x00\x00\x00\x00\x00\x00\x00\x10{}",
    "other tensors": save({"weight": np.zeros(3)}, CLASSES),
    "no metadata": save({"images": np.zeros((1, 28, 28), np.uint8), "labels": np.zeros(1, np.uint8)}),
    "other type": save({"images": np.zeros((1, 28, 28)), "labels": np.zeros(1, np.uint8)}, CLASSES),
    "other shape": save({"images": np.zeros((1, 32, 32, 2), np.uint8), "labels": np.zeros(1, np.uint8)}, CLASSES),
    "other length": save({"images": np.zeros((2, 28, 28), np.uint8), "labels": np.zeros(1, np.uint8)}, CLASSES),
    "a label of 10": save({"images": np.zeros((1, 28, 28), np.uint8), "labels": np.full(1, 10, np.uint8)}, CLASSES),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("read", [read_dataset, read_model])
def test_an_unrelated_file_is_refused_in_one_line(
    read: Callable[[Path], object], content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StageError) as raised:
        read(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_stage_refuses_an_unrelated_input_and_restores_what_dvc_removed(project: Project) -> None:
    model = project.folder / "models/lenet.safetensors"
    scores = (project.folder / "metrics/evaluate.json").read_bytes()
    model.unlink()
    model.write_bytes(b"not a model")
    result = project.dvc("repro", "--single-item", "evaluate", check=False)
    assert result.returncode != 0
    expected = project.md5s()["models/lenet.safetensors"]
    assert f"error: models/lenet.safetensors: expected MD5 {expected}, as dvc.lock says, found " in result.stderr
    assert "Traceback" not in result.stderr
    assert (project.folder / "metrics/evaluate.json").read_bytes() == scores
    assert (project.folder / "metrics/predictions.parquet").exists()


def test_a_damaged_data_set_in_the_workspace_is_replaced_from_the_cache(project: Project) -> None:
    path = project.folder / "data/fashion-mnist/train.safetensors"
    path.unlink()
    path.write_bytes(b"damaged")
    before = project.md5s()
    assert project.repro() == []
    assert project.md5s() == before
    assert path.stat().st_size > 100_000


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(tmp_path: Path) -> None:
    target = tmp_path / "file"  # a file where a folder is needed: no user can write below it
    target.write_bytes(b"")
    with pytest.raises(StageError, match=r"cannot write .*file/model: "):
        write(target / "model", b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_stage_with_its_own_exit_code(number: signal.Signals) -> None:
    code = """
import time
from stages import stage
def main():
    print("ready", flush=True)
    time.sleep(60)
stage.run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f"stopped by {number.name}\n"
