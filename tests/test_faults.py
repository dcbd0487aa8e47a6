"""Failures of the environment end in a clear line and damage nothing, and a retry makes the expected bytes."""

import itertools
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from dvc.utils.serialize import load_yaml
from mlflow.entities import ViewType
from support.project import STAGES, Pipeline, Project, copy
from support.store import Store

from dvc_mlflow.audit import audit_files
from dvc_mlflow.project import Project as DVCProject
from dvc_mlflow.store import process_tags
from dvc_mlflow.text import UserError
from stages.params import read_params
from stages.stage import StageError

Record = Callable[[str, object], None]  # pytest's record_property
NO_SPACE = "No space left on device"
DENIED = "Permission denied"


def is_whole(project: Project, reference: Project) -> bool:
    """Whether each out is the reference's or missing, dvc.lock is as DVC writes it, and no temporary file is left.

    DVC's own temporary files, in its cache, do not count.
    """
    expected = reference.md5s()
    found = Pipeline(project.folder).hash(expected)
    beside = [path for path in project.folder.rglob("*.tmp") if ".dvc/cache" not in str(path)]
    return not beside and all(found[path] in ("", expected[path]) for path in expected)


def is_right(project: Project, reference: Project) -> bool:
    """Whether the files and dvc.lock are the reference's, byte for byte."""
    expected = reference.md5s()
    return project.md5s() == expected == Pipeline(project.folder).hash(expected)


def audit(project: Project) -> list[str]:
    return project.command("audit", check=False).stdout.splitlines()


# Disks that are full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with its own file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted (needs root on Linux, in a container with CAP_SYS_ADMIN)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave(kibibytes: int, disk: Path) -> None:
    """Make the disk as large as its contents plus this much."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    state = os.statvfs(disk)
    filler.write_bytes(bytes(state.f_bavail * state.f_frsize - kibibytes * 1024))


def elsewhere(project: Project, name: str, folder: Path) -> None:
    """Put a file or folder of the project on another disk."""
    shutil.move(project.folder / name, folder / name)
    (project.folder / name).symlink_to(folder / name)


# The stage that runs with room first, the room in KiB then, and the message. The data are 628 KiB, train's outs 230, a
# checkpoint some 480.
FULL = [
    ("", 300, f"error: cannot write data/fashion-mnist/train.safetensors: {NO_SPACE}"),
    ("", 900, rf"ERROR: failed to transfer .* {NO_SPACE}.*\.dvc/cache"),
    ("", 750, f"error: cannot write models/lenet.safetensors: {NO_SPACE}"),
    ("", 200, f"error: cannot write metrics/plots/curves.png: {NO_SPACE}"),
    ("train", 20, f"error: cannot write metrics/.*: {NO_SPACE}"),
]


def test_a_full_disk_damages_no_file_and_a_retry_with_room_makes_the_same_bytes(
    finished_project: Project, small_disk: Path, tmp_path: Path, stress: bool, record_property: Record
) -> None:
    project = copy(finished_project, small_disk)
    for name in ("mlflow.db", "mlartifacts"):
        elsewhere(project, name, tmp_path)
    for path in finished_project.md5s():
        (project.folder / path).unlink()
    (project.folder / "dvc.lock").unlink()
    shutil.rmtree(project.folder / ".dvc/cache")
    rooms = FULL if stress else FULL[:1]
    for before, room, expected in rooms:
        if before:
            (small_disk / "filler").unlink()
            project.dvc("repro", before)
        leave(room, small_disk)
        result = project.dvc("repro", check=False)
        print(room, result.stdout, result.stderr)
        assert result.returncode != 0
        assert re.search(expected, result.stderr), result.stderr
        assert "Traceback" not in result.stderr
        assert is_whole(project, finished_project)
    (small_disk / "filler").unlink()
    project.repro()
    assert is_right(project, finished_project)

    for path in Pipeline(project.folder).outs("train"):
        (project.folder / path).unlink()
    leave(100, small_disk)  # too little for what the stage makes, and for what it then restores
    result = project.dvc("repro", "--force", "--single-item", "train", check=False)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("the former outs were not restored (")]
    assert f"cannot write {project.folder}/models/lenet.safetensors" in line
    assert line.endswith("; `dvc checkout train` restores them")
    assert is_whole(project, finished_project)
    (small_disk / "filler").unlink()
    project.repro()
    assert is_right(project, finished_project)
    record_property("faults injected", len(rooms) + 1)


def test_a_full_disk_below_mlflow_costs_a_warning_and_sync_completes_the_record(
    project: Project, small_disk: Path, finished_project: Project, stress: bool, record_property: Record
) -> None:
    for name in ("mlflow.db", "mlartifacts"):
        elsewhere(project, name, small_disk)
    rooms = (0, 16, 32, 64, 100, 150, 200) if stress else (64,)
    for number, room in enumerate(rooms):
        project.set("evaluate.batch_size", 100 + number)
        leave(room, small_disk)
        result = project.dvc("repro", warns=True)
        (line,) = [line for line in result.stderr.splitlines() if line]
        assert line.startswith("warning: MLflow cannot use ")
        assert line.endswith("; `dvc-mlflow sync` records this later")
        (small_disk / "filler").unlink()
        project.command("sync")
        assert audit(project) == ["dvc.yaml, the params, dvc.lock, the files and MLflow agree"]
    record_property("faults injected", len(rooms))


# Folders that are read-only


@pytest.fixture
def bound_by_permissions(tmp_path: Path) -> list[str]:
    """A prefix that makes permission bits bind a command: for root, one that gives up its capabilities."""
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    if prefix and not shutil.which(prefix[0]):
        pytest.skip("root needs setpriv to be bound by permission bits (Debian: apt-get install util-linux)")
    assert subprocess.run([*prefix, "touch", str(folder / "file")], capture_output=True).returncode != 0
    return prefix


# A stage, what becomes read-only, and the message; "warning" if the stage succeeds nevertheless.
READ_ONLY = [
    ("fetch", "data/fashion-mnist", f"error: cannot write data/fashion-mnist/train.safetensors: {DENIED}"),
    ("evaluate", ".dvc/cache", rf"ERROR: failed to reproduce 'evaluate': .*{DENIED}"),
]
MORE_READ_ONLY = [
    ("train", ".dvc/tmp", f"warning: no checkpoint .*{DENIED}"),
    ("evaluate", "mlflow.db", "warning: MLflow cannot use .*readonly database"),
    ("train", "models", f"error: cannot write models/lenet.safetensors: {DENIED}"),
    ("train", "metrics", f"error: cannot write metrics/history.csv: {DENIED}"),
    ("evaluate", "metrics/plots", f"error: cannot write metrics/plots/confusion.png: {DENIED}"),
    ("evaluate", "mlartifacts", f"warning: MLflow cannot use .*{DENIED}"),
]


def test_a_read_only_folder_is_named_and_a_retry_makes_the_same_bytes(
    project: Project,
    finished_project: Project,
    bound_by_permissions: list[str],
    stress: bool,
    record_property: Record,
) -> None:
    faults = READ_ONLY + (MORE_READ_ONLY if stress else [])
    pipeline = Pipeline(project.folder)
    for stage, name, expected in faults:
        for path in pipeline.outs(stage):
            (project.folder / path).unlink(missing_ok=True)
        place = project.folder / name
        places = [place, *(inner for inner in place.rglob("*") if inner.is_dir())]
        modes = {inner: stat.S_IMODE(inner.stat().st_mode) for inner in places}
        for inner, mode in modes.items():
            inner.chmod(mode & 0o555)
        command = ["dvc", "repro", "--force", "--single-item", stage]
        result = project.run(*bound_by_permissions, *command, check=False)
        for inner, mode in modes.items():
            inner.chmod(mode)
        print(name, result.stdout, result.stderr)
        assert re.search(expected, result.stderr), result.stderr
        assert (result.returncode == 0) == expected.startswith("warning")
        assert "Traceback" not in result.stderr
        assert is_whole(project, finished_project)
        project.dvc("checkout", stage)
    project.repro()
    assert is_right(project, finished_project)
    record_property("faults injected", len(faults))


# A clock that jumps


@pytest.fixture
def jumping_clock(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables that make a program's clock jump by hours, forward and backward, all the time."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        pytest.skip("libfaketime is not installed (Debian: apt-get install faketime)")
    offset, done = tmp_path / "offset", threading.Event()
    offset.write_text("+0")

    def jump() -> None:
        for hours in itertools.cycle((5, -3, 0, -24, 1)):
            if done.wait(0.02):
                return
            (tmp_path / "next").write_text(f"{hours:+d}h")
            (tmp_path / "next").replace(offset)

    # libfaketime's own sleep fails if it leaves the monotonic clock alone, as a real jump does.
    (tmp_path / "sitecustomize.py").write_text(
        "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
    )
    thread = threading.Thread(target=jump)
    thread.start()
    yield {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
        "PYTHONPATH": str(tmp_path),
    }
    done.set()
    thread.join()


def test_a_clock_that_jumps_changes_no_byte_and_no_record(
    project: Project,
    finished_project: Project,
    jumping_clock: dict[str, str],
    stress: bool,
    record_property: Record,
) -> None:
    times = 3 if stress else 1
    for _ in range(times):
        command = ["dvc", "repro", "--force", *([] if stress else ["--single-item", "train"])]
        result = project.run(*command, check=True, warns=False, **jumping_clock)
        assert not result.stderr
        assert is_right(project, finished_project)
    project.command("sync")
    assert audit(project) == ["dvc.yaml, the params, dvc.lock, the files and MLflow agree"]
    store = Store(project)
    runs = [run for stage in STAGES for run in store.runs(stage)]
    assert len(store.runs("train")) == 1, "one execution has one run"
    given_up = store.client.search_runs([store.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert len([run for run in given_up if run.data.tags["stage"] == "train"]) == times
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.info.end_time >= run.info.start_time for run in (*runs, *given_up))
    record_property("faults injected", times)


@pytest.mark.skipif(not psutil.LINUX, reason="Linux's /proc tells the time of the boot, which moves with the clock")
def test_a_clock_that_jumps_does_not_make_a_live_process_look_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, created = process_tags(os.getpid()), psutil.Process().create_time()
    (tmp_path / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
    boot = re.sub("(?<=btime )[0-9]+", lambda time: str(int(time[0]) + 3600), Path("/proc/stat").read_text())
    (tmp_path / "stat").write_text(boot)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert psutil.Process().create_time() == pytest.approx(created + 3600)
    assert process_tags(os.getpid()) == before


def test_runs_from_a_clock_that_was_an_hour_ahead_end_after_their_start(project: Project) -> None:
    store = Store(project)
    ahead = int(time.time() * 1000) + 3_600_000

    def begin(stage: str, **changes: str) -> str:
        tags = store.run(stage).data.tags | changes
        return store.client.create_run(store.experiment_id, start_time=ahead, tags=tags).info.run_id

    evaluation = begin("evaluate", **{"mlflow.parentRunId": store.run("fetch").info.run_id})
    store.client.set_terminated(evaluation, "FINISHED", ahead)
    dead = begin("train", **{"process.created": "1.00", "dvc.fingerprint": "another"})
    lines = project.command("sync").stdout.splitlines()
    recorded = [f"{stage}: recorded before" for stage in STAGES]
    assert lines == [f"closed run {dead}, whose process is gone", *recorded]
    assert store.client.get_run(dead).info.end_time == ahead


# Bytes that rot in DVC's cache


def cached(project: Project, path: str) -> Path:
    digest = project.md5s()[path]
    return project.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    return b""


DAMAGES = (flip, truncate, empty)


def damage(file: Path, how: Callable[[bytes], bytes]) -> None:
    """Damage a file in the cache, which stays read-only, so that DVC takes it for whole."""
    content = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(how(content))
    file.chmod(0o444)


def follow(project: Project, line: str) -> None:
    """Run the commands that a line names in backticks."""
    for command in re.findall("`(.*?)`", line):
        project.run("sh", "-c", command)


def test_damage_in_the_cache_is_named_with_commands_that_repair_it(
    project: Project,
    finished_project: Project,
    monkeypatch: pytest.MonkeyPatch,
    stress: bool,
    record_property: Record,
) -> None:
    monkeypatch.chdir(project.folder)
    hows, paths = DAMAGES if stress else (flip,), list(project.md5s())
    for how in hows:
        for path in paths:
            damage(cached(project, path), how)
        lines = list(audit_files(DVCProject(project.folder)))
        assert lines == [f"{path}: DVC's copy is damaged; `rm -f {cached(project, path)}`" for path in paths]
        # DVC does not read what it takes from its cache, so it puts the damaged model into the workspace.
        (project.folder / "models/lenet.safetensors").unlink()
        project.set("evaluate.batch_size", 50)
        result = project.dvc("repro", check=False)
        project.set("evaluate.batch_size", 1000)
        assert result.returncode != 0
        assert "Traceback" not in result.stderr
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert "models/lenet.safetensors: expected MD5 " in error
        for line in [*lines, error]:
            follow(project, line)
        assert is_right(project, finished_project)
        if stress:
            project.dvc("commit", "--force")  # into the cache, for the next damage
    record_property("faults injected", len(hows) * len(paths))


def test_a_failed_stage_restores_whole_outs_only(
    project: Project, finished_project: Project, record_property: Record
) -> None:
    stage = Pipeline(project.folder).stages["train"]
    outs = Pipeline(project.folder).outs("train")
    for path, how in zip(outs, DAMAGES, strict=False):
        damage(cached(project, path), how)
    for path in outs:
        (project.folder / path).unlink()
    project.set("train.batch_size", 10_000)
    result = project.run(*stage["cmd"].split(), check=False, DVC_STAGE="train")  # as DVC runs it
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("error: train.batch_size: ")]
    assert lines == [
        f"{path} was not restored: DVC's copy is damaged; `rm -f {cached(project, path)}`" for path in outs[:3]
    ]
    assert is_whole(project, finished_project)
    assert [path for path in outs if (project.folder / path).exists()] == outs[3:]
    record_property("faults injected", len(DAMAGES))


# Two at once


def test_a_second_repro_at_once_is_refused_and_harms_nothing(
    project: Project, finished_project: Project, record_property: Record
) -> None:
    results: list[subprocess.CompletedProcess[str]] = []

    def repro() -> None:
        results.append(project.dvc("repro", "--force", "--single-item", "fetch", check=False))

    threads = [threading.Thread(target=repro) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        print(result.returncode, result.stdout, result.stderr)
    assert 0 in [result.returncode for result in results]
    for result in results:
        assert "Traceback" not in result.stderr
        assert result.returncode == 0 or "ERROR: " in result.stderr
    assert project.repro() == []
    assert is_right(project, finished_project)
    record_property("faults injected", 1)


def test_trainings_at_once_on_one_new_store_are_all_recorded(
    finished_project: Project, tmp_path: Path, stress: bool, record_property: Record
) -> None:
    count = 4 if stress else 2
    projects = [copy(finished_project, tmp_path / str(number)) for number in range(count)]
    uri = f"sqlite:///{tmp_path / '0/project/mlflow.db'}"
    (tmp_path / "0/project/mlflow.db").unlink()
    results: list[subprocess.CompletedProcess[str]] = []

    def train(project: Project) -> None:
        command = load_yaml(project.folder / "dvc.yaml")["stages"]["train"]["cmd"].split()
        results.append(project.run(*command, DVC_STAGE="train", MLFLOW_TRACKING_URI=uri))

    for number, project in enumerate(projects):
        project.set("train.seed", number)
    threads = [threading.Thread(target=train, args=[project]) for project in projects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.stderr for result in results] == [""] * count
    store = Store(projects[0])
    runs = {run.data.params["train.seed"]: run for run in store.runs("train") if "restored" not in run.data.tags}
    assert sorted(runs) == [str(number) for number in range(count)]
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert len(store.curve(run, "train_loss")) == 3
        assert run.outputs
        assert len(run.outputs.model_outputs) == 1
    record_property("faults injected", count)


# Files with merge conflicts


def merge(text: str, key: str) -> str:
    """The text with git's conflict markers around the first line that has the key."""
    before, line, after = re.split(rf"(.*{key}.*\n)", text, maxsplit=1)
    return f"{before}<<<<<<< HEAD\n{line}=======\n{line}>>>>>>> other\n{after}"


MERGES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "dvc.lock with a conflict": ("dvc.lock", lambda text: merge(text, "md5:"), "line 11: could not find expected ':'"),
    "dvc.lock empty": ("dvc.lock", lambda _: "", "validation failed"),
    "dvc.lock cut": ("dvc.lock", lambda text: text[:31], "validation failed"),
    "dvc.lock a list": ("dvc.lock", lambda _: "stages: []", "validation failed"),
    "dvc.lock of nothing": ("dvc.lock", lambda _: "stages:\n  train:\n", "validation failed"),
    "dvc.lock binary": ("dvc.lock", lambda _: "\0", "YAML file structure is corrupted"),
    "dvc.yaml with a conflict": ("dvc.yaml", lambda text: merge(text, "desc:"), "line 4: could not find expected ':'"),
    "dvc.yaml a list": ("dvc.yaml", lambda _: "stages: []", "validation failed"),
}
CURES = {
    "dvc.lock": "; remove it, and `dvc repro` recreates it",
    "dvc.yaml": "; `git checkout` restores it",
}


@pytest.mark.parametrize(("name", "change", "expected"), MERGES.values(), ids=MERGES.keys())
def test_a_file_with_a_merge_conflict_is_named_with_its_cure(
    name: str, change: Callable[[str], str], expected: str, finished_project: Project, tmp_path: Path
) -> None:
    for file in CURES:
        text = (finished_project.folder / file).read_text()
        (tmp_path / file).write_text(change(text) if file == name else text)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    opened = DVCProject(tmp_path)
    with pytest.raises(UserError) as raised:
        list(opened.stages)
    assert name in str(raised.value)
    assert expected in str(raised.value)
    assert str(raised.value).endswith(CURES[name])


def test_audit_sync_and_the_recorder_name_a_merge_conflict_and_a_cure_that_works(
    project: Project, finished_project: Project, record_property: Record
) -> None:
    lock = project.folder / "dvc.lock"
    text = lock.read_text()
    lock.write_text(merge(text, "md5:"))
    told = (
        "DVC cannot read the pipeline: unable to read: 'dvc.lock', YAML file structure is corrupted "
        f"(line 11: could not find expected ':'){CURES['dvc.lock']}"
    )
    for command in ("audit", "sync"):
        result = project.command(command, check=False)
        assert (result.returncode, result.stderr) == (1, f"error: {told}\n")
    command = Pipeline(finished_project.folder).stages["fetch"]["cmd"].split()
    result = project.run(*command, warns=True, DVC_STAGE="fetch")
    assert result.stderr == f"warning: {told}; `dvc-mlflow sync` records this later\n"
    result = project.dvc("repro", check=False)
    assert result.returncode != 0
    assert "'./dvc.lock' is invalid (possible merge conflicts)." in result.stderr
    lock.unlink()
    assert project.repro() == [], "all comes from DVC's run cache"
    assert is_right(project, finished_project)
    assert lock.read_text() == text
    record_property("faults injected", 1 + len(MERGES))


def test_params_with_a_merge_conflict_are_named_and_nothing_is_lost(
    project: Project, finished_project: Project, record_property: Record
) -> None:
    params = project.folder / "params.yaml"
    params.write_text(merge(params.read_text(), "lr:"))
    with pytest.raises(StageError, match=r"params.yaml is not YAML: line [0-9]+, column"):
        read_params(params)
    result = project.dvc("repro", check=False)
    assert result.returncode != 0
    assert "'params.yaml', YAML file structure is corrupted" in result.stderr
    assert is_right(project, finished_project)
    record_property("faults injected", 1)
