"""Commands in an environment without the user's settings."""

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from support import forked


@functools.cache
def home() -> tempfile.TemporaryDirectory[str]:
    """A home folder with an identity for git, and a DVC that reports nothing to its makers, and nothing else."""
    folder = tempfile.TemporaryDirectory(prefix="home-")
    Path(folder.name, ".gitconfig").write_text("[user]\nname = Test\nemail = test@example.org\n")
    Path(folder.name, "config").write_text("[core]\nanalytics = false\ncheck_update = false\n")
    return folder


def environment() -> dict[str, str]:
    """The environment without the settings of the user, of this project and of a make that runs the tests."""
    foreign = re.compile("MLFLOW_|DVC_|RAY_|FASHION_|GIT_|XDG_|MAKE|MFLAGS")
    clean = {key: value for key, value in os.environ.items() if not foreign.match(key)}
    path = f"{Path(sys.executable).parent}:{clean['PATH']}"
    return clean | {
        "PATH": path,
        "HOME": home().name,
        "DVC_GLOBAL_CONFIG_DIR": home().name,
        "DVC_SYSTEM_CONFIG_DIR": home().name,
        "DVC_SITE_CACHE_DIR": f"{home().name}/dvc",  # else a folder of the whole machine
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # these jobs are for GenAI
    }


def execute(command: Sequence[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder; DVC and `dvc-mlflow` in a fork: see forked.py."""
    module = {"dvc": "dvc", "dvc-mlflow": "dvc_mlflow"}.get(command[0])
    if module and command[1] != "run":
        return forked.run_module(module, command[1:], folder, env)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
