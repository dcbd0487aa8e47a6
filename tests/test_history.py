"""`dvc-mlflow sync --all`: each execution of all commits and experiments has one row, with the date of the first."""

import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run
from support.commands import environment, execute

from benchmarks.history import FIRST_DAY, make_history

COMMITS, EXPERIMENTS = 6, 2
DAY = 86_400


class Repository:
    """A DVC project with a history, of benchmarks/history.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str, code: int | None = 0) -> str:
        """Run a command; return what it printed. `code` is its expected exit code, None if any will do."""
        ended = execute(command, self.folder, environment())
        output = ended.stdout + ended.stderr
        assert "Traceback" not in output and "defect" not in output, output
        assert code is None or ended.returncode == code, f"{command}: {ended.returncode}\n{output}"
        return output

    def sync(self, *options: str, code: int | None = 0) -> str:
        return self.run("dvc-mlflow", "sync", *(options or ["--all"]), code=code)

    def write(self, path: str, text: str) -> None:
        (self.folder / path).write_text(text)

    def commit(self, message: str = "Change") -> str:
        """Commit all; return the hash."""
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)
        return self.run("git", "rev-parse", "HEAD").strip()

    def forget_experiments(self) -> None:
        for ref in self.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").split():
            self.run("git", "update-ref", "-d", ref)

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    def runs(self) -> list[Run]:
        if not (self.folder / "mlflow.db").exists():  # MLflow would make one
            return []
        experiments = [one.experiment_id for one in self.client.search_experiments() if one.name != "Default"]
        return list(self.client.search_runs(experiments)) if experiments else []

    def stages(self) -> Counter[str]:
        """The number of finished runs of each stage; there must be no others, and no duplicates."""
        runs = self.runs()
        assert {run.info.status for run in runs} <= {"FINISHED"}
        executions = [(run.data.tags["dvc.execution"], run.data.tags.get("dvc.exp_name")) for run in runs]
        assert len({*executions}) == len(executions)
        return Counter(run.data.tags["stage"] for run in runs)

    def copy(self, folder: Path) -> "Repository":
        shutil.copytree(self.folder, folder / "project", symlinks=True)
        return Repository(folder / "project")


def of_each(number: int) -> Counter[str]:
    return Counter(dict.fromkeys(("prepare", "train", "evaluate"), number))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The repository, with nothing recorded. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("made") / "project"
    make_history(folder, COMMITS, EXPERIMENTS)
    return Repository(folder)


@pytest.fixture(scope="module")
def synced(made: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The repository after `dvc-mlflow sync --all`. Read-only."""
    repository = made.copy(tmp_path_factory.mktemp("synced"))
    line = f"{COMMITS} commits and {EXPERIMENTS} experiments: {3 * (COMMITS + EXPERIMENTS)} executions recorded"
    assert line in repository.sync()
    return repository


@pytest.fixture
def repository(made: Repository, tmp_path: Path) -> Repository:
    """A copy of the repository, free to change."""
    return made.copy(tmp_path)


def test_the_generated_history_equals_what_dvc_would_have_made(made: Repository) -> None:
    assert "up to date" in made.run("dvc", "status")
    assert "didn't change" in made.run("dvc", "repro", "--dry")
    names = made.run("dvc", "exp", "list", "--name-only").split()
    assert {*names} == {f"exp-{COMMITS + 1}", f"exp-{COMMITS + 2}"}


def test_each_execution_of_each_commit_has_one_row(synced: Repository) -> None:
    assert synced.stages() == of_each(COMMITS + EXPERIMENTS)
    rates = sorted(int(run.data.params["train.rate"]) for run in synced.runs() if run.data.tags["stage"] == "train")
    assert rates == [*range(1, COMMITS + EXPERIMENTS + 1)]


def test_a_row_has_the_time_author_and_hash_of_its_commit(synced: Repository) -> None:
    lines = synced.run("git", "log", "--reverse", "--format=%H %an <%ae>").splitlines()
    for run in synced.runs():
        number = int(run.data.params["prepare.rows"])
        assert run.info.start_time == run.info.end_time == 1000 * (FIRST_DAY + DAY * number)
        assert run.data.tags["git.author"] == f"Ada {number % 3} <ada@example.org>"
        assert run.data.tags["mlflow.source.git.commit"] == run.data.tags["commit"]
        if number <= COMMITS:
            assert f"{run.data.tags['commit']} {run.data.tags['git.author']}" == lines[number - 1]


def test_a_row_has_the_params_metrics_curves_and_parent_of_its_commit(synced: Repository) -> None:
    trained = {run.info.run_id: run for run in synced.runs() if run.data.tags["stage"] == "train"}
    for run in trained.values():
        number = int(run.data.params["train.rate"])
        history = synced.client.get_metric_history(run.info.run_id, "loss")
        assert sorted((point.step, point.value) for point in history) == [(1, 0.5), (2, 0.25), (3, 0.125)]
        assert run.data.metrics["loss.final"] == number and run.data.metrics["accuracy"] == float(f"0.{number}")
    for run in synced.runs():
        if run.data.tags["stage"] == "evaluate":
            parent = trained[run.data.tags["mlflow.parentRunId"]]
            assert parent.data.params == run.data.params
            assert parent.data.metrics["accuracy"] == run.data.metrics["accuracy"]


def test_what_an_experiment_made_has_its_name_and_baseline(synced: Repository) -> None:
    head = synced.run("git", "rev-parse", "HEAD").strip()
    for run in synced.runs():
        number = int(run.data.params["prepare.rows"])
        assert run.data.tags.get("dvc.exp_name") == (f"exp-{number}" if number > COMMITS else None)
        assert run.data.tags.get("dvc.exp_baseline_rev") == (head if number > COMMITS else None)


def test_audit_agrees_and_a_second_time_changes_nothing(synced: Repository) -> None:
    before = {run.info.run_id: run.to_dictionary() for run in synced.runs()}
    assert f"0 executions recorded, {len(before)} before" in synced.sync()
    assert {run.info.run_id: run.to_dictionary() for run in synced.runs()} == before
    assert "agree" in synced.run("dvc-mlflow", "audit", "--all")


def test_chosen_revisions_are_dated_to_the_first_commit_that_has_them(repository: Repository) -> None:
    third = repository.run("git", "rev-parse", "HEAD~3").strip()
    repository.run("git", "checkout", "-q", "-b", "later", third)
    repository.write("README", "Nothing of the pipeline")
    repository.commit()
    repository.run("git", "checkout", "-q", "main")
    repository.sync("--rev", "later")
    assert repository.stages() == of_each(1)
    assert {run.data.tags["commit"] for run in repository.runs()} == {third}
    repository.sync("--rev", f"exp-{COMMITS + 1}")  # with its baseline, HEAD
    assert repository.stages() == of_each(3)
    expected = "error: expected a git revision or a DVC experiment, found nowhere"
    assert expected in repository.sync("--rev", "nowhere", code=1)


def test_branches_tags_remote_branches_merges_and_a_detached_head_are_seen(repository: Repository) -> None:
    # Commits 2, 3, 4 and 5 belong to a tag, a remote branch, a merged branch and a detached HEAD.
    revs = [repository.run("git", "rev-parse", f"HEAD~{back}").strip() for back in (4, 3, 2, 1)]
    tag, remote, merged, head = revs
    repository.run("git", "tag", "-m", "annotated", "v1", tag)
    repository.run("git", "update-ref", "refs/remotes/origin/old", remote)
    repository.run("git", "checkout", "-q", "--detach", tag)
    repository.run("git", "merge", "-q", "--no-ff", "-s", "ours", "-m", "Merge", merged)
    repository.run("git", "tag", "merge")
    repository.run("git", "checkout", "-q", "--detach", head)
    repository.run("git", "branch", "-q", "-D", "main")
    repository.forget_experiments()
    repository.run("dvc", "checkout", "-q", "--force")
    assert f"{COMMITS} commits and 0 experiments: {3 * (COMMITS - 1)} executions recorded" in repository.sync()


def test_an_experiment_that_is_committed_later_has_no_second_row(repository: Repository) -> None:
    repository.run("dvc", "exp", "apply", f"exp-{COMMITS + 1}")
    repository.commit("Take the experiment")
    repository.sync()
    assert repository.stages() == of_each(COMMITS + EXPERIMENTS)
    repository.run("dvc-mlflow", "audit")


def test_commits_with_damaged_files_are_named_and_the_others_recorded(repository: Repository) -> None:
    text = {name: (repository.folder / name).read_text() for name in ("dvc.yaml", "dvc.lock")}
    repository.write("dvc.yaml", "stages: [")
    damaged = [repository.commit()]
    repository.write("dvc.yaml", text["dvc.yaml"])
    repository.write("dvc.lock", "<<<<<<< HEAD\n" + text["dvc.lock"])
    damaged.append(repository.commit())
    repository.write("dvc.lock", text["dvc.lock"])
    repository.commit()
    output = repository.sync(code=1)
    assert f"{damaged[0][:7]}: not recorded: DVC cannot read the pipeline: unable to read: 'dvc.yaml'" in output
    assert f"{damaged[1][:7]}: not recorded: DVC cannot read the pipeline: unable to read: 'dvc.lock'" in output
    assert "2 revisions not read" in output
    assert repository.stages() == of_each(COMMITS + EXPERIMENTS)


def test_a_shallow_clone_is_recorded_with_a_note(repository: Repository, tmp_path: Path) -> None:
    shallow = Repository(tmp_path / "shallow")
    repository.run("git", "clone", "-q", "--depth", "2", f"file://{repository.folder}", str(shallow.folder))
    shallow.run("dvc", "cache", "dir", "--local", str(repository.folder / ".dvc/cache"))
    shallow.run("dvc", "checkout", "-q")
    output = shallow.sync()
    assert "this clone is shallow: older commits are missing; `git fetch --unshallow` fetches them" in output
    assert shallow.stages() == of_each(2)
    shallow.run("git", "fetch", "-q", "--unshallow")
    assert "shallow" not in shallow.sync()
    assert shallow.stages() == of_each(COMMITS)


def test_bytes_come_from_git_and_the_remote_if_the_cache_is_empty(repository: Repository, tmp_path: Path) -> None:
    repository.run("dvc", "remote", "add", "-q", "--default", "there", str(tmp_path / "remote"))
    shutil.copytree(repository.folder / ".dvc/cache", tmp_path / "remote")
    shutil.rmtree(repository.folder / ".dvc/cache")
    for name in ("data.csv", "model.bin", "history.csv"):
        (repository.folder / name).unlink()
    output = repository.sync(code=1)
    number = COMMITS + EXPERIMENTS
    reason = "history.csv as recorded is neither in git nor in DVC's cache; --fetch asks the remote"
    assert f"train: not recorded: {reason}" in output and f"and {number - 3} more)" in output
    assert f"{number} executions recorded, 0 before, {2 * number} cannot be" in output
    assert repository.stages() == {"prepare": number}
    repository.sync("--all", "--fetch", code=None)  # the workspace differs from dvc.lock
    assert repository.stages() == of_each(number)
    assert not any((repository.folder / name).exists() for name in ("data.csv", "model.bin", "history.csv"))
    assert [*(repository.folder / ".dvc/cache").rglob("*")]
    evaluated = [run for run in repository.runs() if run.data.tags["stage"] == "evaluate"]
    assert all("accuracy" in run.data.metrics for run in evaluated)


def test_fetching_without_a_remote_is_refused_in_one_line(repository: Repository) -> None:
    assert "error: expected a DVC remote for --fetch, found none that can be used: " in repository.sync(
        "--all", "--fetch", code=1
    )
    assert repository.runs() == []


def test_a_metrics_file_that_was_committed_later_is_found_there(repository: Repository) -> None:
    repository.run("dvc", "exp", "apply", f"exp-{COMMITS + 1}")
    metrics = (repository.folder / "evaluate.json").read_text()
    repository.run("git", "checkout", "-q", "HEAD", "evaluate.json")
    repository.commit("The metrics are forgotten")
    repository.write("evaluate.json", metrics)
    later = repository.commit("Here they are")
    repository.run("git", "checkout", "-q", "--detach", "HEAD~3")  # the workspace does not have them
    repository.forget_experiments()
    repository.sync("--all", code=None)
    assert repository.stages() == of_each(COMMITS + 1)
    assert [run.data.tags["stage"] for run in repository.runs() if run.data.tags["commit"] == later] == ["evaluate"]


def test_a_commit_with_other_code_than_ran_is_not_named_as_the_source(repository: Repository) -> None:
    repository.run("git", "checkout", "-q", "-b", "other", "HEAD~1")
    repository.run("dvc", "checkout", "-q", "--force")
    repository.write("params.yaml", "prepare:\n  rows: 77\ntrain:\n  rate: 77\n")
    repository.run("dvc", "repro", "-q")
    repository.write("train.sh", "# changed since\n" + (repository.folder / "train.sh").read_text())
    changed = repository.commit()
    repository.sync("--all", code=None)
    sources = {
        run.data.tags["stage"]: run.data.tags.get("mlflow.source.git.commit")
        for run in repository.runs()
        if run.data.tags["commit"] == changed
    }
    assert sources == {"prepare": changed, "train": None, "evaluate": None}


def test_each_commit_must_prove_what_came_before(repository: Repository) -> None:
    repository.run("git", "checkout", "-q", "-b", "other")
    repository.write("params.yaml", "prepare:\n  rows: 77\ntrain:\n  rate: 77\n")
    repository.run("dvc", "repro", "-q", "train")
    repository.commit("Evaluated later")
    repository.sync()
    # The lock still has the evaluation of the former model, which was recorded with that model.
    assert Counter(run.data.tags["stage"] for run in repository.runs()) == of_each(COMMITS + EXPERIMENTS) + Counter(
        ("prepare", "train")
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_sync_continues(repository: Repository, number: signal.Signals) -> None:
    process = subprocess.Popen(
        ["dvc-mlflow", "sync", "--all"],
        cwd=repository.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while len(repository.runs()) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate()[1]
    assert b"Traceback" not in error and (number == signal.SIGKILL or b"stopped; the next call" in error)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
    repository.sync()
    assert repository.stages() == of_each(COMMITS + EXPERIMENTS)
    repository.run("dvc-mlflow", "audit", "--all")


def test_two_syncs_at_once_make_one_row_of_each_execution(repository: Repository) -> None:
    both = [
        subprocess.Popen(
            ["dvc-mlflow", "sync", "--all"],
            cwd=repository.folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    assert [(process.communicate()[1], process.returncode) for process in both] == [(b"", 0), (b"", 0)]
    assert repository.stages() == of_each(COMMITS + EXPERIMENTS)


def test_a_project_in_a_submodule_has_its_own_history(repository: Repository, tmp_path: Path) -> None:
    outer = Repository(tmp_path / "outer")
    outer.folder.mkdir()
    outer.run("git", "init", "-q")
    add = ("git", "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(repository.folder), "inner")
    outer.run(*add)
    outer.commit()
    inner = Repository(outer.folder / "inner")
    inner.run("dvc", "cache", "dir", "--local", str(repository.folder / ".dvc/cache"))
    inner.run("dvc", "checkout", "-q")
    inner.sync()
    assert inner.stages() == of_each(COMMITS)


def test_a_project_in_a_subfolder_that_came_later_is_recorded(tmp_path: Path) -> None:
    outer = Repository(tmp_path / "outer")
    outer.folder.mkdir()
    outer.run("git", "init", "-q")
    outer.write("README", "No pipeline yet")
    outer.commit()
    inner = Repository(outer.folder / "project")
    inner.folder.mkdir()
    inner.run("dvc", "init", "-q", "--subdir")
    inner.write("params.yaml", "n: 1\n")
    inner.write("dvc.yaml", "stages:\n  one:\n    cmd: cat params.yaml > out\n    params: [n]\n    outs: [out]\n")
    inner.run("dvc", "repro", "-q")
    inner.commit()
    inner.write("params.yaml", "n: 2\n")
    inner.run("dvc", "repro", "-q")
    inner.commit()
    inner.write(".gitignore", "/out\n/mlflow.db*\n/mlartifacts\n")
    inner.commit()
    said = inner.sync()
    assert "4 commits and 0 experiments: 2 executions recorded" in said
    assert "recorded before" not in said
    assert sorted(run.data.params["n"] for run in inner.runs()) == ["1", "2"]


def test_a_folder_without_git_or_commits_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = Repository(tmp_path)
    folder.run("dvc", "init", "-q", "--no-scm")
    assert "error: expected a git repository, found none" in folder.sync(code=1)
    empty = Repository(tmp_path / "empty")
    empty.folder.mkdir()
    empty.run("git", "init", "-q")
    empty.run("dvc", "init", "-q")
    assert "0 commits and 0 experiments: 0 executions recorded" in empty.sync()


def test_a_long_history_is_quick(tmp_path: Path, stress: bool, record_property: Callable[[str, object], None]) -> None:
    commits = 200 if stress else 10
    repository = Repository(tmp_path / "project")
    make_history(repository.folder, commits)
    began = time.monotonic()
    repository.sync()
    seconds = time.monotonic() - began
    assert repository.stages() == of_each(commits)
    assert not stress or seconds < 60  # the long form is for a machine that runs nothing else
    record_property("seconds for a long history", round(seconds))
