"""Measure the pipeline against the plain PyTorch program, side by side: python -m benchmarks.run, or make bench.

Prints a table and writes it to benchmarks/RESULTS.md, above the notes there. Takes some 25 minutes; run nothing else
meanwhile. It needs PostgreSQL (Debian: apt-get install postgresql). Both sides of a comparison run in turn, A B A B …,
so that a machine that speeds up or slows down affects both.
"""

import gzip
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dvc.utils.serialize import load_yaml, modify_yaml
from tqdm import tqdm

from benchmarks.history import make_history
from benchmarks.servers import postgres
from benchmarks.store import fill
from stages.cpu import cores
from stages.dataset import Dataset, read_dataset, write_dataset

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
NOTES = "\n## Notes\n"  # in RESULTS.md, everything from here on is written by hand
SEEDS = 8  # of the trainings that run at once
ACCURACY = 0.8786  # what the plain program's own recipe reaches with luck
DATA = {part: f"data/fashion-mnist/{part}.safetensors" for part in ("train", "test")}
RUNS = 10_000

PREFIX = "dvc-mlflow run "  # of the commands in dvc.yaml


@dataclass
class Row:
    """A line of the table: a ratio of medians."""

    what: str
    target: str
    ratio: float
    ours: Sequence[float]
    theirs: Sequence[float]
    unit: str

    def line(self) -> str:
        limit = float(re.findall(r"[\d.]+", self.target)[0])
        met = self.ratio >= limit if self.target.startswith("≥") else self.ratio <= limit
        if self.target.startswith("±"):
            met = abs(self.ratio - 1) <= limit / 100
        mark = "" if met else " (missed)"
        cells = [
            self.what,
            f"**{self.ratio:.2f}**{mark}",
            self.target,
            spread(self.ours),
            spread(self.theirs),
            self.unit,
        ]
        return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    digits = 0 if min(values) >= 100 else 2
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high}; n {len(values)})" if len(values) > 1 else f"{middle} (n 1)"


class Bench:
    """Copies of the project in `folder`, and the commands timed in them."""

    def __init__(self, folder: Path, create_database: Callable[..., str]) -> None:
        self.folder, self.create_database = folder, create_database
        self.source = folder / "source"  # gzip files, as fetch reads them
        self.raw = folder / "torchvision" / "FashionMNIST" / "raw"  # unpacked, as torchvision keeps them
        self.copies = 0
        self.write_sources()

    def write_sources(self) -> None:
        """Write the data set as both programs read it from a local disk."""
        self.source.mkdir()
        self.raw.mkdir(parents=True)
        for part, prefix in (("train", "train"), ("test", "t10k")):
            dataset = read_dataset(ROOT / DATA[part])
            for array, name in ((dataset.images, "images-idx3-ubyte"), (dataset.labels, "labels-idx1-ubyte")):
                header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
                content = header + array.tobytes()
                (self.raw / f"{prefix}-{name}").write_bytes(content)
                (self.source / f"{prefix}-{name}.gz").write_bytes(gzip.compress(content, 6, mtime=0))

    def copy(self, tracking: bool = True, **params: Any) -> Path:
        """A fresh clone of the project as it is now, with these params of train changed."""
        self.copies += 1
        folder = self.folder / f"copy{self.copies}"
        for name in run(["git", "ls-files", "-z"], ROOT).split("\0")[:-1]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)  # with its run bit
        if not tracking:
            pipeline = folder / "dvc.yaml"
            pipeline.write_text(pipeline.read_text(encoding="utf-8").replace(PREFIX, ""), encoding="utf-8")
        with modify_yaml(folder / "params.yaml") as values:
            values["train"] |= params
        run(["git", "init", "-q"], folder)
        run(["git", "add", "--all"], folder)
        for key, value in {"user.name": "bench", "user.email": "bench@example.org"}.items():
            run(["git", "config", key, value], folder)
        run(["git", "commit", "-qm", "bench"], folder)
        return folder

    def time(self, command: Sequence[str], folder: Path) -> float:
        """Wall seconds of a command."""
        start = time.perf_counter()
        run(command, folder, FASHION_MNIST_DIR=str(self.source))
        return time.perf_counter() - start

    def plain(self, device: str) -> tuple[float, list[dict[str, float]]]:
        """Wall seconds of the plain program, and what it prints for each epoch."""
        start = time.perf_counter()
        program = [sys.executable, "benchmarks/plain.py", str(self.raw.parent.parent), "--device", device]
        lines = run(program, ROOT).splitlines()
        return time.perf_counter() - start, [json.loads(line) for line in lines]

    def train(self, data: Path | None = None, **params: Any) -> tuple[list[float], float, float]:
        """Train without tracking: images/s of each epoch, peak memory in MiB, test accuracy."""
        folder = self.copy(tracking=False, **params)
        stages = load_yaml(folder / "dvc.yaml")["stages"]
        for part in DATA:
            (folder / DATA[part]).parent.mkdir(parents=True, exist_ok=True)
            (folder / DATA[part]).symlink_to(ROOT / DATA[part])
        command = [sys.executable, *stages["train"]["cmd"].split()[1:]]
        if data:
            command[3] = str(data)
        peak = 0.0
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, cwd=folder, stdout=output)
            while process.poll() is None:
                peak = max(peak, peak_mib(process.pid))
                time.sleep(0.05)
            output.seek(0)
            rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) images/s", output.read())]
        if process.returncode:
            raise SystemExit(f"{command} failed")
        run([sys.executable, *stages["evaluate"]["cmd"].split()[1:]], folder)
        accuracy = json.loads((folder / "metrics/evaluate.json").read_text())["test_accuracy"]
        shutil.rmtree(folder)
        return rates, peak, accuracy


def peak_mib(pid: int) -> float:
    """A process's peak memory in MiB; getrusage would also count that of the process that started it."""
    found = re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return float(found[0]) / 1024 if found else 0.0  # it has ended


def run(command: Sequence[str], folder: Path, **env: str) -> str:
    """Output of a command that must succeed, in an environment without this project's settings."""
    clean = {key: value for key, value in os.environ.items() if not re.match("MLFLOW_|DVC_|FASHION_|GIT_", key)}
    clean |= {"PATH": f"{Path(sys.executable).parent}:{clean['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true", **env}
    result = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{command} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(ours) / statistics.median(theirs)


def measure_cold(bench: Bench) -> list[Row]:
    """The plain program, the cold pipeline with and without tracking, and the loops alone."""
    plain_wall, plain_loop, plain_rate, plain_peak = [], [], [], []
    cold, untracked, rates, peaks = [], [], [], []
    for _ in tqdm(range(3), "plain, cold, loop", disable=None):
        seconds, epochs = bench.plain("cpu")
        plain_wall.append(seconds)
        plain_loop.append(sum(epoch["epoch_seconds"] for epoch in epochs))
        plain_rate.append(5 * 60_000 / plain_loop[-1])
        plain_peak.append(epochs[-1]["peak_mib"])
        for _ in range(2):
            cold.append(bench.time(["dvc", "repro"], bench.copy()))
            untracked.append(bench.time(["dvc", "repro"], bench.copy(tracking=False)))
        loop, peak, _ = bench.train(validation_size=0)
        rates.append(statistics.harmonic_mean(loop))
        peaks.append(peak)
    reached, accurate = measure_accuracy(bench)
    name = f"loop until {ACCURACY} test accuracy ({reached} epochs, seeds 0 to 2), against plain's 5 epochs"
    return [
        Row("train's loop, 60,000 images, 5 epochs, against plain's", "≥ 3.2", ratio(rates, plain_rate), rates,
            plain_rate, "images/s"),
        Row("cold `dvc repro`, against plain's process", "≤ 0.42", ratio(cold, plain_wall), cold, plain_wall, "s"),
        Row("cold `dvc repro`, against the same without tracking", "≤ 1.12", ratio(cold, untracked), cold, untracked,
            "s"),
        Row(name, "≤ 0.25", ratio(accurate, plain_loop), accurate, plain_loop, "s"),
        Row("peak memory of train, against plain's main process", "≤ 1.0", ratio(peaks, plain_peak), peaks,
            plain_peak, "MiB"),
        measure_evaluate(bench, cold),
        *measure_throughput(bench, plain_wall),
    ]  # fmt: skip


def measure_accuracy(bench: Bench) -> tuple[int, list[float]]:
    """The fewest epochs in which three seeds reach ACCURACY, and the seconds of their loops."""
    for epochs in range(1, 6):
        trained = [bench.train(epochs=epochs, seed=seed) for seed in range(3)]
        if all(accuracy >= ACCURACY for _, _, accuracy in trained):
            break
    else:
        raise SystemExit(f"the default recipe does not reach {ACCURACY} in 5 epochs")
    return epochs, [sum(59_000 / rate for rate in rates) for rates, _, _ in trained]


def measure_evaluate(bench: Bench, cold: Sequence[float]) -> Row:
    folder = bench.copy()
    bench.time(["dvc", "repro"], folder)
    seconds = []
    for size in tqdm(range(501, 506), "evaluate only", disable=None):
        with modify_yaml(folder / "params.yaml") as values:
            values["evaluate"]["batch_size"] = size
        seconds.append(bench.time(["dvc", "repro"], folder))
    name = "`dvc repro` after a change of an evaluate param, against cold"
    return Row(name, "≤ 0.25", ratio(seconds, cold), seconds, cold, "s")


def measure_throughput(bench: Bench, plain_wall: Sequence[float]) -> list[Row]:
    """Seeds, a one-thread training on each core, against the same in turn with the default threads."""
    folder = bench.copy()
    bench.time(["dvc", "repro", "fetch"], folder)
    run(["dvc", "exp", "run", "--temp"], folder)  # the first one of a project sets up what the others use
    in_turn = [
        bench.time(["dvc", "exp", "run", "--temp", "-S", f"train.seed={s}"], folder) for s in range(1, SEEDS + 1)
    ]
    command = f"python -m commands.replicate --seeds {SEEDS} --jobs {len(cores())} -S train.threads=1"
    at_once = bench.time(command.split(), folder)
    name = f"{SEEDS} seeds by `{command}`, against"
    plain = [SEEDS * statistics.median(plain_wall)]
    return [
        Row(f"{name} {SEEDS} in turn with the default threads", "≤ 1.0", at_once / sum(in_turn), [at_once],
            [sum(in_turn)], "s"),
        Row(f"{name} {SEEDS} times plain's median", "≤ 0.30", at_once / plain[0], [at_once], plain, "s"),
    ]  # fmt: skip


def measure_nothing(bench: Bench) -> list[Row]:
    """`dvc repro` with nothing to do, here and in a project with one empty stage."""
    empty = bench.folder / "empty"
    empty.mkdir()
    (empty / "dvc.yaml").write_text("stages:\n  nothing:\n    cmd: 'true'\n    deps: [dep]\n")
    (empty / "dep").write_text("")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "config", "core.analytics", "false"]):
        run(command, empty)
    folder = bench.copy()
    ours, theirs = [], []
    for _ in tqdm(range(11), "nothing to do", disable=None):
        ours.append(bench.time(["dvc", "repro"], folder))
        theirs.append(bench.time(["dvc", "repro"], empty))
    name = "`dvc repro` with nothing to do, against that of a project of one empty stage"
    return [Row(name, "≤ 1.15", ratio(ours[1:], theirs[1:]), ours[1:], theirs[1:], "s")]


def measure_scaling(bench: Bench) -> list[Row]:
    """Time per epoch of longer trainings, and time per image of larger sets."""
    whole = read_dataset(ROOT / DATA["train"])
    tenth = bench.folder / "tenth.safetensors"
    write_dataset(tenth, Dataset(whole.images[:6000], whole.labels[:6000], whole.classes))
    seconds: dict[int, list[float]] = {5: [], 50: []}
    images: dict[int, list[float]] = {6_000: [], 60_000: []}
    for _ in tqdm(range(5), "scaling", disable=None):
        for epochs in seconds:
            rates, _, _ = bench.train(tenth, epochs=epochs, validation_size=0)
            seconds[epochs].append(1000 * sum(6_000 / rate for rate in rates) / epochs)
        for size, data in ((6_000, tenth), (60_000, ROOT / DATA["train"])):
            rates, _, _ = bench.train(data, epochs=50 * 1200 // size, validation_size=0)
            images[size].append(1e6 / statistics.harmonic_mean(rates))
    return [
        Row("time per epoch (6,000 images), 50 epochs against 5", "± 10 %", ratio(seconds[50], seconds[5]),
            seconds[50], seconds[5], "ms"),
        Row("time per image, 60,000 images against 6,000", "± 10 %", ratio(images[60_000], images[6_000]),
            images[60_000], images[6_000], "µs"),
    ]  # fmt: skip


def measure_store(bench: Bench) -> list[Row]:
    """What the recorder and other commands take, in a store of the pipeline alone and in one of 10,000 more runs."""
    folder = bench.copy(epochs=1)
    bench.time(["dvc", "repro"], folder)
    few, many = folder / "mlflow.db", folder / "many.db"
    shutil.copyfile(few, many)
    rows = measure_commands(folder, "SQLite", f"sqlite:///{few}", f"sqlite:///{many}")
    few_uri = bench.create_database("few")
    run(["dvc-mlflow", "sync"], folder, MLFLOW_TRACKING_URI=few_uri)
    return rows + measure_commands(folder, "PostgreSQL", few_uri, bench.create_database("--template", "few", "many"))


def measure_commands(folder: Path, kind: str, few: str, many: str) -> list[Row]:
    """Fill the store `many`, which has what `few` has, and time each command in both."""
    fill(many, RUNS)
    now, command = int(time.time() * 1000), load_yaml(folder / "dvc.yaml")["stages"]["evaluate"]["cmd"]
    start = {"stage": "evaluate", "command": command.split()[2:], "time": now, "pid": os.getpid()}
    events = "".join(json.dumps(event) + "\n" for event in (start, {"status": "FINISHED"}, {"succeeded": True}))
    rows = []
    for words, name, target in (
        (["recorder"], "tracking of a stage", "≤ 1.3"),
        (["sync"], "`dvc-mlflow sync` with nothing to do", "≤ 3 s"),
        (["audit"], "`dvc-mlflow audit`", "≤ 3 s"),
        (["lineage", "models/lenet.safetensors"], "`dvc-mlflow lineage FILE`", "≤ 2 s"),
    ):
        recorder = words == ["recorder"]
        command = [sys.executable, "-m", "dvc_mlflow.recorder"] if recorder else ["dvc-mlflow", *words]
        seconds: dict[str, list[float]] = {few: [], many: []}
        for _ in tqdm(range(8), f"{name}, {kind}", disable=None):
            for store, values in seconds.items():
                env = os.environ | {"MLFLOW_TRACKING_URI": store} | ({"DVC_STAGE": "evaluate"} if recorder else {})
                began = time.perf_counter()
                subprocess.run(command, cwd=folder, input=events, text=True, env=env, check=True, capture_output=True)
                values.append(time.perf_counter() - began)
        ours, theirs = seconds[many][1:], seconds[few][1:]
        figure = ratio(ours, theirs) if recorder else statistics.median(ours)
        rows.append(Row(f"{name}, {RUNS:,} runs in the {kind} store, against 3", target, figure, ours, theirs, "s"))
    return rows


def measure_history(bench: Bench) -> list[Row]:
    """`dvc-mlflow sync --all` of 200 commits with three stage runs each, and again with nothing to do."""
    ours, theirs = [], []
    for number in tqdm(range(3), "history", disable=None):
        folder = bench.folder / f"history-{number}"
        make_history(folder, 200)
        ours.append(bench.time(["dvc-mlflow", "sync", "--all"], folder))
        theirs.append(bench.time(["dvc-mlflow", "sync", "--all"], folder))
    name = "`dvc-mlflow sync --all`, 200 commits of three stages, against the second time"
    return [Row(name, "≤ 60 s", statistics.median(ours), ours, theirs, "s")]


def machine() -> str:
    """The hardware and the versions, in one line."""
    model = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ("torch", "torchvision", "dvc", "mlflow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{model}, {os.cpu_count()} CPUs, {memory:.0f} GiB, {gpu}; "
        f"Linux {platform.release()}, Python {platform.python_version()}, {versions}; train.threads 2."
    )


def main() -> None:
    rows: list[Row] = []
    with postgres() as create_database, tempfile.TemporaryDirectory() as name:  # if it is missing, fail at once
        bench = Bench(Path(name), create_database)
        for measure in (measure_cold, measure_nothing, measure_scaling, measure_store, measure_history):
            measured = measure(bench)
            print(*(row.line() for row in measured), sep="\n", flush=True)  # of use if a later one fails
            rows += measured
    table = "\n".join(
        [
            "# Benchmarks",
            "",
            "`make bench` wrote this table. A ratio is one of medians; in brackets the least and the largest value.",
            "",
            machine(),
            "",
            "| what | ratio | target | this project | against | unit |",
            "|---|---|---|---|---|---|",
            *(row.line() for row in rows),
            "",
        ]
    )
    print(machine())
    notes = RESULTS.read_text(encoding="utf-8").partition(NOTES)[2] if RESULTS.exists() else ""
    RESULTS.write_text(table + NOTES + notes, encoding="utf-8")


if __name__ == "__main__":
    main()
