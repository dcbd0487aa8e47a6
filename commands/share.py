"""Send what was run here to the DVC remote and the git remote, or get what others ran.

python -m commands.share push                    make push: outputs, DVC's run cache and the experiments
python -m commands.share pull                    make pull: get them, and check this commit's outputs out
python -m commands.share push --remote backup    to another DVC remote than the default; --git-remote for git's

After a pull, `dvc repro` runs nothing that anyone has run and pushed. `dvc push --run-cache` is not enough for that: it
sends the record of each run, but only those bytes that the workspace or a commit refers to.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvc.repo import Repo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["push", "pull"])
    parser.add_argument("--remote", metavar="NAME", help="the DVC remote (default: core.remote)")
    parser.add_argument("--git-remote", metavar="NAME", default="origin", help="for the experiments (default: origin)")
    args = parser.parse_args()
    from dvc.config import ConfigError, NoRemoteError
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo
    from scmrepo.exceptions import SCMError

    from dvc_mlflow.text import without_credentials

    logging.getLogger("dvc").setLevel(logging.ERROR)  # what it warns of is said here, in one line
    for library in ("dvc_data", "dvc_objects"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # their errors are raised anyway
    try:
        with Repo() as repo, lock_repo(repo):
            remote = repo.cloud.get_remote(args.remote, args.what)
            share = push if args.what == "push" else pull
            try:
                complete = share(repo, remote, args.git_remote)
            except (DvcException, SCMError):
                raise
            except Exception as error:  # the remote's client raises anything: botocore's, asyncssh's, OSError
                line = f"the DVC remote {remote.name} ({_address(remote)}) failed: {_first_line(error)}".rstrip(".")
                sys.exit(f"error: {without_credentials(line)}; what has arrived stays, and the same command continues")
    except KeyboardInterrupt:
        print("stopped; what has arrived stays, and the same command continues", file=sys.stderr)
        sys.exit(130)
    except NoRemoteError:
        sys.exit("error: expected a default DVC remote, found none; `dvc remote add --default team URL` adds one")
    except (DvcException, ConfigError, SCMError) as error:
        sys.exit(f"error: {_first_line(error)}")
    sys.exit(0 if complete else 1)


def push(repo: "Repo", remote: Any, git_remote: str) -> bool:
    """Send bytes first, then what names them, so that others never find a name without bytes; False if some stay."""
    wanted = _objects(repo, push=True)
    sent, failed = 0, 0
    for odb, objects in wanted.items():
        here = {one for one in objects if repo.cache.local.exists(one.value)}
        done = repo.cloud.push(here, remote=remote.name, odb=odb)
        sent, failed = sent + len(done.transferred), failed + len(done.failed)
    if failed:
        raise OSError(f"{failed} of {failed + sent} files were not accepted")
    runs = _copy_runs(repo.cache.legacy, remote.legacy_odb)
    print(f"sent {_count(sent, 'file')} and {_count(runs, 'run')} to {remote.name} ({_address(remote)})")
    refs = [ref for ref, _ in _experiments(repo)]
    if not refs:
        return True
    complete, new = _share_experiments(repo, "push", git_remote, [f"{ref}:{ref}" for ref in refs])
    print(f"sent {_count(new, 'experiment')} to {git_remote}")
    return complete


def pull(repo: "Repo", remote: Any, git_remote: str) -> bool:
    """Get the names first, then the bytes, then check out this commit's; False if some are unavailable."""
    if remote.fs.protocol == "local" and not remote.fs.exists(remote.path):
        raise OSError("the folder is missing; is it mounted?")
    complete, new = _share_experiments(repo, "fetch", git_remote, ["refs/exps/*:refs/exps/*"])
    runs = _copy_runs(remote.legacy_odb, repo.cache.legacy)
    got, absent = 0, set()
    for odb, objects in _objects(repo, push=False).items():
        missing = {one for one in objects if not repo.cache.local.exists(one.value)}
        done = repo.cloud.pull(missing, remote=remote.name, odb=odb)
        got += len(done.transferred)
        if done.failed:
            raise OSError(f"{len(done.failed)} of {len(missing)} files did not arrive")
        absent |= {one.value for one in missing if not repo.cache.local.exists(one.value)}
    print(f"got {_count(got, 'file')} and {_count(runs, 'run')} from {remote.name} ({_address(remote)})")
    print(f"got {_count(new, 'experiment')} from {git_remote}")
    lacking = [out for out in repo.index.outs if out.hash_info and out.hash_info.value in absent]
    for out in lacking:
        print(
            f"error: {out} (MD5 {out.hash_info.value}) is neither here nor in {remote.name}; whoever made it can "
            f"`make push` again, or `dvc repro` makes it again",
            file=sys.stderr,
        )
    if rest := len(absent) - len({out.hash_info.value for out in lacking}):
        print(
            f"{_count(rest, 'file')} of earlier runs and experiments are in neither place; `dvc repro` would rerun them"
        )
    repo.checkout(allow_missing=True)
    return complete and not lacking


def _objects(repo: "Repo", push: bool) -> dict[Any, set[Any]]:
    """What the workspace, branches, tags, experiments and run cache name, by the out's own remote (None: default)."""
    runs = [(entry.parent.name, entry.name) for entry in Path(repo.stage_cache.cache_dir).glob("??/*/*")]
    revs = [rev for _, rev in _experiments(repo)]
    used = repo.used_objs(
        revs=revs or None, all_branches=True, all_tags=True, used_run_cache=runs, push=push, skip_failed=True
    )
    return {odb: {one for one in objects if one.value} for odb, objects in used.items()}


def _copy_runs(source: Any, target: Any) -> int:
    """Copy the entries of DVC's run cache that the target lacks. DVC's own copy hides what fails."""
    from dvc_objects.fs.generic import copy

    def entries(odb: Any) -> set[str]:
        folder = odb.fs.join(odb.path, "runs")
        return {odb.fs.relpath(path, odb.path) for path in odb.fs.find(folder)} if odb.fs.exists(folder) else set()

    missing = sorted(entries(source) - entries(target))
    for path in missing:
        target.fs.makedirs(target.fs.join(target.path, target.fs.parent(path)), exist_ok=True)
    if missing:
        copy(
            source.fs,
            [source.fs.join(source.path, path) for path in missing],
            target.fs,
            [target.fs.join(target.path, path) for path in missing],
        )
    return len(missing)


def _experiments(repo: "Repo") -> list[tuple[str, str]]:
    """The ref of each experiment, and its commit."""
    from dvc.repo.experiments.utils import exp_refs
    from dvc.scm import NoSCM

    if isinstance(repo.scm, NoSCM):
        return []
    return [(str(ref), repo.scm.get_ref(str(ref))) for ref in exp_refs(repo.scm) if ref.name]


def _share_experiments(repo: "Repo", verb: str, git_remote: str, refspecs: Iterable[str]) -> tuple[bool, int]:
    """`push` or `fetch` experiments with git, say which it refused; whether it took them all, and how many are new."""
    command = ["git", "-C", repo.root_dir, verb, "--no-tags", git_remote, *refspecs]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    except FileNotFoundError:
        sys.exit("error: expected git, found none; install it")
    refused = re.findall(r"^ ! \[rejected\] .* -> refs/exps/\S+/(\S+)", done.stderr, re.MULTILINE)
    for name in refused:
        print(
            f"error: {git_remote} has another experiment {name}; rename yours (`dvc exp rename {name} NEW`), then "
            f"`python -m commands.share {'pull' if verb == 'fetch' else verb}` again",
            file=sys.stderr,
        )
    if done.returncode and not refused:
        lines = [line for line in done.stderr.splitlines() if re.match(r"fatal|error|remote|ERROR| !", line)]
        print(f"error: expected git to {verb} experiments, found: {_first_line(chr(10).join(lines))}", file=sys.stderr)
    return done.returncode == 0, len(re.findall(r"^ \* .* -> refs/exps/", done.stderr, re.MULTILINE))


def _address(remote: Any) -> str:
    return remote.fs.unstrip_protocol(remote.path)


def _first_line(error: object) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    main()
