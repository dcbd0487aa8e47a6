"""Measure what a trial of a sweep costs each part: python -m benchmarks.sweep 10 100; or --here 10 100 1000.

Prints a table with a column for each number of trials. Everything is real, on this machine: two Ray nodes with one CPU
each, which clone a bare git repository, or with --here two jobs at a time; SeaweedFS as S3 remote; MLflow's server on
PostgreSQL (Debian: apt-get install postgresql). The pipeline's one stage does nothing, so that what remains is the
sweep's own cost. Counts do not depend on the machine; seconds do, and are right only if nothing else runs. On two
cores, a trial on the nodes takes some 2 to 4 s, one here some 1 to 2 s.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import sqlalchemy
from s3fs import S3FileSystem
from tqdm import tqdm

from benchmarks.servers import QUIET, S3, MLflow, postgres, ray_cluster

ROOT = Path(__file__).parent.parent
FILES = {
    "params.yaml": "x: 0\n",
    "dvc.yaml": """\
stages:
  nothing:
    cmd: printf '{"score":%s}' ${x} > metrics.json
    params: [x]
    metrics: [metrics.json]
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=int, nargs="+", metavar="N", help="numbers of trials, a sweep each")
    parser.add_argument("--here", action="store_true", help="run trials in the project itself, without nodes")
    args = parser.parse_args()
    columns = [measure(trials, args.here) for trials in args.trials]
    print(f"| a trial costs | {' | '.join(f'at {trials:,}' for trials in args.trials)} |")
    print("|---" * (len(columns) + 1) + "|")
    for what in columns[0]:
        print(f"| {what} | {' | '.join(f'{column[what]:,.4g}' for column in columns)} |")


def measure(trials: int, here: bool) -> dict[str, float]:
    """Run a sweep with servers of its own. Return what one trial took, by what it is."""
    with contextlib.ExitStack() as ends:
        create = ends.enter_context(postgres("shared_preload_libraries=pg_stat_statements"))
        # Ray's processes may still write when the folder is removed.
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="sweep-", ignore_cleanup_errors=True)))
        for part in ("project", "s3", "mlflow", "ray"):
            (folder / part).mkdir()
        os.environ.update(QUIET | {"MLFLOW_DISABLE_TELEMETRY": "true", "TMPDIR": str(folder / "ray")})
        s3 = S3(folder / "s3", os.environ)
        ends.callback(s3.stop)
        os.environ.update(s3.env)
        place = ["--jobs", "2"] if here else ["--ray", ends.enter_context(ray_cluster(2)).address]
        database = create("mlflow")
        query(database, "CREATE EXTENSION pg_stat_statements")
        server = MLflow(folder / "mlflow", database, os.environ)
        ends.callback(server.stop)
        make_project(folder / "project", folder / "bare.git", s3)
        before = gauge(folder, s3, server, database)
        took = sweep(folder / "project", trials, place, server.uri)
        after = gauge(folder, s3, server, database)
    return {what: (after[what] - before[what]) / trials for what in after} | took


def make_project(folder: Path, bare: Path, s3: S3) -> None:
    """A project of one stage, that has run, in a git repository with a git remote and a DVC remote."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for command in (
        "git init -q -b main",
        "git config user.name Sweep",
        "git config user.email sweep@example.org",
        "dvc init -q",
        "dvc remote add -d team s3://team/results",
        f"dvc remote modify team endpointurl {s3.uri}",
        "dvc repro -q",
        "git add -A",
        "git commit -qm Start",
        f"git init -q --bare {bare}",
        f"git remote add origin {bare}",
        "git push -q origin main",
        "dvc push -q",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, stdout=subprocess.DEVNULL)


def sweep(project: Path, trials: int, place: list[str], uri: str) -> dict[str, float]:
    """Run the sweep; return what of it a trial took."""
    command = [sys.executable, "-m", "commands.sweep", "--trials", str(trials), *place, "--json"]
    command += ["-S", "x=interval(0,1)", "--metric", "metrics.json:score", "--maximize"]
    env = os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)}
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with (
        (project.parent / "result.json").open("w") as file,
        subprocess.Popen(command, cwd=project, env=env, stdout=file) as driver,
        tqdm(total=trials, desc=f"{trials:,} trials", disable=None) as bar,
    ):
        while driver.poll() is None:
            bar.update(len(refs(project)) - bar.n)
            time.sleep(1)
    seconds, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads((project.parent / "result.json").read_text())
    if driver.returncode or [row["state"] for row in result["trials"]] != ["complete"] * trials:
        sys.exit(f"error: expected {trials:,} complete trials, found others; exit code {driver.returncode}")
    began = time.perf_counter()
    refs(project)
    return {
        "git: listing the experiments, s (one of three times)": time.perf_counter() - began,
        "Optuna's journal, bytes": (project / ".dvc/tmp/sweeps/sweep/journal").stat().st_size / trials,
        "the command, CPU s": (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / trials,
        "everything, wall s": seconds / trials,
    }


def gauge(folder: Path, s3: S3, server: MLflow, database: str) -> dict[str, float]:
    """What has been counted so far."""
    found: dict[str, float] = {"git: experiments": len(refs(folder / "project"))}
    files = S3FileSystem(key=s3.env["AWS_ACCESS_KEY_ID"], secret=s3.env["AWS_SECRET_ACCESS_KEY"], endpoint_url=s3.uri)
    objects = files.find("team/results", detail=True).values()
    found |= {"S3: objects": len(objects), "S3: bytes": sum(one["size"] for one in objects)}
    for kind in ("GET", "HEAD", "LIST", "PUT", "POST", "DELETE"):
        pattern = rf'^SeaweedFS_s3_request_total{{.*type="{kind}".*}} (\S+)'
        found[f"S3: {kind}"] = sum(map(float, re.findall(pattern, s3.metrics(), re.MULTILINE)))
    log = server.log.read_text()
    found["MLflow: HTTP requests"] = len(re.findall(r'"[A-Z]+ \S+ HTTP/', log))
    found["MLflow: rows"] = query(database, "SELECT count(*) FROM runs")
    found["MLflow: SQL statements"] = query(database, "SELECT sum(calls) FROM pg_stat_statements")
    found["MLflow: SQL, s"] = query(database, "SELECT sum(total_exec_time) / 1000 FROM pg_stat_statements")
    for name, process in (("MLflow's server", server.process), ("S3 server", s3.process)):
        found[f"{name}, CPU s"] = cpu_seconds(psutil.Process(process.pid))
    machine = psutil.cpu_times()
    found["everything, CPU s"] = machine.user + machine.nice + machine.system  # Ray's are nice
    return found


def cpu_seconds(process: psutil.Process) -> float:
    """What a process and all its children have taken, those that have ended included."""
    times = [process.cpu_times()]
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times.append(child.cpu_times())
    return sum(one.user + one.system + one.children_user + one.children_system for one in times)


def refs(folder: Path) -> list[str]:
    command = ["git", "for-each-ref", "refs/exps"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()


def query(database: str, statement: str) -> float:
    """Run a statement; return the first value of the first row, 0 if there is none."""
    engine = sqlalchemy.create_engine(database)
    with engine.begin() as connection:
        found = connection.execute(sqlalchemy.text(statement))
        value = found.scalar() if found.returns_rows else 0
    engine.dispose()
    return float(value or 0)


if __name__ == "__main__":
    main()
