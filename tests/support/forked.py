"""Runs a module like `python -m`, in a fork of a process that has already imported the libraries.

The tests run hundreds of commands and recorders, and importing MLflow and PyTorch takes most of the time of each.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

SUPPORT = Path(__file__).parent
LIBRARIES = [  # none that reads the environment when it is imported, as pygit2 reads HOME
    "torch",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
    "opentelemetry.sdk.trace",
    "dvc.api",
    "dvc.cli.parser",
    "dvc.repo.experiments.queue.celery",
    "dvc.repo.experiments.show",
    "dvc_render",
    "filelock",
    "hydra.core.override_parser.overrides_parser",
    "networkx",
    "rich.table",
    "ruamel.yaml",
    "optuna",
    "pandas",
    "scipy.stats",
    "sklearn.ensemble",
]


def run_module(
    module: str, arguments: Sequence[str], folder: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in the folder, with exactly this environment and no input.

    The folder's own module is used, if it has one, else this project's. The recorders of the stages that it runs are
    forks, too, unless the environment changes what a new process of Python does.
    """
    if not {"PYTHONPATH", "LD_PRELOAD"} & {*env}:
        env = {**env, "PATH": f"{SUPPORT / 'bin'}:{env['PATH']}", "FORKS": address()}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr, Path(os.devnull).open() as stdin:
        files = [file.fileno() for file in (stdin, stdout, stderr)]
        code = run(address(), module, arguments, str(folder), env, files)
        texts = [os.pread(file, os.fstat(file).st_size, 0).decode() for file in files[1:]]
    return subprocess.CompletedProcess([module, *arguments], code, *texts)


def run(
    server: str, module: str, arguments: Sequence[str], folder: str, env: Mapping[str, str], files: Sequence[int]
) -> int:
    """Have the server at this address run the module on these three standard files; return its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        socket.send_fds(connection, [b"\n"], files)
        connection.sendall(json.dumps([module, arguments, folder, dict(env)]).encode())
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(16))


def address() -> str:
    """The address of this process's server, which ends when this process does."""
    return _start()[0]


@functools.cache
def _start() -> tuple[str, tempfile.TemporaryDirectory[str], subprocess.Popen[bytes]]:
    folder = tempfile.TemporaryDirectory(prefix="forks-")
    name = f"{folder.name}/socket"
    command = [sys.executable, "-P", __file__, name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    assert process.stdout.read(1), "the server of forks did not start"
    return name, folder, process


def serve(name: str) -> None:
    """Import the libraries, and serve until standard input ends. Each child imports what the project has."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    waiting: dict[int, socket.socket] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the end of a child writes to the pipe
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        os.write(1, b"\n")
        while 0 not in (ready := select.select([server.fileno(), woken, 0], [], [])[0]):
            if server.fileno() in ready:
                connection, _ = server.accept()
                pid = os.fork()
                if not pid:
                    server.close()
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _become(connection)
                waiting[pid] = connection
            if woken in ready:
                os.read(woken, 4096)
                while waiting and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    with waiting.pop(ended[0]) as connection, contextlib.suppress(BrokenPipeError):
                        connection.sendall(str(os.waitstatus_to_exitcode(ended[1])).encode())


def _become(connection: socket.socket) -> NoReturn:
    """Run the module that the other end of the connection asks for."""
    with connection:
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        request = b"".join(iter(lambda: connection.recv(65536), b""))
    module, arguments, folder, env = json.loads(request)
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # as the environment has it
    sys.path = [folder, *sys.path, str(SUPPORT.parent.parent)]  # the last has the package dvc_mlflow, as if installed
    sys.argv = [module, *arguments]
    code: object = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]  # as Python does at its end, but for the modules' destruction
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
