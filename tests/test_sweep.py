"""A sweep is a row of real experiments, chosen by Optuna, that goes on where it was."""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.repo import Repo, lock_repo
from support.commands import environment
from support.project import ROOT, Project, copy
from support.store import Store

from commands.sweep import Sweep, read_space, running, values_of
from commands.trials import Baseline, reason_of

METRIC = ("--metric", "score.json:accuracy")  # of the small project
LR = (*METRIC, "-S", "lr=interval(0,1)")
BATCHES = ("-S", "train.batch_size=choice(16,32)", "-S", "train.epochs=1", "--sampler", "grid")  # of the project


def experiments(project: Project) -> list[str]:
    return sorted(project.dvc("exp", "list", "--name-only").stdout.split())


@pytest.fixture(scope="module")
def swept(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the sweep `grid` of two batch sizes, two at a time, whose result is in result.json."""
    project = copy(finished_project, tmp_path_factory.mktemp("swept"))
    before = project.run("git", "status", "--porcelain").stdout
    result = project.command("sweep", *BATCHES, "--name", "grid", "--jobs", "2", "--json")
    assert project.run("git", "status", "--porcelain").stdout == before, "the workspace must stay as it is"
    (project.folder / "result.json").write_text(result.stdout)
    return project


def test_each_trial_is_an_experiment_with_its_params(swept: Project) -> None:
    result = json.loads((swept.folder / "result.json").read_text())
    assert experiments(swept) == ["grid-0", "grid-1"] == [row["experiment"] for row in result["trials"]]
    shown = json.loads(swept.dvc("params", "diff", "--json", "--all", "grid-0", "grid-1").stdout)["params.yaml"]
    assert (shown["train.batch_size"]["old"], shown["train.batch_size"]["new"]) == (16, 32)
    assert shown["train.epochs"]["new"] == 1


def test_the_value_is_the_metric_of_the_experiment(swept: Project) -> None:
    result = json.loads((swept.folder / "result.json").read_text())
    shown = json.loads(swept.dvc("metrics", "diff", "--json", "--all", "grid-0", "grid-1").stdout)["metrics/train.json"]
    written = shown["validation_accuracy"]
    assert [row["value"] for row in result["trials"]] == [written["old"], written["new"]]
    assert result["best"] == max(result["trials"], key=lambda row: row["value"])["experiment"]


def test_each_trial_has_its_rows_in_mlflow_with_sweep_and_number(swept: Project) -> None:
    store = Store(swept)
    for number in ("0", "1"):
        for stage in ("train", "evaluate"):
            (run,) = [run for run in store.runs(stage) if run.data.tags.get("sweep.trial") == number]
            assert run.info.status == "FINISHED"
            assert (run.data.tags["sweep"], run.data.tags["dvc.exp_name"]) == ("grid", f"grid-{number}")
    assert "sweep" not in store.run("fetch").data.tags, "it belongs to no trial"


def test_the_same_params_by_hand_give_the_same_bits(swept: Project, tmp_path: Path) -> None:
    by_hand = copy(swept, tmp_path)
    by_hand.set("train.batch_size", 32)
    by_hand.set("train.epochs", 1)
    by_hand.repro("--force")
    assert (
        by_hand.run("git", "show", f"{ref(swept, 'grid-1')}:dvc.lock").stdout
        == (by_hand.folder / "dvc.lock").read_text()
    )


def test_a_sweep_that_is_done_runs_nothing_and_prints_the_result_again(swept: Project) -> None:
    before = {name: ref(swept, name) for name in experiments(swept)}
    again = swept.command("sweep", *BATCHES, "--name", "grid", "--json")
    assert json.loads(again.stdout) == json.loads((swept.folder / "result.json").read_text())
    assert {name: ref(swept, name) for name in experiments(swept)} == before
    assert "dvc exp apply grid-" in swept.command("sweep", *BATCHES, "--name", "grid", "--md").stdout


def test_the_result_is_a_run_in_mlflow_with_table_and_figures(swept: Project) -> None:
    store, result = Store(swept), json.loads((swept.folder / "result.json").read_text())
    (run,) = store.client.search_runs([store.experiment_id], "tags.`sweep.result` LIKE 'grid %'")
    assert run.info.status == "FINISHED"
    assert run.data.tags["sweep.best"] == result["best"]
    assert run.data.metrics["validation_accuracy"] == max(row["value"] for row in result["trials"])
    names = {file.path for file in store.client.list_artifacts(run.info.run_id)}
    assert names == {"history.png", "parallel.png", "result.json", "result.md"}
    for figure in result["figures"]:
        assert (swept.folder / figure).read_bytes().startswith(b"\x89PNG")


def test_the_best_trial_is_applied_by_the_command_it_prints(swept: Project, tmp_path: Path) -> None:
    project = copy(swept, tmp_path)
    shown = project.command("sweep", *BATCHES, "--name", "grid").stdout
    *_, command, best = shown.split()
    assert (command, best) == ("apply", json.loads((swept.folder / "result.json").read_text())["best"])
    project.dvc("exp", "apply", best)
    assert project.repro() == []
    assert "agree" in project.command("audit").stdout


def test_a_budget_promotes_the_best_third(small: Project) -> None:
    command = (*METRIC, "-S", "lr=0.1,0.9,0.2", "--sampler", "grid", "--budget", "size=1,2", "--name", "half", "--json")
    result = json.loads(small.command("sweep", *command).stdout)
    assert experiments(small) == ["half-0-1", "half-1-1", "half-1-2", "half-2-1"]
    assert result["best"] == "half-1-2"
    assert [run.data.tags["sweep.budget"] for run in Store(small).runs("score") if "sweep" in run.data.tags] == [
        "size=2",
        *["size=1"] * 3,
    ]
    assert json.loads(small.command("sweep", *command).stdout) == result


def ref(project: Project, name: str) -> str:
    rev = project.run("git", "rev-parse", "HEAD").stdout.strip()
    return project.run("git", "rev-parse", f"refs/exps/{rev[:2]}/{rev[2:]}/{name}").stdout.strip()


def start(project: Project, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "commands.sweep", *arguments],
        cwd=project.folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def trial_runs(project: Project) -> bool:
    return any((project.folder / ".dvc/tmp/exps/standalone").glob("*/started"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_was_stopped_continues_and_runs_no_trial_twice(number: signal.Signals, small: Project) -> None:
    command = ("--trials", "2", *LR, "-S", "seconds=2", "--name", "cut")
    process = start(small, *command)
    wait_for(process, (small.folder / ".dvc/tmp/trials/cut-1.lock").exists)
    wait_for(process, lambda: trial_runs(small))
    process.send_signal(number)
    process.communicate()
    first = ref(small, "cut-0")
    result = json.loads(small.command("sweep", *command, "--json").stdout)
    assert experiments(small) == ["cut-0", "cut-1"]
    assert ref(small, "cut-0") == first
    assert [row["state"] for row in result["trials"]] == ["complete"] * 2
    runs = [run for run in Store(small).runs("score") if "sweep" in run.data.tags]
    assert sorted(run.data.tags["sweep.trial"] for run in runs if run.info.status == "FINISHED") == ["0", "1"]
    assert "RUNNING" not in {run.info.status for run in runs}


def test_a_failed_trial_is_listed_with_its_reason_and_the_others_run(small: Project) -> None:
    sizes = "size=-1,0,1"  # an error; no such metric; one that works
    command = (*METRIC, "-S", sizes, "--sampler", "grid", "--name", "some", "--json")
    result = json.loads(small.command("sweep", *command).stdout)
    assert [(row["experiment"], row["state"]) for row in result["trials"]] == [
        ("some-0", "failed"),
        ("some-1", "failed"),
        ("some-2", "complete"),
    ]
    assert result["trials"][0]["reason"] == "expected a size of at least 0"
    assert result["trials"][1]["reason"].startswith("expected a number accuracy in score.json, found loss")
    assert result["best"] == "some-2"
    assert json.loads(small.command("sweep", *command).stdout) == result
    assert experiments(small) == ["some-1", "some-2"]


def test_a_trial_that_was_killed_says_so() -> None:
    said = ["Reproducing experiment 'some-0'", "Running stage 'train':", "> dvc-mlflow run …"]
    killed = "failed to reproduce 'train': failed to run: …, exited with -9"
    assert reason_of([*said, f"ERROR: {killed}"]) == killed
    assert reason_of([*said, "error: expected more", "ERROR: failed to reproduce 'train'"]) == "expected more"
    assert reason_of(said) == "it was killed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_while_dvc_prepares_a_trial_leaves_the_workspace_as_it_was(
    number: signal.Signals, small: Project
) -> None:
    small.set("size", 2)
    before = small.run("git", "diff", "HEAD").stdout
    process = start(small, "--trials", "1", *LR, "--name", "early")
    head = small.folder / ".git/HEAD"
    wait_for(process, lambda: not head.read_text().startswith("ref: "))  # DVC detaches it
    process.send_signal(number)
    process.communicate()
    assert head.read_text() == "ref: refs/heads/main\n"
    assert small.run("git", "diff", "HEAD").stdout == before
    assert json.loads(small.command("sweep", "--trials", "1", *LR, "--name", "early", "--json").stdout)["best"]


def test_a_sweep_waits_for_other_commands_of_dvc_and_refuses_changes_made_meanwhile(small: Project) -> None:
    command = ("--trials", "2", *LR, "-S", "seconds=2", "--name", "busy")
    with Repo(str(small.folder)) as repo, lock_repo(repo):
        process = start(small, *command)
        time.sleep(8)  # DVC by itself gives up after 3 s
    wait_for(process, lambda: trial_runs(small))
    small.set("size", 2)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: expected the tracked files as they were when ")
    assert "params.yaml" in errors
    small.run("git", "checkout", "-q", "params.yaml")
    result = json.loads(small.command("sweep", *command, "--json").stdout)
    assert [row["state"] for row in result["trials"]] == ["complete"] * 2


def test_the_params_of_a_trial_depend_on_the_name_the_number_and_the_trials_before(tmp_path: Path) -> None:
    import optuna

    space = read_space(["lr=interval(0,1)", "size=choice(1,2,3)"])

    def chosen(name: str, sampler: str) -> list[dict[str, object]]:
        sweep = Sweep(argparse.Namespace(name=name, sampler=sampler), space, [], Baseline(tmp_path, "", b""), tmp_path)
        study, found = optuna.create_study(), []
        for number in range(4):
            found.append(sweep.choose(study, number))
            study.add_trial(running(found[-1], space))
            study.tell(number, float(number))
        return found

    for sampler in ("tpe", "random"):
        assert chosen("one", sampler) == chosen("one", sampler) != chosen("two", sampler)


BAD = {
    "--trials 2 -S train.lrr=interval(0,1)": "found train.lrr",
    "--trials 2 -S train.lr=interval(1,0)": "low <= high",
    "--trials 2 -S train.lr=choice(": "choice(",
    "--trials 2 -S train.lr=tag(log,interval(0,1))": "low > 0",
    "--trials 2 -S train.lr=glob(*)": "pattern of files",
    "--trials 2 -S train.lr=0.1": "expected a param that varies",
    "--trials 2 -S train.lr": "train.lr",
    "--trials 2 -S no.yaml:lr=interval(0,1)": "no.yaml",
    "-S train.lr=interval(0,1)": "--trials",
    "--trials 0 -S train.lr=interval(0,1)": "--trials",
    "--trials 2 --jobs 0 -S train.lr=interval(0,1)": "--jobs",
    "--trials 2 -S train.lr=interval(0,1) --sampler grid": "an interval",
    "--trials 2 -S train.lr=interval(0,1) --name a/b": "--name",
    "--trials 2 -S train.lr=interval(0,1) --metric metrics/train.json:nothing --maximize": "validation_accuracy",
    "--trials 2 -S train.lr=interval(0,1) --metric metrics/train.json:nothing": "--maximize or --minimize",
    "--trials 2 -S train.lr=interval(0,1) --metric no.json:accuracy": "metrics/train.json",
    "--trials 2 -S train.lr=interval(0,1) --budget 5,1": "two rising numbers",
    "--trials 2 -S train.lr=interval(0,1) --budget lr=1,5": "found lr",
    "--trials 2 -S train.epochs=range(1,5) --budget 1,5": "train.epochs",
    "--trials 2 -S train.lr=interval(0,1) --name grid": "name another sweep",
}


def test_bad_input_gets_one_line_and_changes_nothing(swept: Project) -> None:
    before = {name: ref(swept, name) for name in experiments(swept)}
    ends = swept.commands(*(f"sweep {line}" for line in BAD))
    for line, reason in BAD.items():
        end = ends[f"sweep {line}"]
        assert end.returncode == 1, line
        assert end.stderr.startswith("error: expected "), line
        assert reason in end.stderr, line
    assert {name: ref(swept, name) for name in experiments(swept)} == before


def test_experiments_of_that_name_are_not_taken_for_trials(swept: Project, tmp_path: Path) -> None:
    project = copy(swept, tmp_path)
    shutil.rmtree(project.folder / ".dvc/tmp/sweeps")
    failed = project.command("sweep", *BATCHES, "--name", "grid", check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: expected no experiment grid-0")


def test_a_sweep_does_not_go_on_from_another_commit(swept: Project, tmp_path: Path) -> None:
    project = copy(swept, tmp_path)
    project.run("git", "commit", "-q", "--allow-empty", "-m", "Another")
    failed = project.command("sweep", *BATCHES, "--name", "grid", check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: expected sweep grid to go on with commit ")


def test_choosing_by_the_test_set_prints_a_note(swept: Project) -> None:
    assert "validation_accuracy" in json.loads((swept.folder / "result.json").read_text())["metric"]
    metric = ("--metric", "metrics/evaluate.json:test_accuracy")
    found = swept.command("sweep", *metric, *BATCHES, "--name", "tested", "--trials", "1", "--json")
    assert "note: test_accuracy chooses the best trial" in found.stderr


def test_a_space_is_read_as_hydra_means_it() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space = read_space(
        [
            "a=interval(0,1)",
            "b=int(interval(1,8))",
            "c=tag(log,interval(1e-3,1))",
            "d=choice(x,2)",
            "e=range(0,5,2)",
            "f=1",
        ]
    )
    assert space == {
        "a": FloatDistribution(0, 1),
        "b": IntDistribution(1, 8),
        "c": FloatDistribution(1e-3, 1, log=True),
        "d": CategoricalDistribution(["x", "2"]),
        "e": IntDistribution(0, 4, step=2),
    }
    assert values_of("e", space["e"]) == [0, 2, 4]


@pytest.mark.parametrize("package", ["stages", "dvc_mlflow"])
def test_neither_the_science_nor_the_bridge_imports_optuna_or_ray(package: str) -> None:
    for module in (ROOT / package).glob("*.py"):
        assert not re.search(r"^\s*(import|from) (optuna|ray)\b", module.read_text(), re.MULTILINE), module
