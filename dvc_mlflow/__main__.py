"""The command `dvc-mlflow`, also available as `python -m dvc_mlflow`."""

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DESCRIPTION = "Show in MLflow what DVC ran, skipped or restored, in any pipeline."
EXAMPLES = {
    "run": """\
Run a stage's command and record it live.

In dvc.yaml:

  cmd: dvc-mlflow run python train.py       the command receives all signals; its exit code is passed on
  cmd: dvc-mlflow run ./prepare.sh data     any language

Outside `dvc repro`, the command runs unrecorded. With TRACKING_STRICT=1, a stage that cannot be recorded fails.""",
    "sync": """\
Record the executions in dvc.lock, and in this commit's experiments, that have no run yet.

Also close the runs of this host's dead processes. Fails if something could not be recorded.

  dvc-mlflow sync                     after `dvc repro`, `dvc pull`, or an MLflow outage
  dvc-mlflow sync --all               all commits, branches, tags and experiments: a project's whole history
  dvc-mlflow sync --rev v1.0 my-exp   only these
  dvc-mlflow sync --all --fetch       also fetch metrics and plots that are neither in git nor in the cache
  dvc-mlflow sync --close-stale 24    also close runs that other hosts, such as lost CI runners, left a day ago""",
    "init": """\
Print, as a diff, what dvc.yaml could declare for better records.

It finds metrics that are plain outs, plots without x, and models and data without an artifact. No stage reruns for it.

  dvc-mlflow init            print the diff
  dvc-mlflow init --apply    write it
  dvc-mlflow init --live     also prefix each command with `dvc-mlflow run`: DVC reruns these stages""",
    "ui": """\
Serve the MLflow UI of this store on loopback, and print the address of a view.

The view shows the declared metrics and the params that vary, best run first. If MLFLOW_TRACKING_URI, or tracking_uri in
the section [tool.dvc-mlflow] of pyproject.toml, names a server, only the address is printed.

  dvc-mlflow ui                on http://127.0.0.1:5000
  dvc-mlflow ui --port 5001    on another port

The metric's name (accuracy, loss) decides whether high or low is best, unless a stage's `meta` does:
`meta: {maximize: accuracy}` or `meta: {minimize: cost}`.""",
    "audit": """\
Compare dvc.yaml, the params, dvc.lock, the files, DVC's cache and MLflow.

Prints one line for each disagreement; fails if there is one. Without a store, it says that MLflow was not checked.

  dvc-mlflow audit            what dvc.lock records
  dvc-mlflow audit --all      also every other run: can an execution have produced it?""",
    "lineage": """\
Trace a run back to its bytes, and bytes to their runs.

  dvc-mlflow lineage RUN_ID                     what a run read and made, its commit and command
  dvc-mlflow lineage RUN_ID --restore ../again  restore it in a new folder, and verify every hash
  dvc-mlflow lineage models/model.bin           the runs that made or read a file; an MD5 works too""",
}


def main() -> None:
    """Run the command line; a failure prints one line and exits non-zero."""
    if sys.argv[1:2] == ["run"] and len(sys.argv) > 2 and sys.argv[2] not in ("-h", "--help"):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it imports ends it without a traceback
        from dvc_mlflow.launcher import run

        run(sys.argv[3 if sys.argv[2] == "--" else 2 :])
    parser = argparse.ArgumentParser(prog="dvc-mlflow", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    of = {
        name: commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for name, text in EXAMPLES.items()
    }
    of["run"].add_argument("words", nargs="+", metavar="COMMAND", help="the command and its arguments")
    of["sync"].add_argument("--close-stale", type=float, metavar="HOURS", help="close other hosts' older runs")
    of["sync"].add_argument("--all", action="store_true", help="record all commits, branches, tags and experiments")
    of["sync"].add_argument("--rev", nargs="+", default=[], metavar="REV", help="record these commits or experiments")
    of["sync"].add_argument(
        "--fetch", action="store_true", help="with --all or --rev, fetch metrics and plots from the remote"
    )
    of["init"].add_argument("--apply", action="store_true", help="write the diff")
    of["init"].add_argument("--live", action="store_true", help="prefix commands with `dvc-mlflow run`")
    of["ui"].add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default: 5000)")
    of["audit"].add_argument("--all", action="store_true", help="check every finished run in the store")
    of["lineage"].add_argument("target", metavar="RUN_ID|FILE|MD5")
    of["lineage"].add_argument("--restore", type=Path, metavar="DIR", help="new folder to restore the run in")
    arguments = parser.parse_args()
    if arguments.command == "lineage" and arguments.restore and arguments.restore.exists():
        sys.exit(f"error: expected a new folder for --restore, found {arguments.restore}; name another")
    if arguments.command == "sync" and arguments.fetch and not (arguments.all or arguments.rev):
        sys.exit("error: expected --all or --rev with --fetch, found neither; add one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that it cleans up
    _do(arguments)


def _do(arguments: argparse.Namespace) -> None:
    from dvc_mlflow.command import open_project, open_store

    if arguments.command == "init":
        with open_project() as project:
            from dvc_mlflow.init import init

            for line in init(project, arguments.live, arguments.apply):
                print(line)
        return
    if arguments.command == "audit":
        with open_project() as project:
            failed = _audit(project, arguments.all)
        sys.exit(1 if failed else 0)
    failed = False
    with open_store() as store:
        if arguments.command == "sync":
            for line, failure in _sync(store, arguments):
                failed = failed or failure
                print(line, flush=True)
        elif arguments.command == "ui":
            from dvc_mlflow.ui import ui

            ui(store, arguments.port)
        else:
            from dvc_mlflow.lineage import lineage

            lineage(store, arguments.target, arguments.restore)
    if failed:
        sys.exit(1)


def _audit(project: Any, everything: bool) -> bool:
    """Print the disagreements; return whether there are any. Without a store, only the files are checked."""
    from dvc_mlflow.audit import audit_files, audit_store, notes
    from dvc_mlflow.store import NoStore, Store

    failed, checked = False, "dvc.yaml, the params, dvc.lock, the files and MLflow"
    for line in audit_files(project):
        failed = True
        print(line, flush=True)
    try:
        store = Store(project, create=False)
        for line in audit_store(store, everything):
            failed = True
            print(line, flush=True)
        for line in notes(store):
            print(f"note: {line}", flush=True)
    except NoStore as error:
        checked = "dvc.yaml, the params, dvc.lock and the files"
        print(f"note: MLflow was not checked: {error}", flush=True)
    if not failed:
        print(f"{checked} agree")
    return failed


def _sync(store: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    from dvc_mlflow.history import sync_history
    from dvc_mlflow.sync import close_left, sync

    yield from close_left(store, arguments.close_stale)
    if arguments.all or arguments.rev:
        yield from sync_history(store, arguments.rev, arguments.fetch)
    if not arguments.rev:
        yield from sync(store, brief=arguments.all)  # which has counted what was recorded before


if __name__ == "__main__":
    main()
