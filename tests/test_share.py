"""What one clone ran, another has without running it: through a real S3 server, a real SSH server and a folder."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from s3fs import S3FileSystem
from support.commands import environment
from support.project import STAGES, Project, copy, make_project
from support.servers import SSH
from support.store import Store
from support.team import Remote, found_team, join

from benchmarks.servers import S3


@pytest.fixture
def remotes(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Remote]:
    """Makes an empty remote of a kind."""

    def make(kind: str) -> Remote:
        if kind == "s3":
            server: S3 = request.getfixturevalue("s3")
            return Remote(f"s3://team/{tmp_path.name}", {"endpointurl": server.uri}, server.env)
        (tmp_path / "remote").mkdir()
        if kind == "ssh":
            other: SSH = request.getfixturevalue("ssh")
            return Remote(f"{other.address}{tmp_path}/remote", {}, other.env)
        return Remote(str(tmp_path / "remote"), {}, {})

    return make


@pytest.mark.parametrize("kind", ["s3", "ssh", "folder"])
def test_what_one_clone_ran_another_gets_by_a_pull_with_complete_rows(
    kind: str, finished_project: Project, remotes: Callable[[str], Remote], tmp_path: Path
) -> None:
    one, remote = copy(finished_project, tmp_path / "one"), remotes(kind)
    found_team(one, remote, tmp_path)
    one.command("share", "push", check=True, **remote.env)
    other = join(tmp_path, "other")
    other.command("share", "pull", check=True, **remote.env)
    assert other.repro() == []
    assert other.run("git", "status", "--porcelain").stdout == ""
    assert "agree" in other.commands("sync", "audit")["audit"].stdout
    for stage in STAGES:  # audit compares the rest
        theirs, ours = Store(one).run(stage), Store(other).run(stage)
        assert ours.data.tags["dvc.execution"] == theirs.data.tags["dvc.execution"]


def test_nothing_that_another_ran_is_run_again_committed_or_not(
    two_results: Project, remotes: Callable[[str], Remote], tmp_path: Path
) -> None:
    one = copy(two_results, tmp_path / "one")
    one.run("git", "checkout", "-q", "params.yaml", "dvc.lock")
    found_team(one, remotes("folder"), tmp_path)
    one.set("evaluate.batch_size", 50)
    assert one.repro() == ["evaluate"], "neither committed nor an experiment"
    one.run("git", "checkout", "-q", "params.yaml", "dvc.lock")
    assert one.repro() == []
    assert "sent 1 experiment to origin" in one.command("share", "push").stdout
    assert "sent 0 experiments to origin" in one.command("share", "push").stdout
    other = join(tmp_path, "other")
    assert "got 1 experiment from origin" in other.command("share", "pull").stdout
    assert "got 0 experiments from origin" in other.command("share", "pull").stdout
    other.set("evaluate.batch_size", 50)
    assert other.repro() == []
    other.run("git", "checkout", "-q", "params.yaml", "dvc.lock")
    other.dvc("exp", "apply", "slow")
    assert other.repro() == []
    assert other.md5s() == two_results.md5s()


def refused(project: Project, *arguments: str, **env: str) -> str:
    """The one line in which the command says why it failed."""
    ended = project.command("share", *arguments, check=False, **env)
    assert ended.returncode == 1, ended
    (line,) = ended.stderr.splitlines()
    return line


def test_a_remote_that_is_down_or_refuses_or_lacks_a_file_is_named_in_one_line_and_a_retry_works(
    finished_project: Project, tmp_path: Path
) -> None:
    one, folder = copy(finished_project, tmp_path / "one"), tmp_path / "s3"
    assert refused(one, "push").startswith("error: expected a default DVC remote, found none; ")
    folder.mkdir()
    server = S3(folder, environment())
    try:
        found_team(one, Remote("s3://team/results", {"endpointurl": server.uri}, server.env), tmp_path)
        one.dvc("remote", "add", "closed", "s3://nobody/results")
        one.dvc("remote", "modify", "closed", "endpointurl", server.uri)
        one.dvc("remote", "add", "unmounted", str(tmp_path / "nowhere"))
        assert "the folder is missing; is it mounted?" in refused(one, "pull", "--remote", "unmounted")
        failed = "error: the DVC remote team (s3://team/results) failed: "
        assert refused(one, "push").startswith(f"{failed}Unable to locate credentials; ")
        guessed = server.env | {"AWS_SECRET_ACCESS_KEY": "guessed"}
        assert refused(one, "push", **guessed).startswith(f"{failed}The request signature we calculated does not match")
        assert "(s3://nobody/results) failed: The specified bucket does not exist; " in refused(
            one, "push", "--remote", "closed", **server.env
        )
        server.stop()
        assert refused(one, "push", **server.env).startswith(f"{failed}Could not connect to the endpoint URL: ")
        server.start()
        one.command("share", "push", check=True, **server.env)

        other, path = join(tmp_path, "other"), "models/lenet.safetensors"
        model = one.md5s()[path]
        files = S3FileSystem(key="key", secret="secret", endpoint_url=server.uri)
        files.rm(f"team/results/files/md5/{model[:2]}/{model[2:]}")
        lacks = refused(other, "pull", **server.env)
        assert lacks.startswith(f"error: {path} (MD5 {model}) is neither here nor in team; ")
        one.command("share", "push", check=True, **server.env)
        other.command("share", "pull", check=True, **server.env)
        assert other.repro() == []
    finally:
        server.stop()


def test_an_experiment_whose_name_another_has_is_refused_and_can_be_renamed(
    finished_project: Project, remotes: Callable[[str], Remote], tmp_path: Path
) -> None:
    one, remote = copy(finished_project, tmp_path / "one"), remotes("folder")
    found_team(one, remote, tmp_path)
    other = join(tmp_path, "other")
    one.command("share", "push")
    other.command("share", "pull")
    for project, size in ((one, 50), (other, 40)):
        project.dvc("exp", "run", "--name", "small", "--set-param", f"evaluate.batch_size={size}")
    one.command("share", "push")
    for what in ("push", "pull"):
        assert refused(other, what).startswith("error: origin has another experiment small; rename yours (`dvc exp ")
    other.dvc("exp", "rename", "small", "smaller")
    other.command("share", "pull")
    hook = tmp_path / "origin/hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho no entry >&2\nexit 1\n")
    hook.chmod(0o755)
    assert refused(other, "push").startswith("error: expected git to push experiments, found: remote: no entry")
    hook.unlink()
    other.command("share", "push")
    assert {*other.dvc("exp", "list", "--name-only").stdout.split()} == {"small", "smaller"}


OLD = """\
stages:
  score:
    cmd: cp value copy && cp value score.json
    deps: [value]
    outs: [copy]
    metrics:
      - score.json:
          cache: false
"""


def test_metrics_come_from_git_in_commits_that_have_them_there_and_from_the_remote_in_later_ones(
    tmp_path: Path,
) -> None:
    project = Project(tmp_path / "project")
    make_project(project.folder, {"dvc.yaml": OLD, "value": '{"score": 1}'})
    project.repro()
    project.commit("Keep the score in git")
    (tmp_path / "remote").mkdir()
    found_team(project, Remote(str(tmp_path / "remote"), {}, {}), tmp_path)
    (project.folder / "dvc.yaml").write_text(OLD.replace(":\n          cache: false", ""))
    (project.folder / "value").write_text('{"score": 2}')
    project.run("git", "rm", "-q", "--cached", "score.json")
    project.repro()
    project.commit("Keep the score in DVC's cache")
    project.run("git", "push", "-q", "origin", "main")
    project.dvc("push")

    other = join(tmp_path, "other")
    changed = json.loads(other.dvc("metrics", "diff", "--json", "main~2", "main").stdout)
    assert changed == {"score.json": {"score": {"old": 1, "new": 2, "diff": 1}}}
    assert (
        "recorded: score.json as recorded is neither in git nor" in other.command("sync", "--all", check=False).stdout
    )
    other.command("sync", "--all", "--fetch", check=True)
    client = mlflow.MlflowClient(f"sqlite:///{other.folder}/mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    assert sorted(run.data.metrics["score"] for run in client.search_runs(experiments)) == [1, 2]
