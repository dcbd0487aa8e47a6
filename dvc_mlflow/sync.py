"""Make MLflow agree with DVC: record each execution whose run is missing."""

from collections.abc import Iterator

from dvc.repo.experiments.utils import exp_refs
from dvc.scm import NoSCM

from dvc_mlflow.execution import Execution, MissingBytes
from dvc_mlflow.project import Owners, Project, Unprovable
from dvc_mlflow.store import Store, describe
from dvc_mlflow.text import UserError, one_line


def sync(store: Store, brief: bool = False) -> Iterator[tuple[str, bool]]:
    """Record the workspace and the experiments of this commit; yield lines, and whether each is a failure.

    If `brief`, executions that were recorded before have no lines.
    """
    yield from record_all(store, store.project, None, "", brief)
    found = list(experiments(store.project))
    head = store.project.repo.scm.get_rev() if found else ""
    own = [(name, rev) for name, rev, baseline in found if baseline == head]
    if not own:
        return
    owners = Owners(store.project, own[0][0], head)
    for name, rev in own:
        owners.experiment = name
        try:
            with store.project.repo.switch(rev):
                there = store.project.at_this_revision()
                with store.looking_at(there):
                    yield from record_all(store, there, owners, f"{name}: ", brief)
        except UserError as error:
            yield f"{name}: not recorded: {error}", True


def close_left(store: Store, close_stale: float | None) -> Iterator[tuple[str, bool]]:
    """Close this host's runs whose processes are gone, and other hosts' runs that are `close_stale` hours old."""
    for run in store.dead():
        store.close(run)
        yield f"closed run {run.info.run_id}, whose process is gone", False
    for run in store.stale(close_stale) if close_stale is not None else ():
        store.close(run)
        yield f"closed run {run.info.run_id} of {run.data.tags['process.host']}", False


def record_all(
    store: Store, project: Project, owners: Owners | None, label: str, brief: bool
) -> Iterator[tuple[str, bool]]:
    """Record the executions in a project's lock files, in order."""
    for address, found, experiment in own_executions(project, owners):
        if found is None:
            yield f"{address}: not run yet", False
            continue
        try:
            if isinstance(found, Unprovable):
                raise found
            run, made = store.record(found, experiment)
        except (Unprovable, MissingBytes) as error:
            alone = project.locked_alone(address)
            if alone and store.find_alone(alone):
                if not brief:
                    yield f"{label}{address}: recorded before", False
            else:
                yield f"{label}{address}: not recorded: {describe(error)}", True
            continue
        for problem in store.problems:
            yield f"{label}{address}: {problem}", False
        if made or (owners is None and not brief):
            yield f"{label}{address}: recorded {f'as run {run.info.run_id}' if made else 'before'}", False


def own_executions(
    project: Project, owners: Owners | None
) -> Iterator[tuple[str, Execution | Unprovable | None, str | None]]:
    """The stages in order, each with its execution in dvc.lock and the experiment that owns it; not the baseline's.

    Without `owners`, they include stages that dvc.lock lacks.
    """
    found: dict[str, Execution | Unprovable | None] = {}
    for address in project.stages:
        try:
            found[address] = project.locked(address)
        except Unprovable as error:
            found[address] = error
    everything = not any(owners and owners.of(one) for one in found.values() if isinstance(one, Execution))
    for address, execution in found.items():
        if owners is None:
            yield address, execution, None
        elif isinstance(execution, Unprovable) or (execution and (everything or owners.of(execution))):
            yield address, execution, owners.experiment


def experiments(project: Project) -> Iterator[tuple[str, str, str]]:
    """All experiments: name, revision and baseline of each; none without git."""
    scm = project.repo.scm
    for ref in () if isinstance(scm, NoSCM) else exp_refs(scm):
        if ref.name:
            yield one_line(ref.name, 200), scm.get_ref(str(ref)), ref.baseline_sha
