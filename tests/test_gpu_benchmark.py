"""benchmarks/gpu.py runs all its steps without a GPU, DVC or MLflow, except what only a GPU can do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.commands import environment
from support.project import ROOT
from support.training import make_dataset

from stages.dataset import write_dataset

ABSENT = ("dvc", "mlflow", "pydantic", "pandas", "pyarrow", "matplotlib", "torchvision", "PIL", "scipy", "tqdm")


def measure(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it with only those packages importable that a machine with a GPU has."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    write_dataset(folder / "data.safetensors", make_dataset(300))
    data = [word for part in ("train", "test") for word in (f"--{part}", str(folder / "data.safetensors"))]
    command = [sys.executable, "-m", "benchmarks.gpu", *data, "--output", str(folder / "gpu.md"), *arguments]
    env = environment() | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_each_step_runs_without_a_gpu(tmp_path: Path) -> None:
    result = measure(tmp_path, "--device", "cpu", "--images", "200", "--epochs", "2", "--runs", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    table = (tmp_path / "gpu.md").read_text()
    assert "200 images, 2 epochs" in table
    rows = dict(re.findall(r"^\| ([^|]+?) \| [^|]* \| ([^|]+?) \|$", table, re.MULTILINE))
    bits = rows["bits of 1 runs with and 1 without graph"]
    assert re.fullmatch("[0-9a-f]{16}", bits)
    assert rows["bits after a kill and a resume"] == bits
    assert float(rows["plain's loop against ours"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    result = measure(tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: expected a CUDA GPU, found none; --device cpu tries the same steps without one\n"
    assert not (tmp_path / "gpu.md").exists()
