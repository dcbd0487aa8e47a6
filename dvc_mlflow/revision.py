"""A project in one commit: its dvc.yaml and dvc.lock, the files in git, the date and the author."""

import copy
import hashlib
import posixpath
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from dvc.dependency import ParamsDependency
from dvc.dvcfile import PROJECT_FILE, ProjectFile
from dvc.exceptions import DvcException
from dvc.repo.index import Index
from dvc.stage import PipelineStage, Stage
from dvc_data.hashfile.hash_info import HashInfo

from dvc_mlflow.execution import Execution, inside
from dvc_mlflow.project import Git, Project, _plain, hash_path, matches, one_command


@dataclass(frozen=True)
class Commit:
    """A git commit, or the commit of a DVC experiment."""

    rev: str
    time: int  # the author date, in milliseconds since 1970
    author: str  # Name <address>
    pipeline: frozenset[tuple[str, str]] = frozenset()  # git's hash of each dvc.yaml, dvc.lock and params.yaml
    changed: frozenset[str] = frozenset()  # the files that differ from its first parent
    experiment: str = ""  # its name
    baseline: str = ""  # of the experiment

    @property
    def short(self) -> str:
        return self.experiment or self.rev[:7]


@dataclass
class Known:
    """What all revisions share: the remote to ask, what it lacks, and hashes of files."""

    remotes: tuple[Any, ...] = ()  # DVC's object databases: for DVC 3, and for older versions
    matches: dict[tuple[str, int, int, str], bool] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)


class Revision(Project):
    """The project in a commit, while DVC is switched to it (`repo.switch`); made by `Revision.of`."""

    commit: Commit
    _known: Known
    _current: dict[str, bool]
    _blobs: dict[str, Path | None]

    @classmethod
    def of(cls, project: Project, commit: Commit, known: Known) -> "Revision":
        """The project in the commit that DVC is switched to."""
        there = copy.copy(project)
        there.forget()
        there.__class__ = cls
        assert isinstance(there, Revision)
        there._current, there._blobs = {}, {}
        there.commit, there._known = commit, known
        return there

    @cached_property
    def index(self) -> Index:
        """What DVC reads from each dvc.yaml: .dvc files, of which there may be thousands, are not needed for stages."""
        files = [posixpath.join(self.repo.root_dir, path) for path, _ in self.commit.pipeline]
        files = [path for path in files if posixpath.basename(path) == PROJECT_FILE]
        own = [path for path in files if not self.repo.dvcignore.is_ignored(self.repo.fs, path, ignore_subrepos=True)]
        return Index.from_indexes(self.repo, map(self._read_index, sorted(own)))

    def _read_index(self, path: str) -> Index:
        """What a dvc.yaml declares, as Index.from_file has it; dvc.lock, which may be long, is read once."""
        dvcfile = ProjectFile(self.repo, path)
        self._locks[path] = dict(dvcfile.lockfile_contents.get("stages") or {})
        return Index(
            self.repo,
            stages=list(dvcfile.stages.values()),
            metrics={path: dvcfile.metrics},
            plots={path: dvcfile.plots},
            artifacts={path: dvcfile.artifacts},
        )

    # When, by whom, of which code

    def now(self) -> int:
        """The commit's time."""
        return self.commit.time

    def tags(self) -> dict[str, str]:
        """The commit, and the experiment's baseline."""
        baseline = {"dvc.exp_baseline_rev": self.commit.baseline} if self.commit.baseline else {}
        return {"commit": self.commit.rev, **baseline}

    def git(self, written: list[str]) -> Git:
        """The commit, which is clean."""
        return Git(self.commit.rev, author=self.commit.author)

    def author_of(self, execution: Execution) -> str:
        """The commit's author: it is the first that has the execution."""
        return self.commit.author

    def _committed(self, path: str) -> str:
        if self.commit.baseline:
            return self.ask_git("show", f"{self.commit.baseline}:./{path}").decode()
        return self._read(path).decode()

    def code_folder(self, execution: Execution, paths: list[str]) -> Path | None:
        """A folder with these files and folders of the commit; None if it lacks the code that ran."""
        if not all(self.is_current(one.stage) for one in (*execution.upstream, execution)):
            return None
        folder = Path(self._scratch.name) / self.commit.rev
        archive = folder.with_suffix(".tar")
        try:
            archive.write_bytes(self.ask_git("archive", self.commit.rev, "--", *paths))
        except (OSError, subprocess.CalledProcessError):  # it lacks one of them
            return None
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        archive.unlink()
        return folder

    def is_current(self, address: str) -> bool:
        """Whether the commit has the command, params and deps that the stage ran with."""
        if address not in self._current:
            execution = self.locked_alone(address)
            self._current[address] = bool(execution and self._has(self.stages[address], execution))
        return self._current[address]

    def _has(self, stage: PipelineStage, execution: Execution) -> bool:
        if one_command(stage.cmd) != execution.cmd:
            return False
        params, deps = {}, []
        try:
            for dep in stage.deps:
                if isinstance(dep, ParamsDependency):
                    params[self.path(stage, dep.def_path)] = _plain(dep.read_params())
                else:
                    deps.append(self.path(stage, dep.def_path))
        except (DvcException, OSError):
            return False
        return (
            params == execution.params
            and {*deps} == {*execution.deps}
            and all(self._has_dep(path, digest) for path, digest in execution.deps.items())
        )

    def _has_dep(self, path: str, digest: str) -> bool:
        """Whether git has these bytes, or DVC has them as the out of a stage or of a .dvc file."""
        if urlparse(path).scheme or self._makers(path):  # a stage is known to have made it: else it would be Unprovable
            return True
        there = self._there(path)
        if self.repo.fs.isfile(there):
            return self._blob(path, digest) is not None
        for stage in self._dvc_files(path):
            for out in stage.outs:
                place = self.path(stage, out.def_path)
                if path == place:
                    return out.hash_info.value == digest
                if inside(path, place) and out.hash_info.value:
                    entries = self.entries(place, out.hash_info.value) or {}
                    return entries.get(posixpath.relpath(path, place)) == digest
        if digest.endswith(".dir"):
            return self.repo.fs.isdir(there) and hash_path(there, self.repo, self.repo.fs).hash_info.value == digest
        return False

    def _dvc_files(self, path: str) -> Iterator[Stage]:
        """The .dvc files that may have a path or what holds it: those of its name first, then all, which takes long."""
        for place in (path, *map(str, PurePosixPath(path).parents)):
            file = self._there(f"{place}.dvc")
            if self.repo.fs.isfile(file):
                yield from Index.from_file(self.repo, file).stages
        yield from self.repo.index.stages

    # Where bytes are

    def find(self, path: str, digest: str, most: int | None = None) -> Path | None:
        """A local copy of the file with this hash: from git, DVC's cache, the workspace or, if asked for, the remote.

        Files not declared as a metric or plot, for which `most` is given, are not fetched.
        """
        found = self._find(path, digest, most)
        if found is None and most is None and self._pull(path, digest):
            found = self._find(path, digest, most)
        return found

    def _find(self, path: str, digest: str, most: int | None) -> Path | None:
        for file in self._copies(path, digest):
            try:
                status = file.stat()
            except OSError:
                continue
            if most is None or status.st_size <= most:
                key = (str(file), status.st_mtime_ns, status.st_size, digest)
                if key not in self._known.matches:
                    self._known.matches[key] = matches(file, digest)
                if self._known.matches[key]:
                    return file
        return None

    def _copies(self, path: str, digest: str) -> Iterator[Path]:
        if not urlparse(path).scheme and (blob := self._blob(path, digest)):
            yield blob
        yield from self.cached(digest)
        if not urlparse(path).scheme:
            yield self.folder / path

    def _there(self, path: str) -> str:
        return posixpath.join(self.repo.root_dir, path)

    def _read(self, path: str) -> bytes:
        return self.repo.fs.cat_file(self._there(path))

    def _blob(self, path: str, digest: str) -> Path | None:
        """A copy of the commit's file at this path, if it has this hash."""
        if path not in self._blobs:
            self._blobs[path] = self._copy_out(path)
        blob = self._blobs[path]
        return blob if blob and matches(blob, digest) else None

    def _copy_out(self, path: str) -> Path | None:
        if not self.repo.fs.isfile(self._there(path)):
            return None
        data = self._read(path)
        blob = Path(self._scratch.name) / f"{hashlib.md5(data).hexdigest()}{posixpath.splitext(path)[1]}"
        if not blob.exists():
            blob.write_bytes(data)
        return blob

    def _read_entries(self, path: str, digest: str) -> Mapping[str, str] | None:
        found = super()._read_entries(path, digest)
        there = self._there(path)
        if found is None and not urlparse(path).scheme and self.repo.fs.isdir(there):
            tree = hash_path(there, self.repo, self.repo.fs)
            if tree.hash_info.value == digest:
                return {"/".join(key): info.value for key, _, info in tree}
        if found is None and self._pull(path, digest):
            found = super()._read_entries(path, digest)
        return found

    def _pull(self, path: str, digest: str) -> bool:
        """Fetch an object from the remote into DVC's cache, if asked for; return whether it arrived."""
        if urlparse(path).scheme or digest in self._known.absent:
            return False
        for remote in self._known.remotes:
            if self.repo.cloud.pull([HashInfo(remote.hash_name, digest)], odb=remote).transferred:
                return True
        self._known.absent.add(digest)
        return False
