"""What DVC's index knows about a project: stages, what they declare, what dvc.lock records, where bytes are."""

import contextlib
import copy
import hashlib
import json
import os
import posixpath
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.fs import LocalFileSystem
from dvc.repo import Repo
from dvc.repo.index import Index
from dvc.stage import PipelineStage
from dvc.stage.cache import _get_cache_hash
from dvc.utils.serialize import load_yaml, parse_yaml
from dvc_data.hashfile.build import build
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.tree import Tree
from scmrepo.exceptions import SCMError

from dvc_mlflow.execution import Curves, Declared, Execution, inside, meet
from dvc_mlflow.text import UserError, one_line

HASHES = ("md5", "etag", "checksum", "version_id")
OVERLOOKED = ("size", "nfiles")  # DVC's run cache ignores params of these names: its issue 10296


class Unprovable(Exception):  # noqa: N818
    """The history of an execution in dvc.lock cannot be proven."""


@dataclass(frozen=True)
class Git:
    """The commit, the patch from it to the files, and the author."""

    commit: str = ""
    patch: bytes = b""
    author: str = ""


class Project:
    """The DVC project that contains a folder; `root` is where records go: for a temporary experiment, the real one."""

    def __init__(self, folder: Path) -> None:
        """Open it. Raises UserError if there is none."""
        try:
            self.repo = Repo(str(folder))
        except (DvcException, SCMError) as error:
            raise UserError(f"expected a DVC project in {folder}, found none: {one_line(error)}") from None
        self.folder = Path(self.repo.root_dir)
        self.root = Path(os.environ.get("DVC_ROOT", self.folder)).resolve()
        self._locks: dict[str, dict[str, Any]] = {}
        self._executions: dict[str, Execution | None] = {}
        self._opened = time.time() - 1  # seconds since 1970; some file systems keep whole seconds
        self._entries: dict[str, Mapping[str, str] | None] = {}

    @cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A folder for copies of a commit's files, made when needed: a recorder, which ends at once, needs none."""
        return tempfile.TemporaryDirectory(prefix="dvc-mlflow-")

    def at_this_revision(self) -> "Project":
        """The project in the commit that DVC is switched to (`repo.switch`)."""
        there = copy.copy(self)
        there.forget()
        return there

    def forget(self) -> None:
        """Read again what depends on the revision that DVC looks at."""
        for name in ("stages", "_outs", "_deps"):
            self.__dict__.pop(name, None)
        self._locks, self._executions = {}, {}

    # What dvc.yaml declares

    @property
    def index(self) -> Index:
        """What DVC reads from its files."""
        return self.repo.index

    @cached_property
    def stages(self) -> dict[str, PipelineStage]:
        """The stages by address, in dependency order. Raises UserError if a DVC file is damaged."""
        try:
            graph = self.index.graph
        except (DvcException, SCMError, OSError, RecursionError) as error:
            raise UserError(_unreadable(error)) from None
        from networkx import topological_sort

        ordered = [stage for stage in topological_sort(graph.reverse()) if isinstance(stage, PipelineStage)]
        return {self.address(stage): stage for stage in ordered}

    def after(self, address: str) -> list[str]:
        """The stages that depend on this one, directly or not, in dependency order."""
        from networkx import ancestors

        found = ancestors(self.index.graph, self.stages[address])
        return [other for other, stage in self.stages.items() if stage in found]

    def address(self, stage: PipelineStage) -> str:
        """The stage's address from the root of the project: `train@0`, or `sub/dvc.yaml:train`."""
        path = posixpath.relpath(Path(stage.path).as_posix(), Path(self.repo.root_dir).as_posix())
        return stage.name if path == "dvc.yaml" else f"{path}:{stage.name}"

    def find_stage(self, name: str, folder: Path) -> str:
        """The address of the stage that DVC runs as `name` (its DVC_STAGE) in `folder`. Raises UserError."""
        path, _, bare = name.rpartition(":")
        found = [
            address
            for address, stage in self.stages.items()
            if stage.name == bare and Path(stage.wdir).resolve() == folder.resolve()
        ]
        if len(found) > 1:
            found = [a for a in found if self.stages[a].path.endswith(path.lstrip("./") or "dvc.yaml")]
        if len(found) != 1:
            raise UserError(f"expected one stage {name} that runs in {folder}, found {len(found)}")
        return found[0]

    def path(self, stage: PipelineStage, text: str) -> str:
        """A stage's path relative to the project's root; a URL as it is."""
        if urlparse(text).scheme:
            return text
        root = Path(self.repo.root_dir).as_posix()
        whole = posixpath.normpath(posixpath.join(Path(stage.wdir).as_posix(), text))
        return posixpath.relpath(whole, root) if not posixpath.isabs(text) or inside(whole, root) else whole

    def outs(self, stage: PipelineStage) -> list[str]:
        """Paths of all outs, including metrics and plots."""
        return [self.path(stage, out.def_path) for out in stage.outs]

    @cached_property
    def _outs(self) -> dict[str, list[str]]:
        """The outs of each stage, by its address."""
        return {address: self.outs(stage) for address, stage in self.stages.items()}

    @cached_property
    def _deps(self) -> dict[str, list[str]]:
        """The deps of each stage, by its address, without its params."""
        return {
            address: [self.path(stage, dep.def_path) for dep in stage.deps if not isinstance(dep, ParamsDependency)]
            for address, stage in self.stages.items()
        }

    def metrics_files(self) -> list[str]:
        """The paths of the metrics files of all stages, stage by stage."""
        declared = (self.declared(stage, [], self.outs(stage)) for stage in self.stages.values())
        return [path for one in declared for path in one.metrics]

    def declared(self, stage: PipelineStage, deps: list[str], outs: list[str]) -> Declared:
        """What dvc.yaml declares about these files of a stage."""
        index = self.index
        metrics = [self.path(stage, out.def_path) for out in stage.outs if out.metric]
        plots = [self.path(stage, out.def_path) for out in stage.outs if out.plot]
        curves = []
        for out in stage.outs:
            for props in out.plot if isinstance(out.plot, list) else [out.plot]:
                if isinstance(props, dict) and props.get("x"):
                    columns = (props["y"],) if props.get("y") else ()
                    curves.append(Curves(self.path(stage, out.def_path), props["x"], columns))
        for folder, path in self._top_level(index._metrics):
            metrics.append(_join(folder, path))
        for folder, plot in self._top_level(index._plots):
            for found, drawn in plot_files(folder, plot):
                plots.append(found)
                curves += [drawn] if drawn else []
        files = {*deps, *outs}

        def own(path: str) -> bool:
            return any(inside(path, out) for out in outs)

        def near_out(path: str) -> bool:
            return any(meet(path, out) for out in outs)

        artifacts = {
            self._artifact_name(dvcfile, name): (_join(self._folder(dvcfile), value["path"]), value)
            for dvcfile, values in index._artifacts.items()
            for name, value in values.items()
        }
        near = {
            name: (path, value)
            for name, (path, value) in artifacts.items()
            if path in files or any(inside(path, one) for one in files)
        }
        models = {name: path for name, (path, value) in near.items() if value.get("type") == "model" and own(path)}
        return Declared(
            desc=stage.desc or "",
            metrics=tuple(dict.fromkeys(path for path in metrics if own(path))),
            plots=tuple(dict.fromkeys(path for path in plots if near_out(path))),
            curves=tuple(dict.fromkeys(curve for curve in curves if near_out(curve.path))),
            datasets={name: path for name, (path, value) in near.items() if value.get("type") == "dataset"},
            models=models,
            model_meta={
                name: {"desc": artifacts[name][1].get("desc", ""), **(artifacts[name][1].get("meta") or {})}
                for name in models
            },
            models_read={name: path for name, path in self.model_paths().items() if path in deps},
            prefix=self._prefix(stage, deps),
        )

    def _top_level(self, declared: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for dvcfile, values in declared.items():
            for value in values:
                yield self._folder(dvcfile), value

    def _folder(self, dvcfile: str) -> str:
        return posixpath.relpath(posixpath.dirname(Path(dvcfile).as_posix()), Path(self.repo.root_dir).as_posix())

    def _artifact_name(self, dvcfile: str, name: str) -> str:
        folder = self._folder(dvcfile)
        return name if folder == "." else f"{folder}:{name}"

    def model_paths(self) -> dict[str, str]:
        """The path of each artifact of type model, by name."""
        return {
            self._artifact_name(dvcfile, name): _join(self._folder(dvcfile), value["path"])
            for dvcfile, values in self.index._artifacts.items()
            for name, value in values.items()
            if value.get("type") == "model"
        }

    def _prefix(self, stage: PipelineStage, deps: list[str]) -> str:
        """The prefix of the stage's metrics if other stages read the same model; "" if none do."""
        read = [path for path in self.model_paths().values() if path in deps]
        readers = [address for address, paths in self._deps.items() if any(path in read for path in paths)]
        return self.address(stage) if len(readers) > 1 else ""

    # What dvc.lock records, and what is about to run

    def locked(self, address: str) -> Execution | None:
        """The execution that dvc.lock records, with its upstream; None if it records none.

        Raises Unprovable if an execution that made one of its inputs is no longer in dvc.lock, or if it may have run
        with other params.
        """
        own = self.locked_alone(address)
        if own is None:
            return None
        self.check_run_cache(own)
        return replace(own, upstream=self._upstream(own))

    def locked_alone(self, address: str) -> Execution | None:
        """The execution that dvc.lock records, without its upstream."""
        stage = self.stages[address]
        if stage.path not in self._locks:
            self._locks[stage.path] = dict(stage.dvcfile.lockfile_contents.get("stages") or {})
        if address not in self._executions:
            entry = self._locks[stage.path].get(stage.name)
            self._executions[address] = self._execution(address, entry) if entry else None
        return self._executions[address]

    def _execution(self, address: str, entry: Mapping[str, Any]) -> Execution:
        stage = self.stages[address]
        hashes = {
            kind: {self.path(stage, file["path"]): _digest(file) for file in entry.get(kind) or []}
            for kind in ("deps", "outs")
        }
        params = {self.path(stage, path): _plain(values) for path, values in (entry.get("params") or {}).items()}
        declared = self.declared(stage, list(hashes["deps"]), list(hashes["outs"]))
        return Execution(address, one_command(entry["cmd"]), params, hashes["deps"], hashes["outs"], declared)

    def starting(self, address: str) -> Execution:
        """The execution that starts now. Raises Unprovable, or DvcException if a dep is missing."""
        stage = self.stages[address]
        params, deps = {}, {}
        for dep in stage.deps:
            path = self.path(stage, dep.def_path)
            if isinstance(dep, ParamsDependency):
                params[path] = _plain(dep.read_params())
            else:
                deps[path] = dep.get_hash().value
        declared = self.declared(stage, list(deps), self.outs(stage))
        own = Execution(address, one_command(stage.cmd), params, deps, declared=declared)
        return replace(own, upstream=self._upstream(own))

    def ended(self, execution: Execution) -> Execution:
        """The execution with the current hashes of its outs. Raises UserError if one is missing."""
        outs = {}
        stage = self._as_now(execution.stage)
        for out in stage.outs:
            if not out.exists:
                raise UserError(f"expected {out}, found nothing: the command ended without it")
            outs[self.path(stage, out.def_path)] = out.get_hash().value
        return replace(execution, outs=outs, declared=self.declared(stage, list(execution.deps), list(outs)))

    def _as_now(self, address: str) -> PipelineStage:
        """The stage in the current dvc.yaml, which DVCLive changes during a run; as it was if that cannot be read."""
        before = self.stages[address]
        if Path(before.path).stat().st_mtime < self._opened:
            return before
        self.repo._reset()
        del self.stages
        try:
            return self.stages[address]
        except (UserError, KeyError):
            self.stages = {address: before}
            return before

    def add(self, execution: Execution) -> None:
        """Treat an execution as recorded, in memory only: DVC writes dvc.lock once the command has ended."""
        stage = self.stages[execution.stage]
        self.locked_alone(execution.stage)  # reads the lock, if nothing has yet
        self._executions.pop(execution.stage)
        self._locks[stage.path][stage.name] = {
            "cmd": execution.cmd,
            "params": {posixpath.relpath(p, self.path(stage, ".")): dict(v) for p, v in execution.params.items()},
            **{
                kind: [{"path": self._from_wdir(stage, p), "md5": digest} for p, digest in files.items()]
                for kind, files in (("deps", execution.deps), ("outs", execution.outs))
            },
        }

    def write_locks(self, executions: Iterable[Execution]) -> None:
        """Write dvc.lock as these executions left it, so that DVC looks for their outs before it runs a stage."""
        for execution in executions:
            stage = self.stages.get(execution.stage)
            digests = {**execution.deps, **execution.outs}
            if stage is None or not all(re.fullmatch(r"[0-9a-f]{32}(\.dir)?", digest) for digest in digests.values()):
                continue
            for one in (*stage.deps, *stage.outs):
                if isinstance(one, ParamsDependency):
                    values = dict(execution.params.get(self.path(stage, one.def_path), {}))
                    one.hash_info = HashInfo("params", values)  # type: ignore[arg-type]  # as DVC itself does
                else:
                    one.hash_info = HashInfo("md5", digests.get(self.path(stage, one.def_path)))
                    one.meta = Meta()
            stage.dvcfile._lockfile.dump(stage)

    def put_back(self, address: str) -> None:
        """Copy missing outs that dvc.lock records from DVC's cache to their places."""
        execution = self.locked_alone(address)
        for path, digest in execution.outs.items() if execution else ():
            entries = self.entries(path, digest) if digest.endswith(".dir") else {".": digest}
            for name, one in (entries or {}).items():
                place = self.folder / posixpath.normpath(posixpath.join(path, name))
                cached = self.find(path, one) if not place.exists() else None
                if cached:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(cached, place.with_name(f"{place.name}.tmp")).replace(place)

    def _from_wdir(self, stage: PipelineStage, path: str) -> str:
        return (
            path if urlparse(path).scheme or posixpath.isabs(path) else posixpath.relpath(path, self.path(stage, "."))
        )

    def _upstream(self, execution: Execution) -> tuple[Execution, ...]:
        found: dict[str, Execution] = {}
        for path, digest in execution.deps.items():
            for address in self._makers(path):
                own = self.locked_alone(address)
                if own is None or not self.made(own, path, digest):
                    raise Unprovable(f"dvc.lock does not say what made the {path} that it read")
                self.check_run_cache(own)
                for other in (*self._upstream(own), own):
                    found.setdefault(other.stage, other)
        return tuple(found.values())

    def check_run_cache(self, execution: Execution) -> None:
        """Raise Unprovable if DVC's run cache has these outs for other params only."""
        names = sorted({name for params in execution.params.values() for name in OVERLOOKED if name in _keys(params)})
        if not names:
            return
        stage = self.stages[execution.stage]
        entry = self._locks[stage.path][stage.name]
        folder = Path(self.repo.stage_cache._get_cache_dir(_get_cache_hash(dict(entry), key=True)))
        kept = [load_yaml(file) for file in folder.iterdir()] if folder.is_dir() else []
        params = [
            _plain(one.get("params"))
            for one in kept
            if [_digest(out) for out in one["outs"]] == [_digest(out) for out in entry["outs"]]
        ]
        if params and _plain(entry["params"]) not in params:
            raise Unprovable(
                f"DVC took the outs of {execution.stage} from its run cache, which ignores params named "
                f"{' and '.join(names)}: other values made them; rename the param"
            )

    def _makers(self, path: str) -> list[str]:
        """The stages with an out that is this path, contains it, or is inside it."""
        return [address for address, outs in self._outs.items() if any(meet(path, out) for out in outs)]

    def made(self, execution: Execution, path: str, digest: str) -> bool:
        """Whether the execution made the bytes with this hash at this path, or its part of them."""
        for out, own in execution.outs.items():
            if out == path:
                return own == digest
            if inside(path, out):
                entries = self.entries(out, own)
                name = posixpath.relpath(path, out)
                return entries is not None and (entries.get(name) == digest or _tree_digest(entries, name) == digest)
            if inside(out, path):
                entries = self.entries(path, digest)
                name = posixpath.relpath(out, path)
                return entries is not None and own in (entries.get(name), _tree_digest(entries, name))
        return False

    def would_skip(self, address: str) -> bool:
        """Whether DVC would skip the stage."""
        return not self.stages[address].always_changed and self.is_current(address)

    def is_current(self, address: str) -> bool:
        """Whether command, params and deps match dvc.lock."""
        execution = self.locked_alone(address)
        if execution is None:
            return False
        try:
            current = self.starting(address)
        except (DvcException, Unprovable, OSError):
            return False
        return current.fingerprint == execution.fingerprint

    # Where bytes are

    def find(self, path: str, digest: str, most: int | None = None) -> Path | None:
        """A local copy of the file with this hash: from the workspace, the commit being read, or DVC's cache."""
        for file in self._copies(path, digest):
            if (most is None or (file.exists() and file.stat().st_size <= most)) and matches(file, digest):
                return file
        return None

    def is_larger(self, path: str, digest: str, size: int) -> bool:
        """Whether there is a local copy of more than `size` bytes, of whatever hash."""
        return any(file.exists() and file.stat().st_size > size for file in self._copies(path, digest))

    def _copies(self, path: str, digest: str) -> Iterator[Path]:
        if not urlparse(path).scheme:
            yield self.folder / path
            if not isinstance(self.repo.fs, LocalFileSystem):
                there = posixpath.join(self.repo.root_dir, path)
                if self.repo.fs.isfile(there):
                    blob = Path(self._scratch.name) / f"{digest}{posixpath.splitext(path)[1]}"
                    blob.write_bytes(self.repo.fs.cat_file(there))
                    yield blob
        yield from self.cached(digest)

    def cached(self, digest: str) -> list[Path]:
        """Where DVC's local cache would store the object with this hash."""
        return [Path(db.oid_to_path(digest)) for db in (self.repo.cache.local, self.repo.cache.legacy)]

    def entries(self, path: str, digest: str) -> Mapping[str, str] | None:
        """The hashes of the files in a directory with this hash, by path relative to it; None if unavailable."""
        if digest not in self._entries:
            self._entries[digest] = self._read_entries(path, digest)
        return self._entries[digest]

    def _read_entries(self, path: str, digest: str) -> Mapping[str, str] | None:
        tree: Any = None
        for db in (self.repo.cache.local, self.repo.cache.legacy):
            if tree is None and Path(db.oid_to_path(digest)).exists():
                try:
                    tree = Tree.load(db, HashInfo("md5", digest))
                    tree.digest()
                except Exception:  # a damaged object raises more than DVC's own exceptions
                    tree = None
                if tree is not None and tree.hash_info.value != digest:
                    tree = None
        if tree is None and (self.folder / path).is_dir():
            tree = hash_path(self.folder / path, self.repo)
            if tree.hash_info.value != digest:
                tree = None
        return None if tree is None else {"/".join(key): info.value for key, _, info in tree}

    # Git

    def git(self, written: list[str]) -> Git:
        """The commit, and the patch from it to the current files, without those DVC writes; empty without git."""
        read = {"params.yaml"}
        for stage in self.stages.values():  # untracked files count if they are deps or beside one
            read |= {self.path(stage, dep.def_path) for dep in stage.deps if not urlparse(dep.def_path).scheme}
            read.add(posixpath.relpath(Path(stage.path).as_posix(), self.folder.as_posix()))
        read |= {posixpath.dirname(path) for path in read} - {""}
        exclude = [f":(exclude){path}" for path in written]
        plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
        diff = ("diff", "--binary", "--relative", *plain)
        try:
            commit = self.ask_git("rev-parse", "HEAD").decode().strip()
            with self._old_index() as index:
                patch = self.ask_git(*diff, "HEAD", "--", ".", *exclude, GIT_INDEX_FILE=index)
            existing = [path for path in sorted(read - {*written}) if (self.folder / path).exists()]
            listed = (
                self.ask_git("ls-files", "--others", "--exclude-standard", "-z", "--", *existing) if existing else b""
            )
            for path in listed.split(b"\0")[:-1]:
                name = os.fsdecode(path)
                if not any(inside(name, out) for out in written):
                    patch += self.ask_git(*diff, "--no-index", "--", "/dev/null", name, accept=1)
        except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
            return Git(author=self.author())
        return Git(commit, patch, self.author())

    @contextlib.contextmanager
    def _old_index(self) -> Iterator[str]:
        """A copy of git's index, dated before all files, so that git reads each of them.

        Otherwise it misses a same-size change within the second of the checkout, as DVC makes for an experiment.
        """
        index = self.folder / os.fsdecode(self.ask_git("rev-parse", "--git-path", "index")).rstrip("\n")
        with tempfile.TemporaryDirectory(prefix="dvc-mlflow-") as folder:
            copy = Path(folder) / "index"
            if index.exists():
                shutil.copyfile(index, copy)
                os.utime(copy, (1, 1))
            yield str(copy)

    def author(self) -> str:
        """Git's author here, as `Name <address>`; "" if git knows none."""
        try:
            return self.ask_git("var", "GIT_AUTHOR_IDENT").decode().rpartition(">")[0] + ">"
        except (OSError, subprocess.CalledProcessError):
            return ""

    def author_of(self, execution: Execution) -> str:
        """Who ran an execution in dvc.lock: the author of the commit that last changed its entry.

        Until the entry is committed, that is whoever works here; "unknown" if the clone is too shallow to tell.
        """
        stage = self.stages[execution.stage]
        lock = posixpath.relpath(Path(stage.path).with_suffix(".lock").as_posix(), Path(self.repo.root_dir).as_posix())
        rev = "HEAD" if isinstance(self.repo.fs, LocalFileSystem) else self.repo.get_rev()
        try:
            text = self.ask_git("show", f"{rev}:./{lock}").decode()
            committed = (parse_yaml(text, lock) or {}).get("stages") or {}
            if committed.get(stage.name) != self._locks[stage.path][stage.name]:
                return self.author()
            lines = text.splitlines()
            starts = [number for number, line in enumerate(lines, 1) if re.match(r"  \S", line)]
            first = next(number for number in starts if lines[number - 1].strip(" :'\"") == stage.name)
            last = next((number - 1 for number in starts if number > first), len(lines))
            shown = self.ask_git("log", "-1", "-s", "--format=%P%n%an <%ae>", f"-L{first},{last}:{lock}", rev).decode()
            shallow = self.ask_git("rev-parse", "--is-shallow-repository").strip() == b"true"
        except (DvcException, OSError, subprocess.CalledProcessError):  # no git, or no commit with a dvc.lock yet
            return self.author()
        parents, author = shown.splitlines()
        return "unknown" if shallow and not parents else author

    def written(self) -> list[str]:
        """The files that DVC writes: locks and outs."""
        locks = {posixpath.splitext(Path(stage.path).as_posix())[0] + ".lock" for stage in self.stages.values()}
        outs = [out for stage in self.stages.values() for out in self.outs(stage)]
        root = self.folder.as_posix()
        return [*sorted(posixpath.relpath(lock, root) for lock in locks), *outs]

    def committed_params(self, execution: Execution) -> Execution | None:
        """The execution with the params of the last commit; None without git or commit."""
        from dvc.utils.serialize import PARSERS

        params = {}
        for path, values in execution.params.items():
            try:
                content = PARSERS[posixpath.splitext(path)[1] or ".yaml"](self._committed(path), path)
            except Exception:  # no git, no commit, no such file then, or one that cannot be read
                return None
            params[path] = {key: lookup(content, key) for key in values}
        return replace(execution, params=_plain(params))

    def _committed(self, path: str) -> str:
        return self.ask_git("show", f"HEAD:./{path}").decode()

    def code_folder(self, execution: Execution, paths: list[str]) -> Path | None:
        """The folder that has these files and folders, as they were when the execution ran."""
        return self.folder

    def now(self) -> int:
        """The start time of a new record, in milliseconds since 1970."""
        return int(time.time() * 1000)

    def tags(self) -> dict[str, str]:
        """The tags of each new record."""
        baseline = os.environ.get("DVC_EXP_BASELINE_REV")
        return {"dvc.exp_baseline_rev": baseline} if baseline else {}

    def ask_git(self, *arguments: str, stdin: bytes = b"", accept: int = 0, **env: str) -> bytes:
        """The output of git in the project's folder. Raises OSError without git, CalledProcessError if it fails."""
        command = ["git", "-C", str(self.folder), *arguments]
        result = subprocess.run(command, input=stdin, capture_output=True, env=os.environ | env)
        if result.returncode not in (0, accept):
            raise subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)
        return result.stdout


class Owners:
    """Which executions belong to an experiment: those that its baseline lacks, or all if it has them all."""

    def __init__(self, project: Project, experiment: str | None, baseline: str | None = None) -> None:
        self.experiment = experiment
        self._baseline: set[str] = set()
        rev = baseline or os.environ.get("DVC_EXP_BASELINE_REV")
        if experiment and rev:
            with project.repo.switch(rev):
                there = project.at_this_revision()
                for address in there.stages:
                    with contextlib.suppress(Unprovable):
                        execution = there.locked(address)
                        self._baseline |= {execution.id} if execution else set()

    def of(self, execution: Execution) -> str | None:
        """The experiment's name if the execution belongs to it."""
        return None if execution.id in self._baseline else self.experiment


def one_command(cmd: str | list[str]) -> str:
    """The command of a stage; a list becomes one command per line."""
    return "\n".join(cmd) if isinstance(cmd, list) else cmd


def lookup(values: Any, key: str) -> Any:
    """The value of a key that DVC tracks, such as `train.lr`; None if there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def matches(path: Path, digest: str) -> bool:
    """Whether a file has this MD5 as DVC computes it; in old projects, with Unix line endings."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() == digest:
            return True
    return path.stat().st_size < 2**25 and hashlib.md5(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest() == digest


def hash_path(path: Path | str, repo: Repo, fs: Any = None) -> Any:
    """DVC's object for a file or directory, hashed from its bytes: DVC itself trusts the modification time."""
    from dvc_data.hashfile.db import HashFileDB

    fs = fs or LocalFileSystem()
    database = HashFileDB(fs, posixpath.dirname(str(path)))
    return build(database, str(path), fs, "md5", dry_run=True, ignore=repo.dvcignore)[2]


def _unreadable(error: BaseException) -> str:
    """One line on a file that DVC cannot read: the error, its position and the remedy."""
    said, cause = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__), error.__cause__
    while cause is not None and not hasattr(cause, "problem_mark"):
        cause = cause.__cause__
    mark = getattr(cause, "problem_mark", None)
    where = f" (line {mark.line + 1}: {one_line(getattr(cause, 'problem', ''), 100)})" if mark else ""
    cure = "remove it, and `dvc repro` recreates it" if ".lock'" in said else "`git checkout` restores it"
    return f"DVC cannot read the pipeline: {said.rstrip('.:')}{where}; {cure}"


def _tree_digest(entries: Mapping[str, str], name: str) -> str:
    """The hash of a subdirectory."""
    part = [
        {"md5": digest, "relpath": posixpath.relpath(path, name)}
        for path, digest in entries.items()
        if inside(path, name)
    ]
    if not part:
        return ""
    tree = Tree.from_list(part, hash_name="md5")
    tree.digest()
    return tree.hash_info.value


def _digest(entry: Mapping[str, Any]) -> str:
    """The hash of a dep or out in dvc.lock, of any kind."""
    for key in HASHES:
        if entry.get(key):
            return str(entry[key])
    rest = {key: value for key, value in entry.items() if key != "path"}
    return hashlib.md5(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest() if rest else ""


def _keys(values: Any) -> set[str]:
    """The keys of mappings, at any depth."""
    if not isinstance(values, Mapping):
        return set()
    return {*values}.union(*(_keys(value) for value in values.values()))


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values, default=str))


def _join(folder: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(folder, path))


def plot_files(folder: str, plot: Any) -> Iterator[tuple[str, Curves | None]]:
    """The files of a top-level plot in dvc.yaml, each with its curves if it has an x."""
    if isinstance(plot, str):
        yield _join(folder, plot), None
        return
    ((name, props),) = plot.items()
    props = props or {}
    x, y = props.get("x"), props.get("y")
    if not isinstance(y, dict):  # the plot is named for its file
        columns = tuple([y] if isinstance(y, str) else y or ())
        path = _join(folder, name)
        yield path, Curves(path, x, columns) if isinstance(x, str) else None
        return
    for file, named in y.items():
        column = x.get(file) if isinstance(x, dict) else x
        path = _join(folder, file)
        yield path, Curves(path, column, tuple([named] if isinstance(named, str) else named)) if column else None
