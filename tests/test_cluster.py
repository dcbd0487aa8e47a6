"""Sweeps on Ray: real nodes that clone a bare git repository, an S3 server and an MLflow server."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from support.cluster import RAY, Site, site_here, site_in_namespaces
from support.commands import environment
from support.project import Project, copy
from support.team import Remote, found_team

from benchmarks.servers import LOOPBACK, QUIET, S3, MLflow, free_port, postgres
from commands.trials import Baseline, Source, Trial, push


@pytest.fixture
def site(
    request: pytest.FixtureRequest, stress: bool, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """A Ray cluster of two nodes and an S3 server: `here`, on this machine, or `far`, in network namespaces."""
    far = request.param == "far"
    if far and not stress:
        pytest.skip("the long form: --stress")
    folder = tempfile.mkdtemp(prefix="ray-")  # its path is short, since Ray has sockets in it
    for key in os.environ.keys() - environment().keys():
        monkeypatch.delenv(key)
    for key, value in (environment() | QUIET | s3.env | {"TMPDIR": folder}).items():
        monkeypatch.setenv(key, value)
    with site_in_namespaces(tmp_path) if far else site_here(tmp_path, s3) as made:
        yield made
    shutil.rmtree(folder, ignore_errors=True)  # processes of the lost node may still write


def found(project: Project, site: Site, parent: Path) -> None:
    """Push the project to a bare git repository, parent/origin, and to a DVC remote in S3."""
    name, credentials = f"{parent.parent.name}-{parent.name}", dict[str, Any](site.s3.env)
    found_team(project, Remote(f"s3://team/{name}", {"endpointurl": site.s3.uri}, site.s3.env), parent)
    project.run("git", "remote", "set-url", "origin", f"{site.git}/origin")
    project.dvc("push", **credentials)


def refs(folder: Path) -> dict[str, str]:
    """The experiments in a git repository, by name."""
    listed = subprocess.run(
        ["git", "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return {line.rpartition("/")[2]: line.split()[0] for line in listed if "/exec/" not in line}


@pytest.mark.parametrize("site", ["here", "far"], indirect=True)
def test_a_sweep_survives_a_lost_node_and_a_killed_command_and_leaves_everything_in_the_remotes(
    site: Site,
    finished_project: Project,
    tmp_path: Path,
    stress: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """The short form has two trials, and loses nothing."""
    team, trials = copy(finished_project, tmp_path), 6 if stress else 2
    found(team, site, tmp_path)
    with contextlib.ExitStack() as ends:
        database = ends.enter_context(postgres())("sweep") if stress else f"sqlite:///{tmp_path / 'team.db'}"
        server = MLflow(tmp_path, database, environment(), site.host)
        ends.callback(server.stop)
        env: dict[str, Any] = site.s3.env | QUIET | {"MLFLOW_TRACKING_URI": server.uri}

        def start() -> subprocess.Popen[str]:
            command = ["--trials", str(trials), "--name", "far", "--ray", site.address, "--json"]
            command += ["-S", "train.epochs=1", "-S", "train.lr=tag(log,interval(1e-3,1e-1))"]
            return subprocess.Popen(
                [sys.executable, "-m", "commands.sweep", *command],
                cwd=team.folder,
                env=environment() | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        def wait_for(number: int) -> None:
            while len(refs(tmp_path / "origin")) < number:
                assert sweep.poll() is None, sweep.communicate()
                time.sleep(0.1)

        sweep = start()
        if stress:
            wait_for(1)
            sweep.kill()
            sweep.communicate()
            sweep = start()
            wait_for(3)
            site.lose_a_node()
        output, errors = sweep.communicate()
        assert sweep.returncode == 0, errors
        assert stress or errors == "", "Ray says that a node is lost"
        result = json.loads(output)
        names = [f"far-{number}" for number in range(trials)]
        assert [(row["experiment"], row["state"]) for row in result["trials"]] == [(name, "complete") for name in names]
        assert sorted(refs(tmp_path / "origin")) == names

        client = mlflow.MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("fashion-mnist-lenet")
        assert experiment
        runs = client.search_runs([experiment.experiment_id])
        assert "RUNNING" not in {run.info.status for run in runs}
        for number in range(trials):
            for stage in ("train", "evaluate"):
                (row,) = [
                    run
                    for run in runs
                    if (run.data.tags.get("sweep.trial"), run.data.tags.get("stage")) == (str(number), stage)
                    and run.info.status == "FINISHED"
                ]
                assert row.data.tags["dvc.exp_name"] == f"far-{number}"

        elsewhere = Project(tmp_path / "elsewhere")
        team.run("git", "clone", "-q", str(tmp_path / "origin"), str(elsewhere.folder))
        elsewhere.dvc("exp", "pull", "origin", *names, **env)
        elsewhere.dvc("pull", **env)
        elsewhere.dvc("exp", "apply", names[-1], **env)
        assert elsewhere.repro(**env) == [], "the remote has all of it"
        elsewhere.command("sync", **env)
        assert "agree" in elsewhere.command("audit", **env).stdout
        if stress:
            by_hand = copy(team, tmp_path / "by hand")
            for row in result["trials"]:
                by_hand.set("train.epochs", 1)
                by_hand.set("train.lr", row["params"]["train.lr"])
                by_hand.repro()
                locked = elsewhere.run("git", "show", f"{refs(elsewhere.folder)[row['experiment']]}:dvc.lock").stdout
                assert locked == (by_hand.folder / "dvc.lock").read_text()
            record_property("trials on a cluster that lost a node, by a command that was killed once", trials)


def test_ray_on_one_machine_needs_no_remote_and_no_set_up(small: Project, project: Project) -> None:
    space = ["-S", "lr=0.1,0.2,0.3", "--sampler", "grid", "--metric", "score.json:accuracy"]
    result = json.loads(small.command("sweep", *space, "--ray", "--name", "near", "--json").stdout)
    assert [row["state"] for row in result["trials"]] == ["complete"] * 3
    assert sorted(refs(small.folder)) == ["near-0", "near-1", "near-2"]
    project.set("train.threads", 999)
    refused = project.command("replicate", "--seeds", "1", "--ray", check=False)
    assert refused.stderr.startswith("error: expected a node with 999 CPU(s) and 0 GPU(s) for replicate-")
    seeds = ["--seeds", "1", "--ray", "-S", "train.epochs=1", "-S", "train.threads=1", "--name", "seeds", "--json"]
    assert json.loads(project.command("replicate", *seeds).stdout)["seeds"] == 1
    assert not Path(environment()["HOME"], ".ray").exists(), "a token there would be asked for by the next `ray start`"


def test_a_cluster_with_a_token_is_for_who_has_it(project: Project, tmp_path: Path, s3: S3) -> None:
    found(project, Site("", LOOPBACK, str(tmp_path), s3, lambda: None), tmp_path)
    home, address = tmp_path / "home", f"{LOOPBACK}:{free_port()}"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("0" * 64)
    shutil.copy(Path(environment()["HOME"], ".gitconfig"), home)
    owner, line = s3.env | {"HOME": str(home)}, f"sweep --trials 2 -S train.lr=interval(0,1) --name x --ray {address}"
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        start: list[str | Path] = [
            RAY,
            "start",
            "--head",
            "--block",
            f"--node-ip-address={LOOPBACK}",
            f"--port={address.split(':')[1]}",
        ]
        head = subprocess.Popen(
            [*start, "--num-cpus=0", "--include-dashboard=false"],
            env=environment() | QUIET | owner | {"TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert head.stdout
        for shown in head.stdout:
            if "Ray runtime started" in shown:
                break
        try:
            (joined,) = project.commands(line, **owner).values()
            (empty,) = project.commands(line, **s3.env, RAY_AUTH_MODE="token").values()
            (stranger,) = project.commands(line, **s3.env, RAY_NUM_REDIS_GET_RETRIES="2").values()
        finally:
            head.terminate()
            head.communicate()
    assert joined.stderr.startswith("error: expected a node with 1 CPU(s)")
    for refused in (empty, stranger):
        assert refused.stderr.startswith(f"error: expected the token of the Ray cluster at {address}, found another ")


def test_a_remote_that_refuses_or_has_another_experiment_is_not_overwritten(project: Project, tmp_path: Path) -> None:
    bare, trial = tmp_path / "bare.git", Trial("far-0", ())
    project.dvc("remote", "add", "--default", "local", str(tmp_path / "storage"))
    project.commit("Add a remote")
    project.run("git", "init", "-q", "--bare", "-b", "main", str(bare))
    project.run("git", "remote", "add", "origin", str(bare))
    rev = project.run("git", "rev-parse", "HEAD").stdout.strip()
    source = Source(Baseline(project.folder, rev, b""), str(bare), "", {}, {})
    ref = f"refs/exps/{rev[:2]}/{rev[2:]}/far-0"

    def push_one(message: str, tree: str = "HEAD") -> str:
        commit = project.run("git", "commit-tree", f"{tree}^{{tree}}", "-p", "HEAD", "-m", message).stdout.strip()
        project.run("git", "update-ref", ref, commit)
        push(project.folder, source, trial)
        return commit

    (bare / "hooks/pre-receive").write_text("#!/bin/sh\necho no entry >&2\nexit 1\n")
    (bare / "hooks/pre-receive").chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        push_one("refused")
    assert b"no entry" in refused.value.stderr
    assert refs(bare) == {}
    (bare / "hooks/pre-receive").unlink()
    first = push_one("first")
    push_one("the same bits, made again by another node")
    with pytest.raises(OSError, match="another experiment far-0 in git remote origin"):
        push_one("other bits", "HEAD~1")
    assert refs(bare) == {"far-0": first}
    assert list((tmp_path / "storage").rglob("??/*")), "the cache is there"


def test_a_cluster_that_cannot_be_used_is_reported_in_one_line(project: Project, tmp_path: Path, s3: S3) -> None:
    found(project, Site("", LOOPBACK, str(tmp_path), s3, lambda: None), tmp_path)
    nowhere = f"127.0.0.1:{free_port()}"
    line = f"sweep --trials 2 -S train.lr=interval(0,1) --name x --ray {nowhere}"

    def reason(line: str = line) -> str:
        (end,) = project.commands(line, **s3.env).values()
        assert end.returncode == 1
        return end.stderr

    assert f"expected a Ray cluster at {nowhere}, found none" in reason()
    assert "expected a Ray address" in reason(line=line.replace(nowhere, "nonsense"))
    project.run("git", "commit", "-q", "--allow-empty", "-m", "Not pushed")
    assert "`git push` first" in reason()
    (project.folder / "params.yaml").write_text((project.folder / "params.yaml").read_text() + "# changed\n")
    assert "commit first" in reason()
    project.run("git", "checkout", "-q", "params.yaml")
    project.run("git", "remote", "remove", "origin")
    assert "expected a git remote origin" in reason()
