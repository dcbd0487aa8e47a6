"""What DVC knows of the pipeline: dvc.yaml, dvc.lock and the hashes of files, without importing DVC."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from stages.stage import StageError, md5


@dataclass(frozen=True)
class Record:
    """One execution of a stage: its command, its params as dvc.yaml names them, the MD5 of each dep and out by path."""

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
        """Read both. Raises StageError where one of them is damaged, as by a merge."""
        self.folder = folder
        self.stages: dict[str, Any] = {}
        self.lock: dict[str, Any] = {}
        path, cure = folder / "dvc.yaml", "`git checkout dvc.yaml` brings it back"
        try:
            self.stages = _read_stages(path)
            order = self.in_order()
            path, cure = folder / "dvc.lock", "remove it, and `dvc repro` makes it again"
            if path.exists():
                self.lock = _read_stages(path)
            for stage in order:
                self.locked(stage)
        except (OSError, UnicodeDecodeError, YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}: " if mark else ""
            raise StageError(f"cannot read {path}: {where}{getattr(error, 'problem', None) or error}; {cure}") from None
        except (KeyError, TypeError, AttributeError, RecursionError):
            raise StageError(f"{path}: expected stages as DVC writes them, found something else; {cure}") from None

    def cmd(self, stage: str) -> str:
        """The command; those of a list as one."""
        return _one_command(self.stages[stage]["cmd"])

    def deps(self, stage: str) -> list[str]:
        return self._paths(stage, "deps")

    def outs(self, stage: str) -> list[str]:
        """Paths of all outs, metrics files and plots among them."""
        return self._paths(stage, "outs", "metrics", "plots")

    def _paths(self, stage: str, *kinds: str) -> list[str]:
        entries = [entry for kind in kinds for entry in self.stages[stage].get(kind, [])]
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
        """The execution of `stage` that begins now, with `params`, the content of params.yaml."""
        own = {key: lookup(params, key) for key in self.stages[stage].get("params", []) if isinstance(key, str)}
        return Record(stage, self.cmd(stage), self.hash(self.deps(stage)), own, self._upstream_params(stage), {})

    def locked(self, stage: str) -> Record | None:
        """The execution that dvc.lock records; None where it records none."""
        if stage not in self.lock:
            return None
        entry = self.lock[stage]
        deps, outs = ({file["path"]: file["md5"] for file in entry.get(kind, [])} for kind in ("deps", "outs"))
        own = entry.get("params", {}).get("params.yaml", {})
        return Record(stage, _one_command(entry["cmd"]), deps, own, self._upstream_params(stage), outs)

    def add(self, record: Record) -> None:
        """Put an execution into the lock, here alone: DVC writes it to dvc.lock when the stage has ended."""
        deps, outs = ([{"path": path, "md5": md5} for path, md5 in of.items()] for of in (record.deps, record.outs))
        params = {"params.yaml": record.params}
        self.lock[record.stage] = {"cmd": record.cmd, "deps": deps, "params": params, "outs": outs}

    def missing_outs(self, stage: str) -> list[str]:
        """The outs of the stage that are not as dvc.lock says; all of them where it says nothing."""
        record = self.locked(stage)
        locked = record.outs if record else {}
        paths = dict.fromkeys([*self.outs(stage), *locked])
        return [path for path, digest in self.hash(paths).items() if digest != locked.get(path)]

    def _upstream_params(self, stage: str) -> dict[str, Any]:
        """The params of the stages before this one as they ran: params.yaml may say something else by now."""
        params: dict[str, Any] = {}
        for other in self.upstream(stage):
            params |= self.lock.get(other, {}).get("params", {}).get("params.yaml", {})
        return params


def _read_stages(path: Path) -> dict[str, Any]:
    return dict(YAML(typ="safe").load(path)["stages"].items())


def _one_command(cmd: str | list[str]) -> str:
    return cmd if isinstance(cmd, str) else " && ".join(cmd)


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """The value of a key that DVC tracks, such as `train` or `train.lr`; None where there is none."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, as in `dvc params diff`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
