"""Runs a module like `python -m`, in a fork of a process that has already imported the libraries.

The tests run hundreds of commands, and importing MLflow and PyTorch takes most of a command's time.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LIBRARIES = [
    "torch",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
    "dvc.api",
    "dvc.repo",
    "optuna",
    "pandas",
    "scipy.stats",
]

# The fork server imports nothing of the project: each child does, from the folder in which it runs.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(LIBRARIES)


def run_module(
    module: str, arguments: Sequence[str], folder: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in the folder, with exactly this environment and no input.

    The folder's own module is used, if it has one, else this project's.
    """
    with tempfile.TemporaryDirectory() as outputs:
        files = [f"{outputs}/stdout", f"{outputs}/stderr"]
        process = context.Process(target=_become, args=(module, arguments, folder, env, files))
        process.start()
        process.join()
        stdout, stderr = (Path(file).read_text() for file in files)
    assert process.exitcode is not None
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, stdout, stderr)


def _become(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    env: dict[str, str],
    files: Sequence[str],
) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # as the environment has it
    tests = Path(__file__).parent.parent
    libraries = [path for path in sys.path if Path(path) not in (tests, tests.parent)]
    sys.path = [str(folder), *libraries, str(tests.parent)]  # the last has the package dvc_mlflow, as if installed
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as Python does, and multiprocessing does not: it removes temporary folders
