"""Lead from a row in MLflow back to the bytes, and from bytes to the rows.

python -m commands.lineage RUN_ID                        what a run read and made, and how to bring it back
python -m commands.lineage RUN_ID --restore ../again     bring it back in a new folder, and verify it
python -m commands.lineage models/lenet.safetensors      the runs that made or read a file; an MD5 works as well
"""

import argparse
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from stages.pipeline import md5
from stages.stage import hide_credentials

if TYPE_CHECKING:
    from mlflow.entities import Run

    from stages.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="RUN_ID|FILE|MD5")
    parser.add_argument("--restore", type=Path, metavar="DIR", help="new folder in which to bring a run's bytes back")
    args = parser.parse_args()
    if args.restore and args.restore.exists():
        sys.exit(f"error: expected a new folder for --restore, found {args.restore}; name another")

    from stages.store import Store, describe, quiet

    quiet()
    try:
        store = Store(Path.cwd())
        run = find_run(store, args.target)
        digest = md5(Path(args.target)) if Path(args.target).is_file() else args.target
        users = {} if run else store.users(digest)
    except Exception as error:  # the store's, of any kind
        sys.exit(f"error: {describe(error)}")
    if run:
        show_run(store, run, args.restore)
    elif any(users.values()):
        show_users(digest, users)
    else:
        sys.exit(f"error: expected a run id, a file or an MD5 that a run knows, found {args.target}; see `make ui`")


def find_run(store: "Store", target: str) -> "Run | None":
    from stages.store import MlflowException

    if not re.fullmatch("[0-9a-f]{32}", target):
        return None
    try:
        return store.client.get_run(target)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def show_users(digest: str, users: dict[str, list["Run"]]) -> None:
    print(f"md5 {digest}")
    for kind, verb in (("outs", "made by"), ("deps", "read by")):
        for run in users[kind]:
            print(f"  {verb}  {run.info.run_id}  {_when(run)}  {run.info.run_name}")


def show_run(store: "Store", run: "Run", folder: Path | None) -> None:
    tags = run.data.tags
    print(f"run      {run.info.run_id}  {run.info.run_name}  {run.info.status}  {_when(run)}")
    if "dvc.exp_name" in tags:
        print(f"exp      {tags['dvc.exp_name']}, from {tags.get('dvc.exp_baseline_rev', 'an unknown commit')}")
    if "restored" in tags:
        print("record   made from dvc.lock, not by the stage itself")
    dirty = tags.get("git.dirty") == "true"
    state = ", dirty: the patch is the artifact code.patch" if dirty else ", clean"
    commit = tags.get("mlflow.source.git.commit")
    print(f"commit   {commit + state if commit else 'unknown: there was no git, or another tree'}")
    print(f"command  {tags.get('dvc.cmd', 'unknown: not a run of this pipeline')}")
    for kind, title in (("deps", "read"), ("outs", "made")):
        for path, digest in hashes(run, kind).items():
            print(f"{title:<8} {digest}  {path}")
    if not commit or "stage" not in tags:
        sys.exit("error: expected a run of a stage with its commit, found none; nothing can be brought back")
    steps = commands(store, run, folder or Path("restored"))
    if not folder:
        print("\nTo bring these bytes back:\n")
        for step in steps:
            print("  " + shlex.join(step))
        return
    for step in steps:
        print("+ " + shlex.join(step), flush=True)
        try:
            done = subprocess.run(step).returncode == 0
        except FileNotFoundError:
            sys.exit(f"error: expected {step[0]}, found none; install it, or activate the environment")
        if not done:
            sys.exit(f"error: that failed; {folder} is as far as it came")
    verify(run, folder)


def commands(store: "Store", run: "Run", folder: Path) -> list[list[str]]:
    """The commands that make the run's files again in a new folder, with the help of DVC's cache."""
    from stages.store import PATCH, mlflow

    tags = run.data.tags
    cache = subprocess.run(["dvc", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    steps = [
        ["git", "clone", "--quiet", "--shared", "--no-checkout", str(store.pipeline.folder), str(folder)],
        ["git", "-C", str(folder), "checkout", "--quiet", "--detach", tags["mlflow.source.git.commit"]],
        ["dvc", "--cd", str(folder), "cache", "dir", "--local", str(Path(cache).resolve())],
    ]
    if tags["git.dirty"] == "true":
        download = ["mlflow", "artifacts", "download", "--run-id", run.info.run_id, "--artifact-path", PATCH]
        address = mlflow.get_tracking_uri()
        if hide_credentials(address) == address:  # else it came by the environment, and the command gets it there
            download = ["env", f"MLFLOW_TRACKING_URI={address}", *download]
        steps += [
            [*download, "--dst-path", str(folder / ".git")],
            ["git", "-C", str(folder), "apply", f".git/{PATCH}"],
        ]
    return [*steps, ["dvc", "--cd", str(folder), "repro", tags["stage"]]]


def verify(run: "Run", folder: Path) -> None:
    """Compare the files with the run's hashes; exit with 1 where one differs."""
    wrong = 0
    for path, expected in (hashes(run, "deps") | hashes(run, "outs")).items():
        found = md5(folder / path) if (folder / path).is_file() else "nothing"
        if found == expected:
            print(f"verified {expected}  {path}")
        else:
            wrong += 1
            print(f"expected {expected}  {path}, found {found}")
    if wrong:
        sys.exit(f"error: {wrong} file(s) in {folder} are not those of run {run.info.run_id}")


def hashes(run: "Run", kind: str) -> dict[str, str]:
    """The MD5 of each of the run's "deps" or "outs", by its path."""
    prefix = f"dvc.{kind}."
    return {key.removeprefix(prefix): md5 for key, md5 in sorted(run.data.tags.items()) if key.startswith(prefix)}


def _when(run: "Run") -> str:
    return datetime.fromtimestamp(run.info.start_time / 1000).isoformat(" ", "seconds")


if __name__ == "__main__":
    main()
