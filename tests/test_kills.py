"""Stages may be killed at any moment: the next `dvc repro` ends as if nothing had happened."""

import contextlib
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from dvc.utils.serialize import load_yaml
from mlflow.entities import LoggedModelStatus
from support.commands import environment
from support.project import STAGES, Project, copy
from support.store import Store

from stages.stage import md5

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST = {"fetch": 2.5, "train": 4.0}  # seconds after its start, in which a stage is killed; else 3.5


def only_the_stage(dvc: psutil.Process, found: list[psutil.Process], number: signal.Signals) -> None:
    found[-1].send_signal(number)


def only_the_launcher(dvc: psutil.Process, found: list[psutil.Process], number: signal.Signals) -> None:
    found[0].send_signal(number)


def the_foreground(dvc: psutil.Process, found: list[psutil.Process], number: signal.Signals) -> None:
    """As a terminal does on Ctrl-C: DVC, its shell and the stage, but not the recorder."""
    os.killpg(dvc.pid, number)


def everything(dvc: psutil.Process, found: list[psutil.Process], number: signal.Signals) -> None:
    """As a power cut does: everything, including the recorder."""
    for process in [dvc, *dvc.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


Whom = Callable[[psutil.Process, list[psutil.Process], signal.Signals], None]


def kill(project: Project, stage: str, number: signal.Signals, whom: Whom, when: Callable[[Path], bool]) -> bool:
    """Run `dvc repro`, and kill the stage once `when` accepts the output; return whether `dvc repro` failed by it.

    SIGINT waits for the stage's first lines: before them, it ends in a traceback of Python's own start.
    """
    output = project.folder / ".dvc" / "tmp" / "output.txt"
    output.parent.mkdir(exist_ok=True)
    with output.open("w") as file:
        process = subprocess.Popen(
            ["dvc", "repro"], cwd=project.folder, env=environment(), stdout=file, stderr=file, start_new_session=True
        )
        dvc, killed, begun = psutil.Process(process.pid), False, number != signal.SIGINT
        while process.poll() is None and not killed:
            found = [child for child in descendants(dvc) if f"stages.{stage}" in cmdline(child)]
            begun = begun or (bool(found) and holds_back(found[-1], number))
            if found and when(output) and begun:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    whom(dvc, found, number)
                    killed = True
            time.sleep(0.01)
        process.wait(60)
    text = output.read_text()
    assert "Traceback" not in text, text
    output.unlink()
    return killed and process.returncode != 0


def descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def holds_back(stage: psutil.Process, number: signal.Signals) -> bool:
    """Whether the stage blocks the signal, as `stage.prepare` does (Linux shows it; elsewhere, it is taken to)."""
    if sys.platform != "linux":
        return True
    if any(word.endswith("dvc-mlflow") for word in cmdline(stage)):  # the launcher, which blocks it, too
        return False
    with contextlib.suppress(OSError):  # it has ended
        for line in Path(f"/proc/{stage.pid}/status").read_text().splitlines():
            if line.startswith("SigBlk:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def after(seconds: float) -> Callable[[Path], bool]:
    """Seconds from the first call."""
    start: list[float] = []

    def when(output: Path) -> bool:
        start.append(time.monotonic())
        return start[-1] - start[0] >= seconds

    return when


def count(project: Project, stage: str, status: str) -> int:
    """How many runs of the stage have this status."""
    query = "SELECT count(*) FROM runs WHERE name LIKE ? AND status = ?"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{project.folder}/mlflow.db?mode=ro", uri=True)) as database:
            return database.execute(query, (f"{stage} %", status)).fetchone()[0]
    except sqlite3.OperationalError:  # there is no store yet, or it has no tables
        return 0


def assert_as_if_nothing_had_been(project: Project, reference: dict[str, str]) -> None:
    """The files are the same, and each stage has one FINISHED run.

    If DVC was killed, that may be of a command that succeeded nevertheless: DVC then ran it again, to the same bytes.
    """
    assert project.md5s() == reference
    assert {path: md5(project.folder / path) for path in reference} == reference
    assert not [path for path in project.folder.rglob("*.tmp") if ".git" not in path.parts]
    assert not list((project.folder / ".dvc" / "tmp" / "checkpoints").glob("*"))
    store = Store(project)
    for stage in STAGES:
        statuses = [run.info.status for run in store.runs(stage)]
        assert statuses.count("FINISHED") == 1, (stage, statuses)
        assert set(statuses) <= {"FINISHED", "KILLED"}, (stage, statuses)
    epochs = load_yaml(project.folder / "params.yaml")["train"]["epochs"]
    for train in store.runs("train"):
        steps = sorted(step for step, _ in store.curve(train, "train_loss"))
        assert steps == list(range(1, epochs + 1)) or train.info.status == "KILLED"
    assert project.command("audit", check=False).returncode == 0


def test_a_project_whose_stages_are_killed_at_random_ends_like_one_that_was_left_alone(
    fresh_project: Project,
    finished_project: Project,
    stress: bool,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Each round: a new project is killed in each stage in turn, then runs to its end."""
    kills, number = 0, 0
    while kills < (60 if stress else 2):
        rng = random.Random(number)
        project = copy(fresh_project, tmp_path / str(number))
        for place, stage in enumerate(STAGES):
            how = SIGNALS[(number + place) % 3]
            whom = rng.choice(
                [only_the_stage, only_the_launcher, the_foreground, *([everything] if how == signal.SIGKILL else [])]
            )
            seconds = rng.uniform(0, LONGEST.get(stage, 3.5))
            print(f"round {number}: {how.name} to {whom.__name__} {seconds:.2f} s after the start of {stage}")
            kills += kill(project, stage, how, whom, after(seconds))
        assert STAGES[0] not in project.repro()  # a later one began: the first is not run again
        assert_as_if_nothing_had_been(project, finished_project.md5s())
        number += 1
    record_property("kills survived", kills)


BUFFERS_AND_RANDOM_NUMBERS = """
Plain = LeNet


class LeNet(Plain):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.added_norm, self.added_dropout = nn.BatchNorm1d(1), nn.Dropout(0.2)

    def forward(self, images):
        pixels = images.flatten(1).unsqueeze(1).float()  # of images in grey or in colour
        return super().forward(self.added_dropout(self.added_norm(pixels)).view(images.shape))
"""


def as_it_is(project: Project) -> None:
    project.set("train.batch_size", 1)


def with_buffers_and_random_numbers(project: Project) -> None:
    """Give the network batch normalisation and dropout, whatever network it is."""
    with (project.folder / "stages/lenet.py").open("a") as file:
        file.write(BUFFERS_AND_RANDOM_NUMBERS)
    project.set("train.batch_size", 2)


@pytest.mark.parametrize(
    ("whom", "network"), [(only_the_launcher, as_it_is), (everything, with_buffers_and_random_numbers)]
)
def test_train_continues_from_its_checkpoint_in_the_same_run(
    whom: Whom, network: Callable[[Project], None], project: Project
) -> None:
    network(project)
    project.set("train.epochs", 8)

    def when(output: Path) -> bool:
        return "epoch 2/8" in output.read_text() and count(project, "train", "RUNNING") == 1

    assert kill(project, "train", signal.SIGKILL, whom, when)
    result = project.dvc("repro")
    went_on = re.findall(r"continuing after epoch (\d+)/8, from a checkpoint", result.stdout)
    assert went_on
    assert int(went_on[0]) >= 2
    assert "\nepoch 2/8" not in result.stdout
    store = Store(project)
    run, _ = store.runs("train")  # the other is that of three epochs
    assert (run.info.status, run.data.tags["resumed"]) == ("FINISHED", "true")
    assert sorted(step for step, _ in store.curve(run, "train_loss")) == list(range(1, 9))
    assert not list((project.folder / ".dvc" / "tmp" / "checkpoints").glob("*"))

    resumed = project.md5s()
    assert project.repro("--force", "--single-item", "train") == ["train"]  # without a kill
    assert project.md5s() == resumed


def test_a_store_whose_creation_was_cut_off_is_created_again(new_project: Project) -> None:
    code = "from pathlib import Path; from dvc_mlflow import project, store; store.Store(project.Project(Path.cwd()))"
    make = [sys.executable, "-c", code]
    process = subprocess.Popen(make, cwd=new_project.folder, env=environment())
    while not any(path.stat().st_size for path in new_project.folder.glob("mlflow.db*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    new_project.run(*make)
    assert sorted(path.name for path in new_project.folder.glob("mlflow.db*")) == ["mlflow.db", "mlflow.db.lock"]


def test_a_model_that_was_cut_off_while_it_was_logged_is_logged_again(project: Project) -> None:
    store = Store(project)
    run = store.run("train")
    (model,) = store.client.search_logged_models([store.experiment_id])
    for path in (project.folder / "mlartifacts").rglob(f"{model.model_id}/artifacts/MLmodel"):
        path.unlink()
    store.client.finalize_logged_model(model.model_id, LoggedModelStatus.PENDING)
    store.client.set_terminated(run.info.run_id, "KILLED")
    project.command("sync")
    (again,) = store.client.search_logged_models([store.experiment_id])
    assert (again.model_id, again.status) == (model.model_id, LoggedModelStatus.READY)
    run = store.run("train")
    assert run.info.status == "FINISHED"
    assert run.outputs
    assert len(run.outputs.model_outputs) == 1
    assert project.command("audit", check=False).returncode == 0
