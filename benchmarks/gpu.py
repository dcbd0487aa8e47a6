"""Run everything that needs a GPU, unattended, in a few minutes: python -m benchmarks.gpu, or make gpu.

python -m benchmarks.gpu                                                    the data of `dvc repro fetch`
python -m benchmarks.gpu --train TRAIN --test TEST                          the two files from elsewhere
python -m benchmarks.gpu --device cpu --images 600 --output /tmp/gpu.md     the same steps without a GPU, on less data

Times the loop with and without its CUDA graph against the plain program, compares the bits of three runs and of one
that was killed and resumed, evaluates, and runs the tests that need a GPU. Prints a table and writes it to
benchmarks/GPU.md. Exits with 1 if something failed. Needs Python 3.11 or newer, torch, numpy, safetensors and
ruamel.yaml, pytest for the tests, and neither DVC nor MLflow; without torchvision, plain.py reads the data itself.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from ruamel.yaml import YAML

from stages.checkpoint import Checkpoint
from stages.dataset import Dataset, read_dataset, write_dataset
from stages.device import set_up_device
from stages.lenet import predict, read_model, write_model
from stages.training import train
from stages.training_step import Step

ROOT = Path(__file__).parent.parent
PLAIN_EPOCHS = 3  # the first includes the warm-up, and counts on neither side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = ROOT / "data" / "fashion-mnist"
    parser.add_argument("--train", type=Path, default=data / "train.safetensors", help="training set")
    parser.add_argument("--test", type=Path, default=data / "test.safetensors", help="test set")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--images", type=int, help="train and test on the first N images (default: all)")
    parser.add_argument("--epochs", type=int, default=5, help="at least 2 (default: 5)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "GPU.md", help="table to write")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # a folder: this process is one training
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-graph", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: expected a CUDA GPU, found none; --device cpu tries the same steps without one")
    missing = [str(path) for path in (args.train, args.test) if not path.is_file()]
    if missing:
        sys.exit(f"error: expected the data, found no {', '.join(missing)}; `dvc repro fetch`, or --train and --test")
    if args.epochs < 2 or args.runs < 1:
        sys.exit(f"error: expected --epochs of at least 2 and --runs of at least 1, found {args.epochs}, {args.runs}")
    if args.work:
        work(args)
    else:
        sys.exit(0 if measure(args) else 1)


def work(args: argparse.Namespace) -> None:
    """Train once in the folder args.work, as the stage does; the last line is a JSON object of the results."""
    os.chdir(args.work)
    values = YAML(typ="safe").load(ROOT / "params.yaml")["train"]
    params = cast(Any, SimpleNamespace(**values | {"validation_size": 0, "epochs": args.epochs, "device": args.device}))
    device, dataset = set_up_device(args.device, params.threads), read_dataset(args.train)
    if args.no_graph:
        Step.use_cuda_graph = lambda self, batch_size: None  # type: ignore[method-assign]
    checkpoint = Checkpoint(params, dataset, device)
    said = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stderr(said):
        model, history = train(dataset, params, device, checkpoint, end_here if args.kill else lambda rows: None)
    seconds = time.perf_counter() - start
    write_model(Path("model.safetensors"), model)
    checkpoint.remove()
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    test = read_dataset(args.test)
    model, images = read_model(Path("model.safetensors")).to(device), torch.from_numpy(test.images).to(device)
    predict(model, images, 1000)  # warms up the libraries
    begin = time.perf_counter()
    predicted = predict(model, images, 1000).argmax(1).cpu().numpy()
    result = {
        "bits": hashlib.sha256(Path("model.safetensors").read_bytes() + json.dumps(history).encode()).hexdigest()[:16],
        "seconds": seconds,
        "evaluate_seconds": time.perf_counter() - begin,
        "accuracy": float((predicted == test.labels).mean()),
        "predictions": hashlib.sha256(predicted.astype(np.uint8).tobytes()).hexdigest()[:16],
        "memory": memory / 2**20,
        "warning": said.getvalue().strip(),
    }
    print(json.dumps(result), flush=True)


def end_here(history: Sequence[object]) -> None:
    """Kill this process after its first epoch, as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def one(args: argparse.Namespace, folder: Path, graph: bool = True, kill: bool = False) -> dict[str, Any]:
    """The results of a training in a separate process; none if it is killed after its first epoch."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--work", folder, "--train", args.train, "--test", args.test]
    command += ["--device", args.device, "--epochs", args.epochs]
    command += [*([] if graph else ["--no-graph"]), *(["--kill"] if kill else [])]
    process = subprocess.run([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if process.returncode != (-signal.SIGKILL if kill else 0):
        sys.exit(f"error: a training ended with exit code {process.returncode}")
    if kill:
        return {}
    lines = process.stdout.splitlines()
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) images/s", process.stdout)]
    return {**json.loads(lines[-1]), "rates": rates, "resumed": lines[0].startswith("continuing after epoch")}


def plain(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """What the plain program prints for each epoch."""
    command = [sys.executable, "benchmarks/plain.py", folder, "--device", args.device, "--epochs", PLAIN_EPOCHS]
    result = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: the plain program failed:\n{result.stderr[-2000:]}")
    return [json.loads(line) for line in result.stdout.splitlines()]


def write_raw(folder: Path, parts: dict[str, Dataset]) -> None:
    """Write the data as torchvision stores it."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, dataset in parts.items():
        for array, name in ((dataset.images, "images-idx3-ubyte"), (dataset.labels, "labels-idx1-ubyte")):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (raw / f"{prefix}-{name}").write_bytes(header + array.tobytes())


def measure(args: argparse.Namespace) -> bool:
    """Run everything, print and write the table; return whether nothing failed."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {"train": read_dataset(args.train), "t10k": read_dataset(args.test)}
        if args.images:
            parts = {
                key: Dataset(p.images[: args.images], p.labels[: args.images], p.classes) for key, p in parts.items()
            }
            args.train, args.test = folder / "train.safetensors", folder / "test.safetensors"
            write_dataset(args.train, parts["train"])
            write_dataset(args.test, parts["t10k"])
        args.train, args.test = args.train.resolve(), args.test.resolve()
        write_raw(folder, parts)
        total = len(parts["train"].images)
        graphs, singles, plains = [], [], []
        for number in range(args.runs):  # in turn, so that a machine that slows down affects all
            graphs.append(one(args, folder / f"graph{number}"))
            singles.append(one(args, folder / f"single{number}", graph=False))
            if number < 2:
                plains.append(plain(args, folder))
        one(args, folder / "killed", kill=True)
        resumed = one(args, folder / "killed")
    with_graph, without = ([sum(total / rate for rate in run["rates"]) for run in runs] for runs in (graphs, singles))
    theirs = [args.epochs * statistics.mean(epoch["epoch_seconds"] for epoch in epochs[1:]) for epochs in plains]
    ratio = statistics.median(theirs) / statistics.median(with_graph)
    whole = [run["seconds"] for run in graphs]
    bits = sorted({run["bits"] for run in (*graphs, *singles)})
    on_gpu = args.device == "cuda"
    warnings = sorted({run["warning"] for run in (*graphs, resumed)} - {""}) if on_gpu else []
    tested, tests = run_tests()
    rows = [
        ("loop, CUDA graph", "≤ 1.0 s" if on_gpu else "", spread(with_graph), statistics.median(with_graph) <= 1),
        ("loop, kernel by kernel", "", spread(without), None),
        ("plain program's loop, tests included", "", spread(theirs), None),
        ("plain's loop against ours", "≥ 8" if on_gpu else "", f"{ratio:.1f}", ratio >= 8),
        ("training with set-up and capture", "", spread(whole), None),
        ("graphs captured", "all", "; ".join(warnings) or "all", not warnings),
        (f"bits of {args.runs} runs with and {args.runs} without graph", "the same", ", ".join(bits), len(bits) == 1),
        (
            "bits after a kill and a resume",
            "the same",
            resumed["bits"],
            resumed["resumed"] and [resumed["bits"]] == bits,
        ),
        ("evaluate, 1,000 images a batch", "", spread([run["evaluate_seconds"] for run in graphs]), None),
        ("predictions of all runs", "the same", f"test accuracy {graphs[0]['accuracy']:.4f}",
         len({run["predictions"] for run in (*graphs, *singles, resumed)}) == 1),
        ("peak GPU memory", "", f"{max(run['memory'] for run in graphs):,.0f} MiB", None),
        ("tests marked gpu", "pass", tests, tested or not on_gpu),
    ]  # fmt: skip
    if not on_gpu:  # speeds do not matter here
        rows = [(*row[:3], None if row[0].startswith(("loop", "plain's")) else row[3]) for row in rows]
    marks = {None: "", True: "", False: " (missed)"}
    seconds = time.perf_counter() - begin
    table = "\n".join(
        [
            "# On a GPU",
            "",
            f"`make gpu` wrote this table in {seconds:.0f} s: {total:,} images, {args.epochs} epochs.",
            "",
            machine(args.device),
            "",
            "| what | target | found |",
            "|---|---|---|",
            *(f"| {what} | {target} | {found}{marks[met]} |" for what, target, found, met in rows),
            "",
        ]
    )
    print(table)
    args.output.write_text(table, encoding="utf-8")
    return all(met is not False for *_, met in rows)


def run_tests() -> tuple[bool, str]:
    """Whether the tests that need a GPU pass, and pytest's last line. They need no tests/conftest.py."""
    if not importlib.util.find_spec("pytest"):
        return False, "pytest is not installed"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--noconftest",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run(
        [*command, f"--rootdir={ROOT}", "tests/test_training_step.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    last = (result.stdout.strip() or result.stderr.strip()).splitlines()[-1]
    return result.returncode == 0 and " passed" in last, last


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f}; n {len(values)})"


def machine(device: str) -> str:
    """The hardware and the versions, in one line."""
    gpu = "no GPU"
    if device == "cuda":
        gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    torchvision = importlib.util.find_spec("torchvision") is not None
    version = importlib.metadata.version("torchvision") if torchvision else "none"
    return (
        f"{gpu}; {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {version}."
    )


if __name__ == "__main__":
    main()
