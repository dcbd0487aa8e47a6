"""How a command starts: MLflow configured, the project and its store open, any failure in one line."""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvc_mlflow.project import Project
    from dvc_mlflow.store import Store

# A store that does not answer is abandoned after some 8 s; `dvc-mlflow sync` catches up.
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


def configure() -> None:
    """Configure MLflow, and import it: it reads some of its variables while it is imported.

    Also keeps log messages and warnings of libraries off standard error: a command's output is about the command.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # whatever the environment says
    os.environ.pop("MLFLOW_RUN_ID", None)  # it would override the intended run
    gc.disable()  # imports stay alive: scanning them for garbage would take a third of the time
    import dvc_mlflow.store  # noqa: F401

    gc.enable()
    gc.freeze()
    logging.captureWarnings(True)  # filters would not do: MLflow resets them
    for library in ("mlflow", "alembic", "urllib3", "dvc", "dvc_data", "dvc_objects", "py.warnings"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # errors are raised anyway


@contextlib.contextmanager
def open_project(expected: str = "") -> Iterator["Project"]:
    """The project of the current folder. An error in the block ends the process in one line, after `expected`.

    What the block prints is written at its end, so that a reader who left, as `| head` does, ends it without a line.
    """
    try:
        configure()
        from dvc_mlflow.project import Project

        yield Project(Path.cwd())
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain at exit, too
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the next call completes it", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # from DVC, the store or the user
        from dvc_mlflow.store import describe

        sys.exit(f"error: {expected and f'{expected}: '}{describe(error)}")


@contextlib.contextmanager
def open_store(expected: str = "") -> Iterator["Store"]:
    """The store of the project of the current folder, created if it is missing. Errors end as in `open_project`."""
    with open_project(expected) as project:
        from dvc_mlflow.store import Store

        yield Store(project)
