"""Two people in two clones, with one S3 server and one MLflow server, as docs/team.md says."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run
from support.commands import environment
from support.project import STAGES, Project, copy, ran
from support.team import Remote, found_team, join

from benchmarks.servers import S3, MLflow
from commands.compare import WORSE


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """The address of an MLflow server."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    server = MLflow(folder, f"sqlite:///{folder}/mlflow.db", environment())
    yield server.uri
    server.stop()


def rows(address: str) -> list[Run]:
    """All rows of the project, the newest first."""
    client = mlflow.MlflowClient(address)
    experiment = client.get_experiment_by_name("fashion-mnist-lenet")
    assert experiment
    return list(client.search_runs([experiment.experiment_id]))


def test_two_people_share_results_rows_merges_reports_and_a_champion(
    finished_project: Project, s3: S3, mlflow_server: str, tmp_path: Path
) -> None:
    env = s3.env
    ada, prefix = copy(finished_project, tmp_path / "ada"), tmp_path.parent.name + tmp_path.name
    ada.run("git", "config", "user.name", "Ada")
    settings = ada.folder / "pyproject.toml"
    settings.write_text(
        settings.read_text().replace("[tool.dvc-mlflow]", f'[tool.dvc-mlflow]\ntracking_uri = "{mlflow_server}"')
    )
    ada.run("git", "commit", "-qam", "Name the team's MLflow server")
    found_team(ada, Remote(f"s3://team/{prefix}", {"endpointurl": s3.uri}, env), tmp_path)
    ada.command("sync", check=True, **env)
    ada.command("share", "push", check=True, **env)

    # What Ada ran, Ben has, and it stays one row a stage.
    ben = join(tmp_path, "ben")
    ben.run("git", "config", "user.name", "Ben")
    ben.command("share", "pull", check=True, **env)
    assert ben.repro(check=True, **env) == []
    ben.command("sync", check=True, **env)
    assert sorted(run.data.tags["stage"] for run in rows(mlflow_server)) == sorted(STAGES)
    assert "agree" in ben.command("audit", check=True, **env).stdout

    # What Ben runs says so, and Ada gets it.
    fifties = ("exp", "run", "--name", "fifties", "--set-param", "evaluate.batch_size=50")
    assert ran(ben.dvc(*fifties, check=True, warns=False, **env).stdout) == ["evaluate"]
    assert rows(mlflow_server)[0].data.tags["git.author"] == "Ben <test@example.org>"
    ben.command("share", "push", check=True, **env)
    ada.command("share", "pull", check=True, **env)
    ada.dvc("exp", "apply", "fifties")
    assert ada.repro(check=True, **env) == []
    ada.command("sync", check=True, **env)
    assert len(rows(mlflow_server)) == len(STAGES) + 1

    # Both commit results; Ben merges, as docs/team.md says.
    ada.run("git", "commit", "-qam", "Evaluate 50 images at a time")
    ada.run("git", "push", "-q", "origin", "main")
    ben.run("git", "checkout", "-q", "params.yaml", "dvc.lock")
    ben.set("train.lr", 0.0001)
    assert ben.repro(check=True, **env) == ["train", "evaluate"]
    ben.run("git", "commit", "-qam", "Learn slowly")
    assert "Merge conflict in dvc.lock" in ben.run("git", "pull", "--no-rebase", check=False).stdout
    assert ben.repro("--pull", check=True, **env) == ["evaluate"]
    ben.run("git", "add", "dvc.lock")
    ben.run("git", "commit", "-q", "--no-edit")
    assert "agree" in ben.command("audit", check=True, **env).stdout
    ben.run("git", "push", "-q", "origin", "main")
    ben.command("share", "push", check=True, **env)

    # Ada has the merge without a run; all its rows are there.
    ada.run("git", "pull", "-q")
    ada.command("share", "pull", check=True, **env)
    assert ada.repro(check=True, **env) == []
    count = len(rows(mlflow_server))
    assert "agree" in ada.command("audit", check=True, **env).stdout
    assert count == len({run.data.tags["dvc.execution"] for run in rows(mlflow_server)}) == len(STAGES) + 2 * 2

    # The report of the merge has its rows, and says which stage neither side ran.
    report = ada.command("report", "main~1", "main", check=False, **env)
    assert report.returncode in (0, WORSE), report.stderr
    assert f"{mlflow_server}/#/experiments/" in report.stdout
    assert "| evaluate | ran again |" in report.stdout

    # One champion for both, and who made it so.
    assert "is the champion now" in ada.command("promote", check=True, **env).stdout
    assert "is the champion already" in ben.command("promote", check=True, **env).stdout
    champion = mlflow.MlflowClient(mlflow_server).get_model_version_by_alias("fashion-mnist-lenet", "champion")
    assert champion.tags["promoted.by"] == "Ada <test@example.org>"

    # Bytes that Ben deletes here are still in the remote, and every row stays as it was.
    ben.dvc("gc", "--workspace", "--force", check=True, warns=False, **env)
    assert "agree" in ben.command("audit", check=True, **env).stdout
    first = next(run for run in rows(mlflow_server)[::-1] if run.data.tags["stage"] == "train")
    assert "not here; the remote team has it" in ben.command("lineage", first.info.run_id, check=True, **env).stdout
    assert len(rows(mlflow_server)) == 7
