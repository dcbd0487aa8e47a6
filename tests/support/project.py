"""Copies of the project, other projects, and what their files say."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from dvc.utils.serialize import load_yaml, modify_yaml

from dvc_mlflow.store import move_artifacts
from stages.stage import md5
from support import forked
from support.commands import environment, execute

ROOT = Path(__file__).parent.parent.parent

SMALL = {  # a project of one stage, which is quick unless `seconds` says otherwise
    "params.yaml": "lr: 0.5\nsize: 1\nseconds: 0\n",
    "dvc.yaml": """\
stages:
  score:
    cmd: dvc-mlflow run python score.py ${lr} ${size} ${seconds}
    deps: [score.py]
    params: [lr, size, seconds]
    metrics: [score.json]
""",
    "score.py": """\
import json, pathlib, sys, time

lr, size, seconds = map(float, sys.argv[1:])
if size < 0:
    sys.exit("error: expected a size of at least 0")
pathlib.Path("started").touch()
time.sleep(seconds)
pathlib.Path("score.json").write_text(json.dumps({"accuracy": lr} if size else {"loss": lr}))
""",
    "pyproject.toml": '[tool.dvc-mlflow]\nexperiment = "fashion-mnist-lenet"\n',
    ".gitignore": "mlflow.db*\nmlartifacts\nstarted\n",
}


def make_project(folder: Path, files: Mapping[str, str], git: bool = True) -> None:
    """Make a DVC project of these files in a new folder, in a git repository by default; commit nothing."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    commands = (
        [["git", "init", "-q", "-b", "main"], ["dvc", "init", "-q"]] if git else [["dvc", "init", "-q", "--no-scm"]]
    )
    for command in commands:
        ended = execute(command, folder, environment())
        assert ended.returncode == 0, ended


def forget_addresses(folder: Path) -> None:
    """Remove the DVC remotes and the MLflow server that a team has committed: tests use their own."""
    (folder / ".dvc/config").write_text("")
    settings = folder / "pyproject.toml"
    settings.write_text(re.sub("^tracking_uri *=.*\n", "", settings.read_text(), flags=re.MULTILINE))


@dataclass(frozen=True)
class Project:
    """A copy of the project, with git and DVC, in a folder of its own."""

    folder: Path

    def run(
        self, *command: str, check: bool = True, warns: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder; env is added to a clean environment.

        It may fail only if check is false, and must print a warning if `warns`, else none.
        """
        result = execute(command, self.folder, environment() | env)
        if check and result.returncode != 0:
            raise AssertionError(f"{command} exited with {result.returncode}:\n{result.stdout}{result.stderr}")
        if check:
            assert bool(re.search("^warning: ", result.stdout + result.stderr, re.MULTILINE)) == warns, result
        return result

    def dvc(
        self, *arguments: str, check: bool = True, warns: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return self.run("dvc", *arguments, check=check, warns=warns, **env)

    def repro(self, *arguments: str, check: bool = True, **env: str) -> list[str]:
        """Run `dvc repro` and return the stages that it ran."""
        return ran(self.dvc("repro", *arguments, check=check, warns=False, **env).stdout)

    def command(self, name: str, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m commands.NAME …` or `dvc-mlflow NAME …` in the folder; see forked.py."""
        bridge = name in ("sync", "audit", "lineage")
        module, words = ("dvc_mlflow", (name, *arguments)) if bridge else (f"commands.{name}", arguments)
        result = forked.run_module(module, words, self.folder, environment() | env)
        assert "Traceback" not in result.stdout + result.stderr, result
        if check and result.returncode != 0:
            raise AssertionError(f"{name} {arguments} exited with {result.returncode}:\n{result.stdout}{result.stderr}")
        return result

    def commands(self, *commands: str, **env: str) -> dict[str, subprocess.CompletedProcess[str]]:
        """Run the commands, each given as one line, one after the other; return how each ended, by that line.

        Each may give only one line as the reason of a failure.
        """
        ends = {line: self.command(*shlex.split(line), check=False, **env) for line in commands}
        assert not any("\n" in end.stderr.partition("error: ")[2].rstrip("\n") for end in ends.values()), ends
        return ends

    def set(self, key: str, value: Any) -> None:
        """Set a parameter, by its dotted key."""
        *sections, last = key.split(".")
        with modify_yaml(self.folder / "params.yaml") as params:
            for section in sections:
                params = params[section]
            params[last] = value

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "-qm", message)

    def md5s(self) -> dict[str, str]:
        """The MD5 of each out, by its path, as dvc.lock has them."""
        stages = load_yaml(self.folder / "dvc.lock")["stages"].values()
        return {out["path"]: out["md5"] for stage in stages for out in stage["outs"]}


class Pipeline:
    """A folder's dvc.yaml, as it stands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = load_yaml(folder / "dvc.yaml")
        self.stages, self.artifacts = content["stages"], content["artifacts"]

    def in_order(self) -> list[str]:
        """The stages, each after those whose outs it reads."""
        makers = {out: stage for stage in self.stages for out in self.outs(stage)}
        before = {stage: [makers[dep] for dep in self.deps(stage) if dep in makers] for stage in self.stages}
        return list(TopologicalSorter(before).static_order())

    def upstream(self, stage: str) -> set[str]:
        """The stages whose outs the stage reads, directly or not."""
        near = {other for other in self.stages if {*self.outs(other)} & {*self.deps(stage)}}
        return near.union(*map(self.upstream, near))

    def deps(self, stage: str) -> list[str]:
        return self.stages[stage].get("deps", [])

    def command(self, stage: str) -> list[str]:
        """The words of the stage's own command, without the launcher."""
        return shlex.split(self.stages[stage]["cmd"].removeprefix("dvc-mlflow run "))

    def outs(self, stage: str, kinds: Iterable[str] = ("outs", "metrics", "plots")) -> list[str]:
        """Paths of the outs, of these kinds."""
        return [path for kind in kinds for path in self._settings(stage, kind)]

    def _settings(self, stage: str, kind: str) -> dict[str, dict[str, Any]]:
        """The outs of this kind, each with its settings."""
        found: dict[str, dict[str, Any]] = {}
        for entry in self.stages[stage].get(kind, []):
            found |= entry if isinstance(entry, dict) else {entry: {}}
        return found

    def hash(self, paths: Iterable[str]) -> dict[str, str]:
        """MD5 of each file, by its path; "" if it is missing."""
        return {path: md5(self.folder / path) if (self.folder / path).is_file() else "" for path in paths}


PIPELINE = Pipeline(ROOT)
STAGES = PIPELINE.in_order()


def copy(project: Project, parent: Path) -> Project:
    """A copy of the project in parent/project, with an MLflow store that has the new location of its artifacts."""
    old, new = project.folder, parent / "project"
    shutil.copytree(old, new, symlinks=True)
    if (new / "mlflow.db").exists():
        move_artifacts(new / "mlflow.db", *((folder / "mlartifacts").as_uri() for folder in (old, new)))
    return Project(new)


def ran(output: str) -> list[str]:
    """The stages that DVC says it ran."""
    return re.findall(r"^Running stage '(\w+)'", output, re.MULTILINE)
