"""A comparison matches the files, and reports a difference only if it is more than chance."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.data import TEST_SIZE
from support.project import Project, copy
from support.store import Store

from commands.compare import WORSE, Result, compare, interval
from dvc_mlflow.text import UserError


def result(name: str, labels: np.ndarray, predicted: np.ndarray) -> Result:
    table = pd.DataFrame({"index": np.arange(len(labels)), "label": labels, "predicted": predicted})
    return Result(name, {}, {}, table.join(pd.DataFrame(np.zeros((len(labels), 10)), columns=list("abcdefghij"))))


def make(only_a: int, only_b: int, both: int) -> dict[str, Any]:
    """The comparison of two results that have so many images right in only one of them, or in both."""
    labels = np.zeros(only_a + only_b + both, int)
    a, b = labels.copy(), labels.copy()
    a[:only_b] = 1
    b[only_b : only_b + only_a] = 1
    return compare(result("A", labels, a), result("B", labels, b))


@pytest.mark.parametrize(
    ("only_a", "only_b", "verdict"),
    [
        (0, 0, "no evidence of a difference"),
        (0, 5, "no evidence of a difference"),
        (0, 6, "better"),
        (40, 20, "worse"),
        (20, 40, "better"),
        (100, 110, "no evidence of a difference"),
    ],
)
def test_the_verdict_is_mcnemar_s(only_a: int, only_b: int, verdict: str) -> None:
    n, least = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    comparison = make(only_a, only_b, both=1000)
    assert comparison["mcnemar"]["p"] == pytest.approx(min(1, 2 * tail))
    assert comparison["verdict"] == verdict
    assert verdict in comparison["sentence"]
    difference = comparison["accuracy_difference"]
    assert difference["b_minus_a"] == pytest.approx((only_b - only_a) / (n + 1000))
    assert difference["low"] <= difference["b_minus_a"] <= difference["high"]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    images, only_a, only_b = 2000, 0.02, 0.03
    counts = rng.multinomial(images, [only_a, only_b, 1 - only_a - only_b], size=2000)
    intervals = [interval(int(a), int(b), images) for a, b, _ in counts]
    covered = np.mean([low <= only_b - only_a <= high for low, high in intervals])
    assert 0.94 < covered < 0.965


def run(project: Project, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return project.command("compare", *arguments, check=check)


def test_revisions_experiments_and_runs_of_the_same_results_compare_alike(two_results: Project) -> None:
    slow, first = Store(two_results).runs("train")
    evaluation = next(
        run for run in Store(two_results).runs("evaluate") if run.data.tags["mlflow.parentRunId"] == slow.info.run_id
    )
    pairs = [("HEAD", "workspace"), ("main", "slow"), (first.info.run_id, slow.info.run_id)]
    pairs.append((first.info.run_id, evaluation.info.run_id))
    ends = [run(two_results, "--json", *pair, check=False) for pair in pairs]
    assert {end.returncode for end in ends} == {WORSE}
    found = [json.loads(end.stdout) for end in ends]
    for comparison in found:
        assert comparison["verdict"] == "worse"
        assert comparison["params"] == {"train.lr": {"a": 0.01, "b": 0.0001}}
        assert comparison["mcnemar"] == found[0]["mcnemar"]
        assert comparison["classes"] == found[0]["classes"]
    evaluated = json.loads((two_results.folder / "metrics/evaluate.json").read_text())
    differences = json.loads(two_results.dvc("metrics", "diff", "--json", "HEAD").stdout)["metrics/evaluate.json"]
    committed = {key: values["old"] for key, values in differences.items()}
    for comparison in found:
        for key, value in evaluated.items():
            assert comparison["metrics"][key] == {"a": committed[key], "b": value}
    difference = found[0]["accuracy_difference"]["b_minus_a"]
    assert difference == pytest.approx(evaluated["test_accuracy"] - committed["test_accuracy"])
    assert found[0]["mcnemar"]["images"] == TEST_SIZE


def test_a_result_does_not_differ_from_itself(two_results: Project) -> None:
    shown = run(two_results, "main", "HEAD").stdout
    assert "There is no evidence of a difference between HEAD and main (p = 1.0000)" in shown
    assert "params that differ" not in shown


def test_tables_and_markdown_name_params_metrics_and_classes(two_results: Project) -> None:
    for arguments in (["main", "slow"], ["--md", "main", "slow"]):
        shown = run(two_results, *arguments, check=False).stdout
        for text in ("train.lr", "0.0001", "test_accuracy", "slow is worse than main, by ", "95 % interval"):
            assert text in shown
    assert "| train.lr | 0.01" in shown


@pytest.mark.parametrize("name", ["nothing-of-that-name", "0" * 32])
def test_a_missing_result_is_reported_in_one_line(two_results: Project, name: str) -> None:
    failed = run(two_results, "main", name, check=False)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: expected")
    assert name in line


def test_a_workspace_without_results_does_not_keep_commits_from_being_compared(
    two_results: Project, tmp_path: Path
) -> None:
    project = copy(two_results, tmp_path)
    digest = project.md5s()["metrics/train.json"]
    (project.folder / "metrics/train.json").unlink()
    (project.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()
    assert "no evidence of a difference" in run(project, "main", "main").stdout


def test_headings_name_the_commits(two_results: Project) -> None:
    listed = two_results.run("git", "for-each-ref", "--format=%(objectname:short=7) %(refname)").stdout.splitlines()
    main, slow = (next(line[:7] for line in listed if line.endswith(f"/{name}")) for name in ("main", "slow"))
    shown = run(two_results, "--md", "main", "slow", check=False).stdout
    assert f"|  | main ({main}) | slow ({slow}) | change |" in shown


def test_results_on_other_test_sets_are_not_compared(tmp_path: Path) -> None:
    labels = np.zeros(10, int)
    with pytest.raises(UserError, match="same test images"):
        compare(result("A", labels, labels), result("B", labels + 1, labels))


def test_results_of_other_classes_are_not_compared() -> None:
    labels = np.zeros(10, int)
    a, b = result("A", labels, labels), result("B", labels, labels)
    b = replace(b, predictions=b.predictions.rename(columns={"j": "k"}))
    with pytest.raises(UserError, match="expected the same classes, found j in A and k in B"):
        compare(a, b)


def test_code_that_was_committed_but_not_run_is_refused(two_results: Project, tmp_path: Path) -> None:
    project = copy(two_results, tmp_path)
    project.run("git", "checkout", "-q", ".")
    with (project.folder / "stages/lenet.py").open("a") as file:
        file.write("# changed\n")
    project.commit("Change the network, and forget to run it")
    for arguments in (["--md", "HEAD~1", "HEAD"], ["HEAD", "HEAD~1"], ["HEAD~1", "workspace"]):
        failed = run(project, *arguments, check=False)
        assert (failed.returncode, failed.stdout) == (1, "")
        (line,) = failed.stderr.splitlines()
        assert "'s own code, params and data, found others: stages/lenet.py: dvc.lock (" in line
        assert line.endswith("; `dvc repro`, then commit dvc.lock")


def test_results_of_other_params_or_another_model_are_not_compared(two_results: Project, tmp_path: Path) -> None:
    project = copy(two_results, tmp_path)
    project.set("train.lr", 0.02)
    failed = run(project, "main", "workspace", check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == (
        "error: expected results made with workspace's own code, params and data, found others: "
        "train.lr: params.yaml has 0.02, dvc.lock 0.0001; `dvc repro`, then commit dvc.lock\n"
    )
    project.repro("--single-item", "train")
    failed = run(project, "main", "workspace", check=False)
    assert "found others: models/lenet.safetensors: dvc.lock (evaluate) has MD5 " in failed.stderr


def test_predictions_that_the_evaluation_did_not_make_are_refused(two_results: Project, tmp_path: Path) -> None:
    project = copy(two_results, tmp_path)
    table = pd.read_parquet(project.folder / "metrics/predictions.parquet")
    table["predicted"] = table["label"]
    digest = project.md5s()["metrics/predictions.parquet"]
    cached = project.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    cached.chmod(0o644)
    table.to_parquet(cached)
    (project.folder / "metrics/predictions.parquet").unlink()
    failed = run(project, "main", "workspace", check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "dvc.lock, found other bytes" in failed.stderr


def test_a_lock_with_conflict_markers_is_reported_in_one_line(two_results: Project, tmp_path: Path) -> None:
    project = copy(two_results, tmp_path)
    lock = project.folder / "dvc.lock"
    lock.write_text(f"<<<<<<< HEAD\n{lock.read_text()}=======\n>>>>>>> other\n")
    failed = run(project, "main", "workspace", check=False)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert "dvc.lock" in line
