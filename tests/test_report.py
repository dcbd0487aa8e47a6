"""The report of a pull request says what changed, what came of it, and what it could not find out."""

import hashlib
import re
import subprocess
from pathlib import Path

import mlflow
import pytest
from support.project import STAGES, Project, copy
from support.servers import Served

from commands.compare import WORSE
from commands.report import MARK


@pytest.fixture(scope="module")
def pull_request(two_results: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project on a branch whose one commit has the second result, with a DVC remote. Not to be changed: copy it."""
    project = copy(two_results, tmp_path_factory.mktemp("pull_request"))
    for local in (["--local"], []):  # the first is for main, which is older than the remote: the push covers it, too
        project.dvc("remote", "add", *local, "--default", "storage", str(project.folder.parent / "storage"))
    project.run("git", "checkout", "-q", "-b", "branch")
    project.commit("Learn slowly")
    project.dvc("push", "-q", "--all-branches")
    return project


def report(project: Project, *arguments: str, check: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
    return project.command("report", *arguments, check=check, **env)


def clone(project: Project, folder: Path) -> Project:
    """A shallow clone of the branch, without data, that also has the last commit of main."""
    address = f"file://{project.folder}"
    project.run("git", "clone", "-q", "--depth", "1", "--branch", "branch", address, str(folder))
    shallow = Project(folder)
    shallow.run("git", "fetch", "-q", "--depth", "1", "origin", "main:refs/remotes/origin/main")
    return shallow


def test_it_says_what_ran_again_and_why_and_what_came_of_it(pull_request: Project, tmp_path: Path) -> None:
    ended = report(pull_request, "main", "--output", str(tmp_path / "report"))
    assert (ended.returncode, ended.stderr) == (WORSE, "")
    first, *lines = ended.stdout.splitlines()
    assert first.startswith("**HEAD is worse than main, by ")
    assert "| fetch | unchanged |  |" in lines
    assert "| train | ran again | `train.lr` |" in lines
    assert "| evaluate | ran again | `models/lenet.safetensors` |" in lines
    assert any(line.startswith("| test_accuracy | ") for line in lines)
    assert lines[-1] == MARK
    text = (tmp_path / "report/report.md").read_text()
    assert text.startswith(ended.stdout.removesuffix(f"{MARK}\n"))
    images = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
    assert len(images) == 10
    for path, place in images:
        data = (tmp_path / "report" / place).read_bytes()
        if place.startswith("head/"):
            assert hashlib.md5(data).hexdigest() == pull_request.md5s()[path]


def test_a_shallow_clone_with_a_remote_reports_the_same(pull_request: Project, tmp_path: Path) -> None:
    whole = report(pull_request, "main").stdout
    shallow = clone(pull_request, tmp_path / "clone")
    assert report(shallow, "origin/main").stdout.replace("origin/main", "main") == whole


def test_it_says_what_it_lacks(pull_request: Project, tmp_path: Path) -> None:
    shallow = clone(pull_request, tmp_path / "clone")
    shallow.dvc("remote", "modify", "--local", "storage", "url", str(tmp_path / "empty"))
    ended = report(shallow, "origin/main")
    assert ended.returncode == 1
    assert all("; `make pull` gets what others pushed" in line for line in ended.stderr.splitlines())
    assert ended.stdout.startswith("**expected a result named HEAD, found none: ")
    assert " that are neither here nor in the remote: metrics/plots/curves.png" in ended.stdout
    assert " is worse than " not in ended.stdout


def test_a_stale_lock_is_the_first_line_and_its_results_are_left_out(pull_request: Project, tmp_path: Path) -> None:
    project = copy(pull_request, tmp_path)
    with (project.folder / "stages/lenet.py").open("a") as file:
        file.write("# changed\n")
    project.commit("Change the network, and forget to run it")
    ended = report(project, "main")
    assert ended.returncode == 1
    assert re.match(
        r"\*\*dvc\.lock of HEAD \(\w{7}\) is stale: stages/lenet.py: dvc\.lock \(train\) has MD5 ", ended.stdout
    )
    assert " is worse than " not in ended.stdout
    lines = ended.stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("| test_accuracy | ")]
    assert row.endswith(" | - | - |")
    listed = lines[lines.index("") + 1 :]
    assert re.fullmatch(r"### changed in HEAD \(\w{7}\) since it ran", listed[0])
    assert [line.split(":")[0] for line in listed[2:4]] == ["- stages/lenet.py"] * 2  # of train and of evaluate
    assert "unchanged" not in ended.stdout
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: dvc.lock of HEAD (")


def test_a_reader_that_leaves_early_gets_no_traceback(pull_request: Project) -> None:
    for command in ("python -m commands.report main", "python -m commands.compare --json main HEAD"):
        assert pull_request.run("bash", "-c", f"{command} | true").stderr == ""


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("nothing", "error: expected a git revision or a DVC experiment, found nothing: "),
        ("main~1", "error: expected results in main~1 ("),
    ],
)
def test_a_missing_base_or_one_without_results_is_reported_in_one_line(
    base: str, expected: str, pull_request: Project
) -> None:
    ended = report(pull_request, base)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(expected)


def test_it_links_the_rows_on_a_server(served: Served) -> None:
    address = f"http://127.0.0.1:{served.port}"
    ended = report(served.project, "HEAD", check=True, MLFLOW_TRACKING_URI=address)
    links = re.findall(rf"\[(\w+) .*?\]\({address}/#/experiments/\d+/runs/(\w+)\)", ended.stdout)
    assert [stage for stage, _ in links] == [stage for stage in STAGES for _ in range(2)]
    client = mlflow.MlflowClient(address)
    assert {client.get_run(run_id).data.tags["stage"] for _, run_id in links} == {*STAGES}


def test_a_server_that_is_down_leaves_the_links_out(pull_request: Project) -> None:
    ended = report(pull_request, "main", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert ended.returncode == WORSE
    assert "No links to MLflow: MLflow cannot use http://127.0.0.1:9 (" in ended.stdout
