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
    """One execution of a stage: its command, its params by section, and the MD5 of each dep and out by its path."""

    stage: str
    cmd: str
    deps: Mapping[str, str]
    params: Mapping[str, Any]
    upstream_params: Mapping[str, Any]  # the sections of the stages that it depends on
    outs: Mapping[str, str]  # empty while it is at work

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the outs: command, deps and the stage's own params."""
        parts = {"cmd": self.cmd, "deps": self.deps, "params": self.params}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Pipeline:
    """dvc.yaml and dvc.lock of the project in `folder`."""

    def __init__(self, folder: Path) -> None:
        yaml = YAML(typ="safe")
        path = folder / "dvc.lock"
        self.folder = folder
        self.stages: dict[str, Any] = yaml.load(folder / "dvc.yaml")["stages"]
        self.lock: dict[str, Any] = yaml.load(path)["stages"] if path.exists() else {}

    def deps(self, stage: str) -> list[str]:
        return self.stages[stage]["deps"]

    def outs(self, stage: str) -> list[str]:
        """Paths of all outs, metrics files and plots among them."""
        entries = [entry for kind in ("outs", "metrics", "plots") for entry in self.stages[stage].get(kind, [])]
        return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]

    def upstream(self, stage: str) -> set[str]:
        """The stages whose outs this stage needs, directly or not."""
        direct = {other for other in self.stages if set(self.outs(other)) & set(self.deps(stage))}
        return direct.union(*(self.upstream(other) for other in direct))

    def in_order(self) -> list[str]:
        """The stages, each after those that it depends on."""
        return sorted(self.stages, key=lambda stage: len(self.upstream(stage)))

    def hash(self, paths: Iterable[str]) -> dict[str, str]:
        """MD5 of each file, by its path; "" for a file that is not there."""
        return {path: md5(self.folder / path) if (self.folder / path).is_file() else "" for path in paths}

    def starting(self, stage: str, params: Mapping[str, Any]) -> Record:
        """The execution of `stage` that begins now, with `params` by section."""
        own = {section: params[section] for section in self.stages[stage]["params"]}
        deps = self.hash(self.deps(stage))
        return Record(stage, self.stages[stage]["cmd"], deps, own, self._upstream_params(stage), {})

    def locked(self, stage: str) -> Record | None:
        """The execution that dvc.lock records; None where it records none."""
        if stage not in self.lock:
            return None
        entry = self.lock[stage]
        deps, outs = ({file["path"]: file["md5"] for file in entry.get(kind, [])} for kind in ("deps", "outs"))
        own = entry.get("params", {}).get("params.yaml", {})
        return Record(stage, entry["cmd"], deps, own, self._upstream_params(stage), outs)

    def missing_outs(self, stage: str) -> list[str]:
        """The outs of the stage that are not as dvc.lock says; all of them where it says nothing."""
        if stage not in self.lock:
            return self.outs(stage)
        locked = {file["path"]: file["md5"] for file in self.lock[stage]["outs"]}
        return [path for path, digest in self.hash(locked).items() if digest != locked[path]]

    def _upstream_params(self, stage: str) -> dict[str, Any]:
        """The params of the stages before this one as they ran: params.yaml may say something else by now."""
        params: dict[str, Any] = {}
        for other in self.upstream(stage):
            params |= self.lock.get(other, {}).get("params", {}).get("params.yaml", {})
        return params


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
