"""Lead from a run back to the bytes, and from bytes to the runs."""

import re
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from dvc_mlflow.audit import digest_of
from dvc_mlflow.execution import Execution
from dvc_mlflow.project import Project, hash_path
from dvc_mlflow.store import PATCH, Store
from dvc_mlflow.text import UserError, without_credentials


def lineage(store: Store, target: str, folder: Path | None) -> None:
    """Print what is known of a run, a file or a hash; bring a run's bytes back into a new folder if one is named.

    Raises UserError if nothing is known, or if the bytes cannot be brought back.
    """
    run = _run(store, target)
    if run:
        return show_run(store, run, folder)
    path = Path(target)
    digest = hash_path(path.absolute(), store.project.repo).hash_info.value if path.exists() else target
    users = {
        kind: [
            run
            for path in _paths(store.project, kind)
            for run in store.search({f"dvc.{kind}.{path}": digest}, "FINISHED")
        ]
        for kind in ("outs", "deps")
    }
    if not any(users.values()):
        raise UserError(f"expected a run id, a file or an MD5 that a run knows, found {target}")
    print(f"md5 {digest}")
    for kind, verb in (("outs", "made by"), ("deps", "read by")):
        for run in users[kind]:
            print(f"  {verb}  {run.info.run_id}  {_when(run)}  {run.info.run_name}")
    return None


def _paths(project: Project, kind: str) -> list[str]:
    return sorted(
        {
            project.path(stage, one.def_path)
            for stage in project.stages.values()
            for one in (stage.outs if kind == "outs" else stage.deps)
        }
    )


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
    """Print what a run read and made and how to bring it back, or do that."""
    tags, execution = run.data.tags, store.execution_of(run)
    print(f"run      {run.info.run_id}  {run.info.run_name}  {run.info.status}  {_when(run)}")
    if "dvc.exp_name" in tags:
        print(f"exp      {tags['dvc.exp_name']}, from {tags.get('dvc.exp_baseline_rev', 'an unknown commit')}")
    if "restored" in tags:
        print("record   made from dvc.lock, not by the stage itself")
    state = ", dirty: the patch is the artifact code.patch" if tags.get("git.dirty") == "true" else ", clean"
    commit = tags.get("mlflow.source.git.commit")
    print(f"commit   {commit + state if commit else 'unknown: there was no git, or another tree'}")
    print(f"command  {tags.get('dvc.cmd', 'unknown: not a run of this pipeline')}")
    for kind, title in (("deps", "read"), ("outs", "made")):
        for path, digest in hashes(run, execution, kind).items():
            print(f"{title:<8} {digest}  {path}")
    if not commit or "stage" not in tags:
        raise UserError("expected a run of a stage with its commit, found none; nothing can be brought back")
    steps = commands(store, run, folder or Path("restored"))
    if not folder:
        print("\nTo bring these bytes back:\n")
        for step in steps:
            print("  " + shlex.join(step))
        return
    restore(store, run, execution, steps, folder)


def _git(folder: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask git. Raises UserError if there is none."""
    try:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("expected git, found none; install it, or activate the environment") from None


def commands(store: Store, run: Run, folder: Path) -> list[list[str]]:
    """The commands that bring the run's files back in a new folder: from DVC's cache, the remote, or by computing."""
    tags, project = run.data.tags, store.project
    top = _git(project.folder, "rev-parse", "--show-toplevel")
    source = top.stdout.strip() or str(project.folder)
    inner = folder / project.folder.resolve().relative_to(Path(source).resolve())
    cache = Path(project.repo.cache.local.path).resolve()
    database = cache.parent.parent if cache.name == "md5" else cache
    commit = tags["mlflow.source.git.commit"]
    if _git(source, "cat-file", "-e", f"{commit}^{{commit}}").returncode:
        raise UserError(f"git does not have commit {commit[:12]} here; `git fetch --all` or `dvc exp pull` brings it")
    steps = [
        ["git", "clone", "--quiet", "--shared", "--no-checkout", source, str(folder)],
        ["git", "-C", str(folder), "checkout", "--quiet", "--detach", commit],
        ["dvc", "--cd", str(inner), "cache", "dir", "--local", str(database)],
    ]
    if tags.get("git.dirty") == "true":
        download = ["mlflow", "artifacts", "download", "--run-id", run.info.run_id, "--artifact-path", PATCH]
        address = mlflow.get_tracking_uri()
        if without_credentials(address) == address:  # else it came by the environment, and the command gets it there
            download = ["env", f"MLFLOW_TRACKING_URI={address}", *download]
        relative = inner.relative_to(folder)
        steps += [
            [*download, "--dst-path", str(folder / ".git")],
            [
                "git",
                "-C",
                str(folder),
                "apply",
                *([f"--directory={relative}"] if relative.parts else []),
                f".git/{PATCH}",
            ],
        ]
    # --pull asks the remote, if there is one, before it computes; without a store of its own it records nothing.
    repro = ["dvc", "--cd", str(inner), "repro", *(["--pull"] if project.repo.config["core"].get("remote") else [])]
    scratch = f"sqlite:///{(folder / '.git' / 'mlflow.db').absolute()}"
    return [*steps, ["env", f"MLFLOW_TRACKING_URI={scratch}", *repro, tags["stage"]]]


def restore(store: Store, run: Run, execution: Execution | None, steps: list[list[str]], folder: Path) -> None:
    """Take the steps and compare every hash. Raises UserError; no half-made folder stays."""
    project = store.project
    top = _git(project.folder, "rev-parse", "--show-toplevel")
    inner = folder / project.folder.resolve().relative_to(Path(top.stdout.strip()).resolve())
    try:
        for step in steps:
            print("+ " + shlex.join(step), flush=True)
            try:
                done = subprocess.run(step).returncode == 0
            except FileNotFoundError:
                raise UserError(f"expected {step[0]}, found none; install it, or activate the environment") from None
            if not done:
                raise UserError(f"`{shlex.join(step)}` failed")
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
            raise UserError(f"{wrong} file(s) are not those of run {run.info.run_id}; {folder} was removed")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def hashes(run: Run, execution: Execution | None, kind: str) -> dict[str, str]:
    """The hash of each of the run's "deps" or "outs", by its path."""
    if execution:
        return dict(sorted(getattr(execution, kind).items()))
    prefix = f"dvc.{kind}."
    return {key.removeprefix(prefix): md5 for key, md5 in sorted(run.data.tags.items()) if key.startswith(prefix)}


def _when(run: Run) -> str:
    return datetime.fromtimestamp(run.info.start_time / 1000).isoformat(" ", "seconds")
