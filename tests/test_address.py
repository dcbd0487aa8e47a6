"""A project's tracking address: one committed place that all obey, overruled by the environment."""

from pathlib import Path

import mlflow
import psutil
import pytest
from support.project import Project, forget_addresses, make_project
from support.servers import serve

from benchmarks.servers import free_port

PIPELINE = "stages: {say: {cmd: dvc-mlflow run sh -c 'echo said > said', outs: [said]}}\n"
DOWN = "http://127.0.0.1:9"  # nothing listens on the port of discard


def make(folder: Path, address: str) -> Project:
    settings = f'[tool.dvc-mlflow]\nexperiment = "team"\ntracking_uri = "{address}"\n'
    make_project(folder, {"dvc.yaml": PIPELINE, "pyproject.toml": settings})
    project = Project(folder)
    project.commit("A project with a tracking address")
    return project


def runs(database: Path) -> int:
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("team")
    return len(client.search_runs([experiment.experiment_id])) if experiment else 0


def test_stages_sync_and_audit_use_the_committed_address_and_the_environment_overrules_it(tmp_path: Path) -> None:
    team, other = tmp_path / "team.db", tmp_path / "other.db"
    project = make(tmp_path / "project", f"sqlite:///{team}")
    project.dvc("repro")
    assert runs(team) == 1
    assert "recorded before" in project.command("sync").stdout
    assert project.command("audit").stdout == "dvc.yaml, the params, dvc.lock, the files and MLflow agree\n"
    project.command("sync", MLFLOW_TRACKING_URI=f"sqlite:///{other}")
    assert (runs(team), runs(other)) == (1, 1)
    assert not (project.folder / "mlflow.db").exists()


def test_a_server_that_is_down_costs_a_warning_and_no_private_store_takes_its_place(tmp_path: Path) -> None:
    project = make(tmp_path / "project", DOWN)
    ended = project.dvc("repro", warns=True)
    assert DOWN in ended.stdout + ended.stderr
    assert not (project.folder / "mlflow.db").exists()
    for command in ("audit", "sync"):
        failed = project.command(command, check=False)
        assert failed.returncode == 1
        assert failed.stderr.startswith(f"error: MLflow cannot use {DOWN}")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ('tracking_uri = "http://me:secret@127.0.0.1"', "expected tracking_uri in pyproject.toml without a user and "),
        ("tracking_uri = 5000", "expected tracking_uri in pyproject.toml as a string, found 5000"),
        ("tracking_uri = http://127.0.0.1", "cannot read pyproject.toml: "),
    ],
    ids=["password", "number", "not TOML"],
)
def test_a_bad_address_is_refused_in_one_line(settings: str, expected: str, tmp_path: Path) -> None:
    make_project(tmp_path / "project", {"dvc.yaml": PIPELINE, "pyproject.toml": f"[tool.dvc-mlflow]\n{settings}\n"})
    project = Project(tmp_path / "project")
    failed = project.command("sync", check=False)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: {expected}")
    assert "secret" not in line
    assert not (project.folder / "mlflow.db").exists()


def test_an_audit_without_a_store_checks_the_files_and_says_what_it_did_not_check(project: Project) -> None:
    (project.folder / "mlflow.db").unlink()
    note = f"note: MLflow was not checked: expected an MLflow store at {project.folder}/mlflow.db, found none; "
    ended = project.command("audit")
    first, last = ended.stdout.splitlines()
    assert first.startswith(note)
    assert last == "dvc.yaml, the params, dvc.lock and the files agree"
    (project.folder / "metrics/train.json").write_text("{}")
    ended = project.command("audit", check=False)
    assert ended.returncode == 1
    line, last = ended.stdout.splitlines()
    assert line.startswith("metrics/train.json: dvc.lock (train) has MD5 ")
    assert last.startswith(note)
    assert not (project.folder / "mlflow.db").exists()


def test_no_process_of_the_ui_has_the_address_on_its_command_line(tmp_path: Path) -> None:
    project, port = make(tmp_path / "project", DOWN), free_port()
    address = f"sqlite:///{tmp_path}/of-a-secret-name.db"
    with serve(project, port, "dvc-mlflow", "ui", "--port", str(port), MLFLOW_TRACKING_URI=address) as pid:
        server = psutil.Process(pid)
        lines = [" ".join(process.cmdline()) for process in (server, *server.children(recursive=True))]
    assert (tmp_path / "of-a-secret-name.db").exists()
    assert any("mlflow" in line for line in lines)
    assert not [line for line in lines if "of-a-secret-name" in line]


def test_tests_use_no_address_that_a_team_has_committed(small: Project) -> None:
    settings = small.folder / "pyproject.toml"
    own = settings.read_text()
    settings.write_text(f'{own}tracking_uri = "http://mlflow.example.org:5000"\n')
    small.dvc("remote", "add", "--default", "team", "s3://team/project")
    forget_addresses(small.folder)
    assert settings.read_text() == own
    assert small.dvc("remote", "list").stdout == ""
