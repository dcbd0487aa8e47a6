"""What DVC knows of the pipeline: dvc.yaml, dvc.lock and the hashes of files, without importing DVC."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


@dataclass(frozen=True)
class Record:
    """One execution of a stage: its command, its params by section, and the MD5 of each dep by its path."""

    stage: str
    cmd: str
    deps: Mapping[str, str]
    params: Mapping[str, Any]
    upstream_params: Mapping[str, Any]  # the sections of the stages that it depends on

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the outs: command, deps and the stage's own params."""
        parts = {"cmd": self.cmd, "deps": self.deps, "params": self.params}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Pipeline:
    """dvc.yaml and dvc.lock of the project in `folder`."""

    def __init__(self, folder: Path) -> None:
        yaml = YAML(typ="safe")
        lock = folder / "dvc.lock"
        self.folder = folder
        self.stages: dict[str, Any] = yaml.load(folder / "dvc.yaml")["stages"]
        self.locked: dict[str, Any] = yaml.load(lock)["stages"] if lock.exists() else {}

    def deps(self, stage: str) -> list[str]:
        return self.stages[stage]["deps"]

    def outs(self, stage: str) -> list[str]:
        """Paths of all outs, metrics files among them."""
        entries = self.stages[stage].get("outs", []) + self.stages[stage].get("metrics", [])
        return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]

    def upstream(self, stage: str) -> set[str]:
        """The stages whose outs this stage needs, directly or not."""
        direct = {other for other in self.stages if set(self.outs(other)) & set(self.deps(stage))}
        return direct.union(*(self.upstream(other) for other in direct))

    def hash(self, paths: Iterable[str]) -> dict[str, str]:
        """MD5 of each file, by its path."""
        return {path: md5(self.folder / path) for path in paths}

    def record(self, stage: str, params: Mapping[str, Any]) -> Record:
        """The execution of `stage` that begins now, with `params` by section."""
        upstream: dict[str, Any] = {}
        for other in self.upstream(stage):  # as they ran: params.yaml may say something else by now
            upstream |= self.locked.get(other, {}).get("params", {}).get("params.yaml", {})
        own = {section: params[section] for section in self.stages[stage]["params"]}
        return Record(stage, self.stages[stage]["cmd"], self.hash(self.deps(stage)), own, upstream)


def md5(path: Path) -> str:
    """MD5 of a file, in hexadecimal, as DVC records it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, as in `dvc params diff`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
