"""A random walk over what people do to a project: afterwards, MLflow shows what the test computes itself.

The stages are simple functions of their params, their code and what they read, and the test knows these functions. So
a row that shows a number with params that did not make it is found, whatever the cause. A walk prints its steps; the
seed decides them, except for the moment of a kill.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from dvc.utils.serialize import load_yaml, modify_yaml
from support import forked
from support.commands import environment
from support.project import Project

PIPELINE = """
stages:
  part:
    foreach: ${part}
    do:
      cmd: sh part.sh ${key} ${item}
      deps: [part.sh, raw.txt]
      params: ["part.${key}"]
      outs: ["part-${key}.txt"]
  folder:
    cmd: sh folder.sh
    deps: [folder.sh, part-a.txt, part-b.txt]
    params: [count]
    outs: [folder]
  fit:
    cmd: dvc-mlflow run sh fit.sh
    deps: [fit.sh, folder]
    params: [rate, epochs]
    outs: [model.txt]
    plots: [history.csv: {x: epoch}]
  score:
    cmd: sh score.sh
    deps: [score.sh, model.txt]
    params: [bias]
    metrics: [score.json: {cache: false}]
  check:
    cmd: dvc-mlflow run sh check.sh
    deps: [check.sh, folder, model.txt]
    params: [modulus]
    metrics: [check.yaml]
artifacts:
  numbers: {path: folder, type: dataset}
  net: {path: model.txt, type: model}
"""
SCRIPTS = {  # `make` says the same in Python
    "part.sh": "echo $(($(cat raw.txt) * $2 + K)) > part-$1.txt\n",
    "folder.sh": """sum=$(($(cat part-a.txt) + $(cat part-b.txt)))
mkdir -p folder
for n in $(seq $(sed -n 's/^count: //p' params.yaml)); do echo $((sum % 5 + n + K)) > folder/$n.txt; done
""",
    "fit.sh": """rate=$(sed -n 's/^rate: //p' params.yaml)
[ $rate -gt 0 ] || { echo "error: expected a rate above 0, found $rate" >&2; exit 1; }
total=0
for file in folder/*; do total=$((total + $(cat $file))); done
model=$((rate * total + K))
echo epoch,loss > history.csv
for epoch in $(seq $(sed -n 's/^epochs: //p' params.yaml)); do
  echo "$epoch,$((model * 10 + epoch))" >> history.csv
  sleep ${PAUSE:-0}
done
echo $model > model.txt
""",
    "score.sh": """score=$(($(cat model.txt) + $(sed -n 's/^bias: //p' params.yaml) + K))
sleep ${PAUSE:-0}
echo "{\\"score\\": $score, \\"deep\\": {\\"double\\": $((score * 2))}}" > score.json
""",
    "check.sh": """total=$(cat model.txt folder/1.txt | paste -sd+ - | sed 's/.*/echo $((&))/' | sh)
sleep ${PAUSE:-0}
echo "remainder: $((total % $(sed -n 's/^modulus: //p' params.yaml) + K))" > check.yaml
""",
}
VALUES = {"part.a": (1, 3), "part.b": (1, 3), "count": (1, 3), "rate": (0, 4), "epochs": (1, 3), "bias": (0, 3)}
VALUES |= {"modulus": (2, 4)}  # params, with the least and the largest value
OUTS = {"part@a": ["part-a.txt"], "part@b": ["part-b.txt"], "folder": ["folder"], "fit": ["history.csv", "model.txt"]}
OUTS |= {"score": ["score.json"], "check": ["check.yaml"]}
DEPS = {"part@a": ["raw.txt"], "part@b": ["raw.txt"], "folder": ["part-a.txt", "part-b.txt"], "fit": ["folder"]}
DEPS |= {"score": ["model.txt"], "check": ["folder", "model.txt"]}
PARAMS = {"part@a": ["part.a"], "part@b": ["part.b"], "folder": ["count"], "fit": ["epochs", "rate"], "score": ["bias"]}
PARAMS |= {"check": ["modulus"]}
SHOWN = ("history.csv", "score.json", "check.yaml")  # outs without which there is no record
MAKER = {path: stage for stage, paths in OUTS.items() for path in paths}
STAGES = list(OUTS)

Files = Mapping[str, bytes]  # by path; those of a directory each by its own


def script_of(stage: str) -> str:
    return f"{stage.partition('@')[0]}.sh"


def before(stage: str) -> list[str]:
    """The stages that it depends on, directly or not."""
    direct = [MAKER[path] for path in DEPS[stage] if path in MAKER]
    return sorted({*direct, *(other for one in direct for other in before(one))}, key=STAGES.index)


def make(stage: str, params: Mapping[str, int], k: int, files: Files) -> dict[str, bytes]:
    """What a stage makes from its params, the constant K of its script and its inputs; nothing if it fails."""

    def number(path: str) -> int:
        return int(files[path])

    def line(text: object) -> bytes:
        return f"{text}\n".encode()

    if stage.startswith("part@"):
        key = stage.removeprefix("part@")
        return {f"part-{key}.txt": line(number("raw.txt") * params[f"part.{key}"] + k)}
    if stage == "folder":
        total = number("part-a.txt") + number("part-b.txt")
        return {f"folder/{n}.txt": line(total % 5 + n + k) for n in range(1, params["count"] + 1)}
    if stage == "fit":
        model = params["rate"] * sum(number(path) for path in files if path.startswith("folder/")) + k
        rows = "".join(f"{epoch},{model * 10 + epoch}\n" for epoch in range(1, params["epochs"] + 1))
        return {"history.csv": f"epoch,loss\n{rows}".encode(), "model.txt": line(model)} if params["rate"] > 0 else {}
    if stage == "score":
        score = number("model.txt") + params["bias"] + k
        return {"score.json": line(json.dumps({"score": score, "deep": {"double": score * 2}}))}
    total = number("model.txt") + number("folder/1.txt")
    return {"check.yaml": line(f"remainder: {total % params['modulus'] + k}")}


def part_of(files: Files, path: str) -> dict[str, bytes]:
    """The file, or the files of the directory."""
    return {name: data for name, data in files.items() if name == path or name.startswith(f"{path}/")}


def digest(files: Files, path: str) -> str:
    """The hash of a file or directory, as DVC computes it; "" if it is missing."""
    if path in files:
        return hashlib.md5(files[path]).hexdigest()
    parts = {name.removeprefix(f"{path}/"): data for name, data in part_of(files, path).items()}
    listed = [{"md5": hashlib.md5(data).hexdigest(), "relpath": name} for name, data in sorted(parts.items())]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir" if parts else ""


@dataclass
class Entry:
    """An execution, as dvc.lock or the artifact execution.json records it."""

    stage: str
    cmd: str
    params: dict[str, Any]
    deps: dict[str, str]
    outs: dict[str, str]

    @property
    def key(self) -> str:
        return json.dumps([self.stage, self.cmd, self.params, self.deps, self.outs], sort_keys=True)


def read_lock(text: str) -> dict[str, Entry]:
    """The entries of a dvc.lock."""
    from dvc.utils.serialize import parse_yaml

    entries = {}
    for stage, entry in ((parse_yaml(text, "dvc.lock") or {}).get("stages") or {}).items():
        deps, outs = ({file["path"]: file["md5"] for file in entry.get(kind, [])} for kind in ("deps", "outs"))
        entries[stage] = Entry(stage, entry["cmd"], entry.get("params", {}).get("params.yaml", {}), deps, outs)
    return entries


@dataclass
class Row:
    """A run of MLflow, read from the tables of its database."""

    id: str
    status: str
    artifacts: Path
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]  # step and value of each point

    @functools.cached_property
    def execution(self) -> dict[str, Any]:
        return json.loads((self.artifacts / "execution.json").read_text())

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """The execution, after those before it."""
        return [
            Entry(one["stage"], one["cmd"], one["params"].get("params.yaml", {}), one["deps"], one["outs"])
            for one in (*self.execution["upstream"], self.execution)
        ]


class Walk:
    """A project, and everything that was done to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.parent = folder
        self.project = Project(folder / "place 0" / "project")
        self.codes: dict[str, int] = {}  # the constant of a script, by the script's hash
        self.raws: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.stated: set[str] = set()  # executions that someone stated, by `dvc commit` or in dvc.lock, and did not run
        self.mistaken: set[str] = set()  # those that DVC wrote with params that changed while the stage ran
        self.known: dict[str, dict[str, bytes]] = {}  # what was in the outs then, by hash
        self.experiments: dict[str, list[dict[str, int]]] = {}  # params of those that ran under a name
        self.traced: set[str] = set()  # runs whose code was brought back once
        self.project.folder.mkdir(parents=True)
        self.write("dvc.yaml", PIPELINE)
        self.write("pyproject.toml", '[tool.dvc-mlflow]\nexperiment = "walk"\n')
        self.write(".gitignore", "/mlflow.db*\n/mlartifacts\n")
        for name in SCRIPTS:
            self.write_script(name, 0, "")
        self.write_raw(2)
        lines = [f"{key}: 1\n" for key in VALUES if "." not in key and key != "modulus"]
        self.write("params.yaml", "".join(lines) + "modulus: 3\npart:\n  a: 1\n  b: 2\n")
        self.project.run("git", "init", "-q", "-b", "main")
        self.project.dvc("init", "-q")
        self.call("dvc", "repro")
        self.commit()

    @property
    def folder(self) -> Path:
        return self.project.folder

    def write(self, path: str, text: str) -> None:
        (self.folder / path).write_text(text)

    def write_script(self, name: str, k: int, comment: str) -> None:
        text = f"K={k}{comment}\n{SCRIPTS[name]}"
        self.codes[hashlib.md5(text.encode()).hexdigest()] = k
        self.write(name, text)

    def write_raw(self, value: int) -> None:
        data = f"{value}\n".encode()
        self.raws[hashlib.md5(data).hexdigest()] = data
        self.write("raw.txt", data.decode())

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run what a user runs, which may be refused."""
        ended = self.project.run(*command, check=False)
        self.look_at(ended.stdout + ended.stderr)
        self.wait_for_processes()
        return ended

    def look_at(self, output: str) -> None:
        """Assert that dvc_mlflow prints only expected lines while stages run."""
        assert "dvc_mlflow" not in output.partition("Traceback")[2], output
        assert "defect" not in output, output
        for line in re.findall("^warning: .*", output, re.MULTILINE):
            assert re.search(EXPECTED_WARNINGS, line), line

    def wait_for_processes(self) -> None:
        """Wait for the processes that run in the project, such as orphans of a killed DVC."""
        deadline = time.monotonic() + 120
        while own := [process for process in psutil.process_iter() if _works_in(process, self.folder)]:
            assert time.monotonic() < deadline, [process.cmdline() for process in own]
            time.sleep(0.05)

    def bridge(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `dvc-mlflow …`."""
        ended = forked.run_module("dvc_mlflow", words, self.folder, environment())
        assert not re.search("Traceback|defect", ended.stdout + ended.stderr), ended
        return ended

    def params(self) -> dict[str, int]:
        values = load_yaml(self.folder / "params.yaml")
        return {key: functools.reduce(lambda part, name: part[name], key.split("."), values) for key in VALUES}

    def lock(self) -> dict[str, Entry]:
        file = self.folder / "dvc.lock"
        return read_lock(file.read_text()) if file.exists() else {}

    def files(self) -> dict[str, bytes]:
        """The current scripts, data and outs."""
        paths = [path for path in self.folder.iterdir() if path.suffix in (".sh", ".txt", ".csv", ".json", ".yaml")]
        folder = self.folder / "folder"
        paths += [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    # What people do

    def set_param(self) -> str:
        key = self.rng.choice(list(VALUES))
        value = self.rng.randint(*VALUES[key])
        self.project.set(key, value)
        return f"{key}={value}"

    def repro(self) -> str:
        stage = self.rng.choice([*STAGES, "part"])
        ways = [[], [], [], [stage], ["-s", stage], ["--force"], ["--force", "-s", stage], ["--no-run-cache"]]
        way = self.rng.choice([*ways, ["--no-commit"], ["--downstream", stage], ["--keep-going"]])
        return f"{way} {self.call('dvc', 'repro', *way).returncode}"

    def set_and_repro(self) -> str:
        return f"{self.set_param()} {self.call('dvc', 'repro').returncode}"

    def sync_meanwhile(self) -> str:
        """Run sync while stages run."""
        change, log = self.set_param(), self.folder / ".dvc/tmp/output.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                ["dvc", "repro", *self.rng.choice([[], ["--force"]])],
                cwd=self.folder,
                env=environment() | {"PAUSE": "0.5"},
                stdout=file,
                stderr=file,
            )
            codes = []
            while process.poll() is None:
                codes.append(self.bridge("sync").returncode)
        self.wait_for_processes()
        self.look_at(log.read_text())
        return f"{change} {codes}"

    def revert(self) -> str:
        rev = self.rng.choice(self.commits)
        paths = self.rng.choice([["params.yaml"], ["params.yaml", "dvc.lock"], ["dvc.lock"], ["."]])
        self.project.run("git", "checkout", rev, "--", *paths)
        return f"{rev[:7]} {paths}"

    def reset(self) -> str:
        rev = self.rng.choice(self.commits)
        self.project.run("git", "reset", "-q", "--hard", rev)
        back = self.rng.choice([True, False])
        if back:
            self.call("dvc", "checkout")
        return f"{rev[:7]} {'and dvc checkout' if back else ''}"

    def commit(self) -> str:
        if self.project.run("git", "status", "--porcelain").stdout:
            self.project.commit("A state")
            self.commits.append(self.head())
        return self.head()[:7]

    def head(self) -> str:
        return self.project.run("git", "rev-parse", "HEAD").stdout.strip()

    def experiment(self, *ways: str) -> str:
        way = self.rng.choice([[], ["--temp"]])
        name, change = self.new_experiment()
        code = self.call("dvc", "exp", "run", *way, "-n", name, "-S", change).returncode
        return f"{way} {name} {change} {code}"

    def queue(self) -> str:
        named = [self.new_experiment() for _ in range(2)]
        for name, change in named:
            self.call("dvc", "exp", "run", "--queue", "-n", name, "-S", change)
        self.project.dvc("queue", "start", "--jobs", "2", check=False)
        deadline = time.monotonic() + 120
        while re.search("Queued|Running", status := self.project.dvc("queue", "status", check=False).stdout):
            assert time.monotonic() < deadline, status
            time.sleep(1)
        self.project.dvc("queue", "stop", "--kill", check=False)
        self.wait_for_processes()
        for name, _ in named:
            self.look_at(self.project.dvc("queue", "logs", name, check=False).stdout)
        self.project.dvc("queue", "remove", "--all", check=False)
        return f"{named}"

    def new_experiment(self) -> tuple[str, str]:
        """A name, perhaps that of a former experiment, and a change of params."""
        key, name = self.rng.choice(list(VALUES)), f"e{self.rng.randint(1, 6)}"
        value = self.rng.randint(*VALUES[key])
        if name not in self.listed():
            self.experiments.setdefault(name, []).append(self.params() | {key: value})
        return name, f"{key}={value}"

    def listed(self) -> dict[str, str]:
        """The experiments of the current commit: name and revision."""
        head, prefix = self.head(), "refs/exps"
        listed = self.project.run("git", "for-each-ref", "--format=%(refname) %(objectname)", prefix).stdout
        names = re.findall(rf"^{prefix}/{head[:2]}/{head[2:]}/(\S+) (\S+)$", listed, re.MULTILINE)
        return dict(names)

    def apply(self) -> str:
        names = sorted(self.listed())
        name = self.rng.choice(names) if names else ""
        return f"{name} {self.call('dvc', 'exp', 'apply', name).returncode}" if name else "none"

    def remove(self) -> str:
        names = sorted(self.listed())
        name = self.rng.choice(names) if names else ""
        return f"{name} {self.call('dvc', 'exp', 'remove', name).returncode}" if name else "none"

    def collect_garbage(self) -> str:
        return str(self.call("dvc", "gc", "-w", "-f").returncode)

    def lose_store(self) -> str:
        for path in self.folder.glob("mlflow.db*"):
            path.unlink()
        if artifacts := self.rng.choice([True, False]):
            shutil.rmtree(self.folder / "mlartifacts", ignore_errors=True)
        self.traced.clear()
        self.stated |= self.mistaken  # only MLflow had them
        self.mistaken.clear()
        return "and its artifacts" if artifacts else ""

    def old_store(self) -> str:
        """Keep a copy of the store, or restore an earlier copy."""
        kept, names = self.parent / "kept", ("mlflow.db", "mlartifacts")
        if not kept.exists():
            kept.mkdir()
            for name in names:
                if (self.folder / name).exists():
                    _copy(self.folder / name, kept / name)
            return "kept"
        self.lose_store()
        for name in names:
            if (kept / name).exists():
                _copy(kept / name, self.folder / name)
        shutil.rmtree(kept)
        return "put back"

    def lose_cache(self) -> str:
        part = self.rng.choice(["cache", "cache/runs"])
        shutil.rmtree(self.folder / ".dvc" / part, ignore_errors=True)
        return part

    def lose_out(self) -> str:
        path = self.folder / self.rng.choice(list(MAKER))
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return path.name

    def kill(self) -> str:
        """Run `dvc repro` or `dvc exp run`, and kill it, or part of it, some time later."""
        seconds, number = self.rng.uniform(0.3, 7), self.rng.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        whom, place = self.rng.choice(["DVC", "the foreground", "all", "one"]), self.rng.random()
        command = ["dvc", "repro"]
        if self.rng.random() < 0.25:
            name, change = self.new_experiment()
            command = ["dvc", "exp", "run", "-n", name, "-S", change]
        else:
            self.set_param()
        log = self.folder / ".dvc/tmp/output.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment() | {"PAUSE": "0.4"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            running = process.poll() is None
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if running and whom == "the foreground":
                    os.killpg(process.pid, number)
                elif running:
                    dvc = psutil.Process(process.pid)
                    found = [dvc, *dvc.children(recursive=True)]
                    one = found[int(place * len(found))]
                    for each in {"DVC": [dvc], "one": [one], "all": found}[whom]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            each.send_signal(number)
            process.wait(120)
        self.wait_for_processes()
        self.look_at(log.read_text())
        return f"{' '.join(command)}: {number.name} to {whom} after {seconds:.1f} s{'' if running else ', too late'}"

    def set_meanwhile(self) -> str:
        """Change a param of fit while fit runs: DVC takes the new value for the one that it ran with."""
        key = self.rng.choice(PARAMS["fit"])
        params, changed = self.params(), False
        value = self.rng.choice([other for other in range(1, VALUES[key][1] + 1) if other != params[key]])
        process = subprocess.Popen(
            ["dvc", "repro", "--force", "--single-item", "fit"],
            cwd=self.folder,
            env=environment() | {"PAUSE": str(8 / params["epochs"])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not changed:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = {str(child.pid) for child in psutil.Process(process.pid).children(recursive=True)}
                begun = any(row.status == "RUNNING" and row.tags["process.pid"] in own for row in self.rows())
                if begun and not (self.folder / "model.txt").exists():  # it is written last
                    self.project.set(key, value)
                    changed = True
            time.sleep(0.05)
        process.wait(120)
        self.wait_for_processes()
        if changed and process.returncode == 0:
            self.mistaken.add(self.lock()["fit"].key)
            self.remember()
        return f"{key}={value} {process.returncode if changed else 'too late'}"

    def edit_out(self) -> str:
        path, value = self.rng.choice([*MAKER, "score.json", "check.yaml"]), self.rng.randint(50, 99)
        texts = {"history.csv": f"epoch,loss\n1,{value}\n", "score.json": f'{{"score": {value}}}\n'}
        texts |= {"check.yaml": f"remainder: {value}\n"}
        if path == "folder":
            (self.folder / path).mkdir(exist_ok=True)
        self.write("folder/1.txt" if path == "folder" else path, texts.get(path, f"{value}\n"))
        return f"{path} {value}"

    def edit_lock(self) -> str:
        """Change a param, or the hash of an out, or remove an entry."""
        self.remember()
        stage, how = self.rng.choice(STAGES), self.rng.choice(["params", "outs", "nothing"])
        entries = self.lock()
        if stage not in entries:
            return "none"
        with modify_yaml(self.folder / "dvc.lock") as lock:
            entry = lock["stages"][stage]
            if how == "params":
                key = self.rng.choice(PARAMS[stage])
                entry["params"]["params.yaml"][key] = self.rng.randint(*VALUES[key])
            elif how == "outs":
                other = self.rng.choice([out for one in entries.values() for out in one.outs.values()])
                entry["outs"][0]["md5"] = other
            else:
                del lock["stages"][stage]
        self.state(entries)
        return f"{stage} {how}"

    def break_lock(self) -> str:
        """Leave conflict markers in dvc.lock; sync and audit refuse it in one line, and change nothing."""
        file = self.folder / "dvc.lock"
        text = file.read_text() if file.exists() else ""
        file.write_text(f"<<<<<<< ours\n{text}")
        before = self.dump()
        for command in ("sync", "audit"):
            ended = self.bridge(command)
            assert ended.returncode == 1, ended
            assert re.fullmatch("error: DVC cannot read the pipeline: .*\n", ended.stderr), ended
            assert not ended.stdout, ended
        assert self.dump() == before
        if text:
            file.write_text(text)
        else:
            file.unlink()
        return ""

    def dvc_commit(self) -> str:
        """Make DVC believe that the files in the workspace are what the stages make."""
        entries = self.lock()
        stage = self.rng.choice([[], [self.rng.choice(STAGES)]])
        code = self.call("dvc", "commit", "-f", *stage).returncode
        self.remember()
        self.state(entries)
        return f"{stage} {code}"

    def remember(self) -> None:
        files = self.files()
        self.known |= {digest(files, path): part_of(files, path) for path in MAKER}

    def state(self, former: Mapping[str, Entry]) -> None:
        """Note the new entries of dvc.lock, which nobody ran."""
        self.stated |= {e.key for e in self.lock().values()} - {e.key for e in former.values()}

    def checkout(self) -> str:
        return str(self.call("dvc", "checkout", "-f").returncode)

    def change_code(self) -> str:
        name = self.rng.choice(list(SCRIPTS))
        k, comment = self.rng.choice([(0, "  # a word"), (0, ""), (1, "")])
        self.write_script(name, k, comment)
        return f"{name} K={k}{comment}"

    def change_command(self) -> str:
        """Remove the launcher from fit, or restore it."""
        text = (self.folder / "dvc.yaml").read_text()
        without = text.replace("dvc-mlflow run sh fit.sh", "sh fit.sh")
        self.write("dvc.yaml", text.replace("sh fit.sh", "dvc-mlflow run sh fit.sh") if text == without else without)
        return f"{'with' if text == without else 'without'} the launcher"

    def change_data(self) -> str:
        self.write_raw(value := self.rng.randint(1, 3))
        return str(value)

    def move(self) -> str:
        number = int(self.folder.parent.name.removeprefix("place ")) + 1
        target = self.parent / f"place {number}" / "project"
        target.parent.mkdir()
        self.project = Project(self.folder.rename(target))
        return str(number)

    def read_only(self) -> str:
        """Run sync on a store that it cannot write: it says so in one line, or has nothing to do."""
        modes = {path: path.stat().st_mode for path in (self.folder / "mlflow.db", self.folder / "mlartifacts")}
        before = self.dump()
        words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
        for path, mode in modes.items():
            path.chmod(mode & 0o555)
        try:
            ended = self.project.run(*words, "dvc-mlflow", "sync", check=False)
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        output = ended.stdout + ended.stderr
        assert not re.search("Traceback|defect", output), output
        if ended.returncode and not re.search("^.*: not recorded: ", output, re.MULTILINE):
            assert re.fullmatch("error: MLflow cannot use .*\n", ended.stderr), output
        return f"{ended.returncode}{' and wrote' if self.dump() != before else ''}"

    # What MLflow shows

    def query(self, text: str) -> list[tuple[Any, ...]]:
        path = f"file:{self.folder}/mlflow.db?mode=ro".replace(" ", "%20")
        with contextlib.closing(sqlite3.connect(path, uri=True)) as database:
            return database.execute(text).fetchall()

    def rows(self) -> list[Row]:
        if not (self.folder / "mlflow.db").exists():
            return []
        rows = {
            id_: Row(id_, status, Path(uri.removeprefix("file://").replace("%20", " ")), {}, {}, {})
            for id_, status, uri in self.query(
                "SELECT run_uuid, status, artifact_uri FROM runs WHERE lifecycle_stage = 'active'"
            )
        }
        for kind in ("tags", "params"):
            for id_, key, value in self.query(f"SELECT run_uuid, key, value FROM {kind}"):
                if id_ in rows:
                    getattr(rows[id_], kind)[key] = value
        for id_, key, step, value in self.query("SELECT run_uuid, key, step, value FROM metrics ORDER BY timestamp"):
            if id_ in rows:
                rows[id_].metrics.setdefault(key, []).append((step, value))
        return list(rows.values())

    def dump(self) -> object:
        """All that MLflow has, for a comparison."""
        if not (self.folder / "mlflow.db").exists():
            return None
        tables = ("runs", "tags", "params", "metrics", "latest_metrics", "inputs", "datasets", "logged_models")
        files = sorted((self.folder / "mlartifacts").rglob("*"))
        stamps = [(str(path), path.stat().st_mtime_ns) for path in files if path.is_file()]
        return [sorted(self.query(f"SELECT * FROM {table}"), key=repr) for table in tables], stamps

    # What must be true of it

    def settle(self, whole: bool) -> str:
        """Sync, and compare MLflow with what must be true; `whole`: sync again, and audit all runs."""
        lines, code = self.sync()
        if whole:
            before = self.dump()
            again, second = self.sync()
            assert self.dump() == before, f"the second sync changed something: {again}"
            assert code == second and not re.search("recorded as run|closed", "\n".join(again)), again
        rows = self.rows()
        assert {row.status for row in rows} <= {"FINISHED", "KILLED", "FAILED"}, "a run is RUNNING, of no process"
        finished = [row for row in rows if row.status == "FINISHED"]
        for row in finished:
            assert row.artifacts == self.folder / "mlartifacts" / row.id / "artifacts"
            self.check_row(row, finished)
            self.check_code(row)
        own = [(row.tags["dvc.execution"], row.tags.get("dvc.exp_name"), row.tags.get(PARENT)) for row in finished]
        assert len(own) == len(set(own)), "an execution has two runs"
        missing = self.check_lock(self.lock(), finished)
        for name, rev in self.listed().items():
            lock = read_lock(self.project.run("git", "show", f"{rev}:dvc.lock", check=False).stdout)
            missing |= self.check_lock(lock, finished, name, rev)
        unrecorded = {line.partition(": not recorded: ")[0] for line in lines if ": not recorded: " in line}
        assert (code == 1) == bool(unrecorded), lines
        assert unrecorded == missing, f"{unrecorded} are not recorded, {missing} cannot be"
        self.check_audit(whole)
        return f"{len(finished)} runs{', not recorded: ' + ', '.join(sorted(missing)) if missing else ''}"

    def sync(self) -> tuple[list[str], int]:
        ended = self.bridge("sync")
        assert not ended.stderr, ended.stderr
        what = "recorded as run [0-9a-f]{32}|recorded before|not run yet|not recorded: .+"
        for line in ended.stdout.splitlines():
            assert re.fullmatch(rf"closed run .*, whose process is gone|(e\d: )?[\w@]+: ({what})", line), line
        return ended.stdout.splitlines(), ended.returncode

    def check_row(self, row: Row, finished: list[Row]) -> None:
        """Assert that a row's params, code and data give its numbers, and that no param is missing."""
        stage = row.tags["stage"]
        about = f"run {row.id} of {stage}"
        entries = row.entries
        assert [one.stage for one in entries[:-1]] == before(stage) or {*before(stage)} == {
            one.stage for one in entries[:-1]
        }, about
        assert {*row.params} == {key for one in entries for key in PARAMS[one.stage]}, about
        files: dict[str, bytes] = {}
        for one in entries:
            params = {key: int(row.params[key]) for key in PARAMS[one.stage]}
            assert params == one.params, about
            for path in DEPS[one.stage]:
                if path == "raw.txt":
                    files[path] = self.raws[one.deps[path]]
                assert digest(files, path) == one.deps[path], f"{about}: {one.stage} did not read this {path}"
            made = make(one.stage, params, self.codes[one.deps[script_of(one.stage)]], files)
            for path in OUTS[one.stage]:
                if digest(made, path) != one.outs[path]:
                    assert one.key in self.stated, f"{about}: {one.stage} cannot have made this {path} of {params}"
                    made = {n: d for n, d in made.items() if n not in part_of(made, path)}
                    made |= {self.at(n, path): d for n, d in self.known[one.outs[path]].items()}
            files = {n: d for n, d in files.items() if not any(n in part_of(files, p) for p in OUTS[one.stage])} | made
        self.check_metrics(row, files, finished, about)
        for kind, hashes in (("deps", entries[-1].deps), ("outs", entries[-1].outs)):
            shown = {k.removeprefix(f"dvc.{kind}."): v for k, v in row.tags.items() if k.startswith(f"dvc.{kind}.")}
            assert shown == hashes, about

    def at(self, name: str, path: str) -> str:
        """The name of a file that was found under another out's path, under this one."""
        return f"{path}/{name.partition('/')[2]}" if "/" in name else path

    def check_metrics(self, row: Row, files: Files, finished: list[Row], about: str) -> None:
        stage = row.tags["stage"]
        metrics = dict(row.metrics)
        if stage == "fit":
            lines = [line.split(",") for line in files["history.csv"].decode().splitlines()[1:]]
            curve = {int(epoch): float(loss) for epoch, loss in lines}
            shown = metrics.pop("loss")
            assert dict(shown) == curve and len(shown) == len(curve), f"{about}: its curve is another"
            children = [one for one in finished if one.tags.get(PARENT) == row.id]
            for key, points in metrics.items():
                theirs = [one.metrics.get(key.partition(".")[2], []) for one in children]
                assert points[-1][1] in [some[-1][1] for some in theirs if some], f"{about}: no run below has {key}"
            expected = {f"{one.tags['stage']}.{key}" for one in children for key in one.metrics if "." not in key}
            assert {*metrics} == expected, about
            query = "SELECT status, m.tag_value FROM logged_models JOIN logged_model_tags m USING (model_id)"
            query += f" WHERE source_run_id = '{row.id}' AND m.tag_key = 'dvc.outs.model.txt'"
            models = self.query(query + " AND lifecycle_stage = 'active'")
            assert [model[1] for model in models] == [digest(files, "model.txt")], about
            return
        expected_values: dict[str, float] = {}
        if stage == "score":
            values = json.loads(files["score.json"])
            expected_values = {"score": values["score"]}
            expected_values |= {f"deep.{key}": value for key, value in values.get("deep", {}).items()}
        elif stage == "check":
            expected_values = {"remainder": float(files["check.yaml"].decode().partition(": ")[2])}
        assert {key: points[-1][1] for key, points in metrics.items()} == expected_values, about
        assert (PARENT in row.tags) == (stage in ("score", "check")), about
        if PARENT in row.tags:
            (parent,) = [one for one in finished if one.id == row.tags[PARENT]]
            assert parent.entries[-1].key == next(one.key for one in row.entries if one.stage == "fit"), about

    def check_code(self, row: Row) -> None:
        """Assert that the commit and the patch of a row have its params, script and data."""
        commit, stage = row.tags.get("mlflow.source.git.commit"), row.tags["stage"]
        name = row.tags.get("dvc.exp_name")
        entry = row.entries[-1]
        if name:
            assert entry.params in [
                {k: v for k, v in p.items() if k in entry.params} for p in self.experiments[name]
            ], f"run {row.id} of {stage}: experiment {name} never had {entry.params}"
        if row.id in self.traced or not commit:
            return
        self.traced.add(row.id)
        archive = subprocess.run(["git", "archive", commit], cwd=self.folder, capture_output=True, check=True).stdout
        target = self.parent / "code"
        shutil.rmtree(target, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(target, filter="data")
        if row.tags["git.dirty"] == "true":
            patch = str(row.artifacts / "code.patch")
            environ = environment() | {"GIT_CEILING_DIRECTORIES": str(self.parent)}
            subprocess.run(["git", "apply", patch], cwd=target, env=environ, check=True)
        there = Walk.__new__(Walk)
        there.project = Project(target)
        params, files = there.params(), there.files()
        about = f"run {row.id} of {stage} is not of the code that it names"
        assert {key: params[key] for key in PARAMS[stage]} == entry.params or entry.key in self.stated, about
        for path in (script_of(stage), *(["raw.txt"] if "raw.txt" in entry.deps else [])):
            assert digest(files, path) == entry.deps[path], about

    def has_bytes(self, path: str, md5: str, rev: str = "") -> bool:
        """Whether the file with this hash is in the workspace, in DVC's cache or in a commit."""
        files = self.files()
        cached = self.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        if digest(files, path) == md5 or (cached.exists() and hashlib.md5(cached.read_bytes()).hexdigest() == md5):
            return True
        shown = subprocess.run(["git", "show", f"{rev}:{path}"], cwd=self.folder, capture_output=True)
        return bool(rev) and shown.returncode == 0 and hashlib.md5(shown.stdout).hexdigest() == md5

    def whole(self, lock: Mapping[str, Entry], stage: str) -> str:
        """The execution with the params before it; "" if dvc.lock does not say what made what it read."""
        chain = [*before(stage), stage]
        for one in chain:
            if one not in lock:
                return ""
            made = {path: lock[MAKER[path]].outs[path] for path in DEPS[one] if path in MAKER}
            if not made.items() <= lock[one].deps.items():
                return ""
        return lock[stage].key + json.dumps([[one, lock[one].params] for one in chain], sort_keys=True)

    def check_lock(self, lock: Mapping[str, Entry], finished: list[Row], name: str = "", rev: str = "") -> set[str]:
        """Assert that each execution of a lock that can be shown has its run; return those without one."""
        missing, baseline = set(), set()
        if name:
            head = read_lock(self.project.run("git", "show", "HEAD:dvc.lock", check=False).stdout)
            baseline = {self.whole(head, stage) for stage in head} - {""}
            if {whole for stage in lock if (whole := self.whole(lock, stage))} <= baseline:
                baseline = set()  # what equals its baseline has runs of its own
        of_lock = {row.id: {one.stage: one for one in row.entries} for row in finished}
        for stage in [one for one in STAGES if one in lock]:
            whole = self.whole(lock, stage)
            if whole in baseline:
                continue
            known = [row for row in finished if row.entries[-1].key == lock[stage].key]
            own = [row for row in known if whole and self.whole(of_lock[row.id], stage) == whole]
            own = [row for row in own if not name or row.tags.get("dvc.exp_name") == name]
            mistaken = any(lock[one].key in self.mistaken for one in [*before(stage), stage] if one in lock)
            able = whole and not mistaken
            able = able and all(
                self.has_bytes(path, md5, rev) for path, md5 in lock[stage].outs.items() if path in SHOWN
            )
            if "model.txt" in DEPS[stage]:
                fit = self.whole(lock, "fit")
                able = able and any(
                    self.whole(of_lock[r.id], "fit") == fit for r in finished if r.tags["stage"] == "fit"
                )
            assert own or not able, f"{stage} of dvc.lock has no run{f' of {name}' if name else ''}"
            if not own and (able or not known):
                missing.add(f"{name}: {stage}" if name else stage)
        return missing

    def is_clean(self) -> bool:
        """Whether dvc.lock matches the params, the code, the data and the outs."""
        files, params, lock = self.files(), self.params(), self.lock()
        declared = load_yaml(self.folder / "dvc.yaml")["stages"]
        for stage in STAGES:
            entry = lock.get(stage)
            if entry is None or entry.params != {key: params[key] for key in PARAMS[stage]}:
                return False
            part = f"sh part.sh {stage[-1]} {params.get(f'part.{stage[-1]}')}"
            if entry.cmd != (part if stage.startswith("part@") else declared[stage]["cmd"]):
                return False
            if any(digest(files, path) != md5 for path, md5 in {**entry.deps, **entry.outs}.items()):
                return False
            if entry.key in self.mistaken:
                return False
        return True

    def check_audit(self, everything: bool) -> None:
        """Assert that audit is silent on a clean project and on runs, and not on any other project."""
        ended = self.bridge("audit", *(["--all"] if everything else []))
        assert (ended.returncode == 0) == self.is_clean(), ended.stdout + ended.stderr
        assert not re.search(": run [0-9a-f]{32}: ", ended.stdout), ended.stdout


PARENT = "mlflow.parentRunId"
EXPECTED_WARNINGS = (
    "dvc.lock does not say what made|does not match dvc.lock|MLflow has no run of|changed while it was running"
    "|MLflow took over 60 s"  # on a busy machine
)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def _works_in(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(folder)
    return False


STEPS: dict[Callable[[Walk], str], int] = {  # the weight of each step
    Walk.set_param: 6,
    Walk.set_and_repro: 12,
    Walk.repro: 14,
    Walk.sync_meanwhile: 3,
    Walk.revert: 6,
    Walk.reset: 4,
    Walk.commit: 6,
    Walk.experiment: 8,
    Walk.queue: 1,
    Walk.apply: 3,
    Walk.remove: 2,
    Walk.collect_garbage: 2,
    Walk.lose_store: 3,
    Walk.old_store: 2,
    Walk.lose_cache: 2,
    Walk.lose_out: 2,
    Walk.kill: 8,
    Walk.set_meanwhile: 2,
    Walk.edit_out: 4,
    Walk.edit_lock: 3,
    Walk.break_lock: 1,
    Walk.dvc_commit: 2,
    Walk.checkout: 3,
    Walk.change_code: 4,
    Walk.change_command: 2,
    Walk.change_data: 2,
    Walk.move: 2,
    Walk.read_only: 1,
}

SLOW = (Walk.queue, Walk.set_meanwhile)  # left out of a short walk


def walk(folder: Path, seed: int, steps: int) -> Iterator[str]:
    """Take steps, check MLflow after about every second one, and yield a line on each."""
    project = Walk(folder, seed)
    weights = {step: weight for step, weight in STEPS.items() if steps > 10 or step not in SLOW}
    yield f"settle: {project.settle(True)}"
    for number in range(1, steps + 1):
        (step,) = project.rng.choices(list(weights), list(weights.values()))
        yield f"{number:>3} {step.__name__}: {step(project)}"
        if project.rng.random() < 0.5 or number == steps:
            yield f"    settle: {project.settle(number == steps or project.rng.random() < 0.5)}"


@pytest.mark.parametrize("seed", range(1, 9))
def test_whatever_people_do_mlflow_shows_the_truth(
    seed: int, stress: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if seed > 1 and not stress:
        pytest.skip("the long form: --stress")
    steps = 25 if stress else 10
    for line in walk(tmp_path, seed, steps):
        print(line)
    record_property("steps walked", steps)
