"""Replicates are real experiments; the summary covers those that learned."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.project import Project, copy

from commands.replicate import summarize


def test_a_summary_leaves_out_what_did_not_learn_and_counts_it() -> None:
    summary = summarize({0: 0.8, 1: 0.1, 2: 0.9}, 0.1)
    assert (summary["seeds"], summary["failed_to_learn"]) == (3, 1)
    assert (summary["min"], summary["max"]) == (0.8, 0.9)
    assert summary["mean"] == pytest.approx(0.85)
    assert summary["standard_deviation"] == pytest.approx(0.05 * 2**0.5)
    assert summarize({0: 0.1}, 0.1)["mean"] is None


def test_each_seed_is_an_experiment_that_runs_once_and_leaves_the_workspace_alone(project: Project) -> None:
    before = project.run("git", "status", "--porcelain").stdout
    command = ["replicate", "--seeds", "2", "--name", "pair", "-S", "train.epochs=1", "--json"]
    summary = json.loads(project.command(*command).stdout)
    assert project.run("git", "status", "--porcelain").stdout == before
    listed = project.dvc("exp", "list", "--name-only").stdout.split()
    assert sorted(listed) == [f"{summary['name']}-0", f"{summary['name']}-1"]
    assert re.fullmatch("pair-[0-9a-f]{8}", summary["name"]), "results of other params must not be reused"
    for seed in (0, 1):
        shown = json.loads(
            project.dvc("metrics", "diff", "--json", "--all", "HEAD", f"{summary['name']}-{seed}").stdout
        )
        accuracy = shown["metrics/evaluate.json"]["test_accuracy"]
        assert summary["test_accuracy"][str(seed)] == accuracy.get("new", accuracy.get("old"))
    assert json.loads(project.command(*command).stdout) == summary
    assert sorted(project.dvc("exp", "list", "--name-only").stdout.split()) == sorted(listed)


def test_a_recipe_that_fails_is_reported_with_dvc_s_reason(project: Project) -> None:
    failed = project.command("replicate", "--seeds", "1", "-S", "train.lr=no", check=False)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "train.lr" in failed.stderr


def test_a_name_that_no_file_could_have_is_refused(project: Project) -> None:
    failed = project.command("replicate", "--seeds", "1", "--name", "a/b", check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith("error: expected a --name of letters, ")


def test_without_a_commit_it_says_so_in_one_line(fresh_project: Project, tmp_path: Path) -> None:
    project = copy(fresh_project, tmp_path)
    shutil.rmtree(project.folder / ".git")
    project.run("git", "init", "-q")
    failed = project.command("replicate", "--seeds", "1", check=False)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: ")


def test_without_a_git_identity_it_says_so_before_it_starts(project: Project, tmp_path: Path) -> None:
    failed = project.command("replicate", "--seeds", "1", check=False, HOME=str(tmp_path))
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith(
        "error: expected user.name and user.email in git's configuration, found none; `git config --global"
    )
