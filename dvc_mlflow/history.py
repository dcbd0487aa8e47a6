"""Record a project's history: the executions of all commits and experiments, each once, as of the first that has it."""

import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from dvc.exceptions import DvcException
from dvc.scm import NoSCM, resolve_rev
from scmrepo.exceptions import SCMError
from tqdm import tqdm

from dvc_mlflow.execution import Execution, MissingBytes
from dvc_mlflow.project import Owners, Project, Unprovable
from dvc_mlflow.revision import Commit, Known, Revision
from dvc_mlflow.store import Store, describe
from dvc_mlflow.sync import experiments, own_executions
from dvc_mlflow.text import UserError, one_line

PIPELINE = ("dvc.yaml", "dvc.lock", "params.yaml")  # the files that define the stages and record what they did


def sync_history(store: Store, revs: list[str], fetch: bool) -> Iterator[tuple[str, bool]]:
    """Record the executions of these revisions, or of all if none is given; yield lines, and whether each is a failure.

    With `fetch`, metrics and plots that are not local come from DVC's remote. Raises UserError if a revision is
    unknown or there is no git repository.
    """
    project = store.project
    if isinstance(project.repo.scm, NoSCM):
        raise UserError("expected a git repository, found none; `dvc-mlflow sync` records what dvc.lock has")
    if _git(project, "rev-parse", "--is-shallow-repository").strip() == "true":
        yield "this clone is shallow: older commits are missing; `git fetch --unshallow` fetches them", False
    history, wanted = History(store, _remotes(project) if fetch else ()), None
    own: dict[str, list[tuple[str, str]]] = {}  # experiments by revision: name and baseline of each
    for name, rev, baseline in experiments(project):
        own.setdefault(rev, []).append((name, baseline))
    if revs:
        ends = [_resolve(project, rev) for rev in revs]
        own = {rev: named for rev, named in own.items() if rev in ends}
        ends = [rev for rev in ends if rev not in own]
    else:
        ends = tips(project)
    baselines = {baseline for named in own.values() for _, baseline in named}
    here = _present(project, baselines)
    commits = read_commits(project, [*ends, *here, *own])
    of_baseline: dict[str, list[Commit]] = {}
    for rev, named in own.items():
        for name, baseline in named:
            if baseline in here:
                one = replace(commits[rev], experiment=name, baseline=baseline)
                of_baseline.setdefault(baseline, []).append(one)
            else:
                yield f"{name}: not recorded: its baseline {baseline[:7]} is not in this clone; `git fetch`", True
    order: list[Commit] = []
    listed = _git(project, "rev-list", "--date-order", "--reverse", "--stdin", stdin=[*ends, *here]) if commits else ""
    for rev in listed.split():
        # An experiment may be applied and committed later: it comes before the commits that follow its baseline.
        order += [commits[rev], *sorted(of_baseline.get(rev, []), key=lambda one: one.time)]
    if revs:
        wanted = history.executions_of([commits[rev] for rev in [*ends, *here]])
    for commit in tqdm(order, "history", unit="commit", disable=None):
        history.visit(commit, None if commit.experiment else wanted)
    yield from history.report(len(order) - sum(map(len, of_baseline.values())), sum(map(len, of_baseline.values())))


class History:
    """A walk through the commits: what it has recorded, and what it could not."""

    def __init__(self, store: Store, remotes: tuple[Any, ...]) -> None:
        self._store, self._project, self._known = store, store.project, Known(remotes)
        store.know_all()
        self._visited: dict[object, set[str]] = {}  # by pipeline: the files whose bytes were missing
        self._owners: dict[str, Owners] = {}
        self._done: set[tuple[str, str, str | None]] = set()  # stage, execution, experiment
        self._failures: dict[tuple[str, str, str | None], tuple[str, Commit]] = {}
        self._unreadable: dict[str, list[Commit]] = {}
        self._problems: dict[str, list[Commit]] = {}
        self.made = 0

    def executions_of(self, commits: Iterable[Commit]) -> set[str]:
        """The ids of these commits' executions."""
        found = set()
        for commit in commits:
            try:
                with self._project.repo.switch(commit.rev):
                    there = Revision.of(self._project, commit, self._known)
                    found |= {one.id for address in there.stages if (one := there.locked_alone(address))}
            except Exception:  # `visit` reports it
                continue
        return found

    def visit(self, commit: Commit, wanted: set[str] | None) -> None:
        """Record the executions of a commit, only those in `wanted` if it is given."""
        if not any(PurePosixPath(path).name == "dvc.lock" for path, _ in commit.pipeline):
            return
        key = (commit.pipeline, commit.experiment)
        if key in self._visited and not self._visited[key] & commit.changed:
            return
        missing = self._visited[key] = set()
        try:
            owners = self._owners_of(commit)
            with self._project.repo.switch(commit.rev):
                there = Revision.of(self._project, commit, self._known)
                with self._store.looking_at(there):
                    for address, found, experiment in own_executions(there, owners):
                        alone = there.locked_alone(address)
                        of_baseline = owners and isinstance(found, Execution) and owners.of(found) is None
                        if of_baseline and not there.is_current(address):
                            continue  # the experiment's change is not in its dvc.lock: no stage ran
                        if alone and found and (wanted is None or alone.id in wanted):
                            missing |= self._record(there, alone, found, experiment)
        except UserError as error:
            line = re.sub(r" in revision '\w+'", "", str(error).rpartition("; ")[0] or str(error))
            self._unreadable.setdefault(line, []).append(commit)

    def _owners_of(self, commit: Commit) -> Owners | None:
        if not commit.experiment:
            return None
        if commit.baseline not in self._owners:
            self._owners[commit.baseline] = Owners(self._project, commit.experiment, commit.baseline)
        owners = self._owners[commit.baseline]
        owners.experiment = commit.experiment
        return owners

    def _record(
        self, there: Revision, alone: Execution, found: Execution | Unprovable, experiment: str | None
    ) -> set[str]:
        """Record an execution unless it has a run; return the missing file, if there is one."""
        address, key = alone.stage, (alone.stage, alone.id, experiment)
        try:
            if isinstance(found, Unprovable):
                raise found
            if self._store.lacks(found, experiment):
                _, made = self._store.record(found, experiment)
                self.made += made
                for problem in self._store.problems:
                    self._problems.setdefault(f"{address}: {problem}", []).append(there.commit)
        except (Unprovable, MissingBytes) as error:
            of_baseline = (*key[:2], None) in self._failures
            if not of_baseline and key not in self._done and not self._store.find_alone(alone):
                self._failures.setdefault(key, (_reason(error, bool(self._known.remotes)), there.commit))
            return {str(error)} if isinstance(error, MissingBytes) else set()
        self._done.add((address, found.id, experiment))
        self._failures.pop(key, None)
        return set()

    def report(self, commits: int, experiments: int) -> Iterator[tuple[str, bool]]:
        """What was recorded, what cannot be shown, and what could not be recorded and why."""
        for line, where in self._problems.items():
            yield f"{line} ({_named(where)})", False
        for line, where in self._unreadable.items():
            yield f"{_named(where)}: not recorded: {line}", True
        grouped: dict[str, list[Commit]] = {}
        for (address, _, _), (reason, commit) in self._failures.items():
            grouped.setdefault(f"{address}: not recorded: {reason}", []).append(commit)
        for line, where in grouped.items():
            yield f"{line} ({_named(where)})", True
        missing = len(self._failures)
        yield (
            (
                f"{_count(commits, 'commit')} and {_count(experiments, 'experiment')}: "
                f"{_count(self.made, 'execution')} recorded, {len(self._done) - self.made} before"
                + (f", {missing} cannot be recorded" if missing else "")
                + (
                    f"; {_count(sum(map(len, self._unreadable.values())), 'revision')} not read"
                    if self._unreadable
                    else ""
                )
            ),
            False,
        )


def tips(project: Project) -> list[str]:
    """The commits that HEAD, branches, remote branches and tags point to."""
    listed = _git(
        project,
        "for-each-ref",
        "--format=%(if)%(*objectname)%(then)%(*objecttype) %(*objectname)%(else)%(objecttype) %(objectname)%(end)",
        *("refs/heads", "refs/remotes", "refs/tags"),
    )
    found = {line.split()[1]: None for line in listed.splitlines() if line.startswith("commit ")}
    head = _git(project, "rev-parse", "--quiet", "--verify", "HEAD^{commit}", accept=1).strip()
    return [*found, *([head] if head and head not in found else [])]


def read_commits(project: Project, tips: list[str]) -> dict[str, Commit]:
    """These commits and all their ancestors, by hash."""
    if not tips:  # git would default to HEAD
        return {}
    text = _git(
        project,
        *("log", "-z", "--raw", "--no-renames", "--no-abbrev", "--diff-merges=first-parent", "--relative"),
        *("--date-order", "--reverse", "--format=%x1e%H%x1f%P%x1f%at%x1f%an%x20%x3c%ae%x3e", "--stdin"),
        stdin=tips,
    )
    found: dict[str, Commit] = {}
    for entry in text.split("\x1e")[1:]:
        header, _, changes = entry.partition("\0")
        rev, parents, seconds, author = header.split("\x1f", 3)
        words = changes.lstrip("\n").split("\0")
        paths = dict(zip(words[1::2], words[::2], strict=False))  # each change: its hashes, then its path
        first = found.get(parents.split()[0]) if parents else None
        pipeline = dict(first.pipeline) if first else {}
        for path, change in paths.items():
            if PurePosixPath(path).name in PIPELINE:
                pipeline.pop(path, None)
                blob = change.split()[3]
                if blob.strip("0"):
                    pipeline[path] = blob
        same = first is not None and first.pipeline == frozenset(pipeline.items())
        found[rev] = Commit(
            rev,
            int(seconds) * 1000,
            one_line(author),
            first.pipeline if first and same else frozenset(pipeline.items()),
            frozenset(paths),
        )
    return found


def _git(project: Project, *arguments: str, stdin: Iterable[str] = (), accept: int = 0) -> str:
    """The output of git with these lines on standard input. Raises UserError if it fails."""
    lines = "".join(f"{line}\n" for line in stdin).encode()
    try:
        return os.fsdecode(project.ask_git(*arguments, stdin=lines, accept=accept))
    except OSError:
        raise UserError("expected git, found none; install it, or activate the environment") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"git cannot read the history: {one_line(os.fsdecode(error.stderr).strip())}") from None


def _resolve(project: Project, rev: str) -> str:
    try:
        return resolve_rev(project.repo.scm, rev)
    except (DvcException, SCMError):
        raise UserError(f"expected a git revision or a DVC experiment, found {one_line(rev)}") from None


def _remotes(project: Project) -> tuple[Any, ...]:
    """The workspace's default remote, for objects of DVC 3 and of older versions."""
    try:
        return tuple(project.repo.cloud.get_remote_odb(None, "fetch", kind) for kind in ("md5", "md5-dos2unix"))
    except DvcException as error:
        raise UserError(f"expected a DVC remote for --fetch, found none that can be used: {one_line(error)}") from None


def _present(project: Project, revs: Iterable[str]) -> list[str]:
    """The commits among these that the clone has."""
    found = _git(project, "cat-file", "--batch-check=%(objectname) %(objecttype)", stdin=revs)
    return [line.split()[0] for line in found.splitlines() if line.endswith(" commit")]


def _reason(error: BaseException, fetch: bool) -> str:
    if isinstance(error, MissingBytes):
        rest = ", nor in the remote" if fetch else "; --fetch asks the remote"
        return f"{error} as recorded is neither in git nor in DVC's cache{rest}"
    return describe(error)


def _named(commits: list[Commit]) -> str:
    """The first three commits, and how many more there are."""
    shown = ", ".join(commit.short for commit in commits[:3])
    return shown if len(commits) <= 3 else f"{shown} and {len(commits) - 3} more"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
