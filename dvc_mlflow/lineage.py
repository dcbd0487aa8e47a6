"""Trace a run back to its bytes, and bytes to their runs."""

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import mlflow
import psutil
from dvc.stage import PipelineStage
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from dvc_mlflow.execution import Execution
from dvc_mlflow.project import Project, hash_path
from dvc_mlflow.status import digest_of
from dvc_mlflow.store import PATCH, Store
from dvc_mlflow.text import UserError, one_line, without_credentials


def lineage(store: Store, target: str, folder: Path | None) -> None:
    """Print what is known about a run, a file or a hash; restore the run in a new folder if one is given.

    Raises UserError if nothing is known, or if the run cannot be restored.
    """
    run = _run(store, target)
    if run:
        return show_run(store, run, folder)
    path = Path(target)
    digest = hash_path(path.absolute(), store.project.repo).hash_info.value if path.exists() else target
    every = {kind: _paths(store.project, kind) for kind in ("outs", "deps")}
    own = Path(os.path.relpath(path, store.project.repo.root_dir)).as_posix()
    users = _users(store, digest, {kind: paths & {own} for kind, paths in every.items()} if path.exists() else {})
    if not any(users.values()):  # a hash, or a copy: its bytes may be of any path
        users = _users(store, digest, every)
    if not any(users.values()):
        raise UserError(f"expected a run id, or a file or MD5 that a run made or read, found {target}")
    made = [key for run in users["outs"] for key, md5 in run.data.tags.items() if md5 == digest and "dvc.outs." in key]
    print(f"md5 {digest}{Places(store.project).note(made[0].removeprefix('dvc.outs.'), digest) if made else ''}")
    for kind, verb in (("outs", "made by"), ("deps", "read by")):
        for run in users[kind]:
            print(f"  {verb}  {run.info.run_id}  {_when(run)}  {run.info.run_name}")
    return None


def _users(store: Store, digest: str, paths: Mapping[str, set[str]]) -> dict[str, list[Run]]:
    """The finished runs that made ("outs") or read ("deps") these bytes, by a path of those."""
    return {
        kind: [run for path in sorted(those) for run in store.search({f"dvc.{kind}.{path}": digest}, "FINISHED")]
        for kind, those in paths.items()
    }


def _paths(project: Project, kind: str) -> set[str]:
    """The paths of all outs or deps of the pipeline."""
    return {
        project.path(stage, one.def_path)
        for stage in project.index.stages  # in no order: to find it would import networkx, for 0.3 s
        if isinstance(stage, PipelineStage)
        for one in (stage.outs if kind == "outs" else stage.deps)
    }


def _run(store: Store, target: str) -> Run | None:
    if not re.fullmatch("[0-9a-f]{32}", target):
        return None
    try:
        return store.client.get_run(target)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def show_run(store: Store, run: Run, folder: Path | None) -> None:
    """Print what a run read and made; restore it in `folder`, or print how to."""
    tags, execution = run.data.tags, store.execution_of(run)
    print(f"run      {run.info.run_id}  {run.info.run_name}  {run.info.status}  {_when(run)}")
    if "dvc.exp_name" in tags:
        print(f"exp      {tags['dvc.exp_name']}, from {tags.get('dvc.exp_baseline_rev', 'an unknown commit')}")
    if "restored" in tags:
        print("record   made from dvc.lock, not by the stage itself")
    state = ", dirty: the patch is the artifact code.patch" if tags.get("git.dirty") == "true" else ", clean"
    commit = tags.get("mlflow.source.git.commit")
    print(f"commit   {commit + state if commit else 'unknown: no git, or other code'}")
    print(f"command  {tags.get('dvc.cmd', 'unknown: not a run of this pipeline')}")
    places, made = Places(store.project, commit), {*hashes(run, execution, "outs")}
    made |= {path for one in (execution.upstream if execution else ()) for path in one.outs}
    for kind, title in (("deps", "read"), ("outs", "made")):
        for path, digest in hashes(run, execution, kind).items():
            print(f"{title:<8} {digest}  {path}{places.note(path, digest) if path in made else ''}", flush=True)
    if not commit or "stage" not in tags:
        raise UserError("expected a stage's run with a commit, found none; it cannot be restored")
    if folder:
        restore(store, run, execution, folder)
    else:
        print(f"restore  dvc-mlflow lineage {run.info.run_id} --restore DIR")


class Places:
    """Where the bytes of outs can be had."""

    def __init__(self, project: Project, commit: str | None = None) -> None:
        """`commit` may have outs that DVC does not cache."""
        self._project, self._commit = project, commit
        self._silent: dict[str, str] = {}  # the remotes that could not be asked, and why

    def note(self, path: str, digest: str) -> str:
        """What to add to a line on these bytes: "" if they are here, else which remote has them, or that none has."""
        if self._here(path, digest):
            return ""
        remotes = [*self._project.repo.config["remote"]]
        if not remotes:
            return "  (gone: not here, and there is no DVC remote)"
        for name in remotes:
            if name not in self._silent and self._has(name, digest):
                return f"  (not here; the remote {name} has it)"
        if self._silent:
            why = "; ".join(f"the remote {name} cannot be asked: {error}" for name, error in self._silent.items())
            return f"  (not here; {why})"
        return f"  (gone: neither here nor in the remote {', '.join(remotes)})"

    def _here(self, path: str, digest: str) -> bool:
        if digest_of(self._project, path, digest) == digest:
            return True
        parts = [digest, *((self._project.entries(path, digest) or {}).values() if digest.endswith(".dir") else ())]
        if all(any(file.exists() for file in self._project.cached(part)) for part in parts):
            return True
        if not self._commit:
            return False
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # git may have an out that DVC does not cache
            return hashlib.md5(self._project.ask_git("show", f"{self._commit}:./{path}")).hexdigest() == digest
        return False

    def _has(self, remote: str, digest: str) -> bool:
        try:
            for kind in ("md5", "md5-dos2unix"):
                odb = self._project.repo.cloud.get_remote_odb(remote, hash_name=kind)
                with contextlib.suppress(FileNotFoundError):
                    odb.fs.info(odb.oid_to_path(digest))  # its `exists` says False if the remote is down
                    return True
        except Exception as error:  # the remote's client raises anything: botocore's, asyncssh's, OSError
            self._silent[remote] = without_credentials(one_line(error, 200))
        return False


def _git(folder: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git. Raises UserError if it is not installed."""
    try:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("expected git, found none; install it, or activate the environment") from None


def restore(store: Store, run: Run, execution: Execution | None, folder: Path) -> None:
    """Restore the run's files in a new folder, from DVC's cache, its remote or by rerunning; verify every hash.

    Raises UserError if that fails or a hash differs; the folder is then removed.
    """
    tags, project, commit = run.data.tags, store.project, run.data.tags["mlflow.source.git.commit"]
    top = Path(_git(project.folder, "rev-parse", "--show-toplevel").stdout.strip() or project.folder).resolve()
    inner = folder / project.folder.resolve().relative_to(top)
    cache = Path(project.repo.cache.local.path).resolve()
    try:
        if _git(top, "cat-file", "-e", f"{commit}^{{commit}}").returncode:
            remotes = _git(top, "remote").stdout.split()
            if not remotes:
                raise UserError(f"expected commit {commit[:12]} in git, found neither it nor a remote to fetch it from")
            remote = "origin" if "origin" in remotes else remotes[0]
            _step("git", "-C", str(top), "fetch", "--quiet", "--depth", "1", remote, commit)
        _step("git", "init", "--quiet", str(folder))
        # A clone of a shallow repository would lack some of its commits.
        _step("git", "-C", str(folder), "fetch", "--quiet", "--depth", "1", str(top), commit)
        _step("git", "-C", str(folder), "checkout", "--quiet", "--detach", commit)
        if tags.get("git.dirty") == "true":
            mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=PATCH, dst_path=f"{folder}/.git")
            part = inner.relative_to(folder)
            directory = [f"--directory={part}"] if part.parts else []
            _step("git", "-C", str(folder), "apply", *directory, f".git/{PATCH}")
        database = cache.parent.parent if cache.name == "md5" else cache
        database.mkdir(parents=True, exist_ok=True)
        (folder / ".git" / "dvc-cache").symlink_to(database)  # DVC cannot write a non-ASCII path
        link = os.path.relpath(folder / ".git" / "dvc-cache", inner)
        _step("dvc", "--cd", str(inner), "cache", "dir", "--quiet", "--local", link)
        _use_remotes(project, inner)
        if execution:
            Project(inner).write_locks([*execution.upstream, execution])
        # --pull asks the remote, if there is one, before a stage runs; what runs is recorded in a separate store.
        pull = ["--pull"] if project.repo.config["core"].get("remote") else []
        scratch = f"MLFLOW_TRACKING_URI=sqlite:///{(folder / '.git' / 'mlflow.db').absolute()}"
        _step("env", scratch, "dvc", "--cd", str(inner), "repro", *pull, tags["stage"])
        there, wrong = Project(inner), 0
        for path, expected in (hashes(run, execution, "deps") | hashes(run, execution, "outs")).items():
            if "://" in path:
                continue
            found = digest_of(there, path, expected)
            if found == expected:
                print(f"verified {expected}  {path}")
            else:
                wrong += 1
                print(f"expected {expected}  {path}, found {found or 'nothing'}", file=sys.stderr)
        if wrong:
            raise UserError(f"{wrong} file(s) differ from run {run.info.run_id}; {folder} was removed")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _use_remotes(project: Project, folder: Path) -> None:
    """Let the DVC project in this folder use the remotes of this one: an old commit may name none, or others."""
    config = project.repo.config
    there = Project(folder).repo.config
    Path(there.files["local"]).chmod(0o600)  # before it has credentials
    with there.edit("local") as local:
        local["remote"] = {name: dict(settings) for name, settings in config["remote"].items()}
        local["core"] = {key: value for key, value in config["core"].items() if key == "remote"}


def _step(*command: str) -> None:
    """Show a command and run it. Raises UserError if it fails."""
    print("+ " + shlex.join(command), flush=True)
    try:
        process = subprocess.Popen(command)
    except FileNotFoundError:
        raise UserError(f"expected {command[0]}, found none; install it, or activate the environment") from None
    try:
        done = process.wait() == 0
    except BaseException:  # a signal to this process alone: its children would continue, in a folder that is gone
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid)
            for one in (started, *started.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        raise
    if not done:
        raise UserError(f"`{shlex.join(command)}` failed")


def hashes(run: Run, execution: Execution | None, kind: str) -> dict[str, str]:
    """The hash of each of the run's "deps" or "outs", by its path."""
    if execution:
        return dict(sorted(getattr(execution, kind).items()))
    prefix = f"dvc.{kind}."
    return {key.removeprefix(prefix): md5 for key, md5 in sorted(run.data.tags.items()) if key.startswith(prefix)}


def _when(run: Run) -> str:
    return datetime.fromtimestamp(run.info.start_time / 1000).isoformat(" ", "seconds")
