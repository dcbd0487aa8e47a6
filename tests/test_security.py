"""The promises of SECURITY.md: nothing that is read or downloaded can run, and no secret or port is exposed."""

import ast
import base64
import contextlib
import gzip
import io
import os
import pickle
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from dvc.utils.serialize import modify_yaml
from PIL import Image
from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError
from support.project import ROOT, STAGES, Pipeline, Project, ran
from support.servers import Served
from support.store import Store

from benchmarks.servers import free_port
from dvc_mlflow.text import without_credentials
from stages import fetch
from stages.params import File, read_params
from stages.stage import StageError, hide_credentials

TRAIN_SET, TEST_SET, MODEL = (
    "data/fashion-mnist/train.safetensors",
    "data/fashion-mnist/test.safetensors",
    "models/lenet.safetensors",
)
PARAMS_FILES = {key: file.model_dump() for key, file in read_params(ROOT / "params.yaml").fetch.files}


class Plant:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that exists only if a planted pickle was loaded."""
    path = tmp_path / "loaded"
    yield path
    assert not path.exists(), "a pickle was loaded"


@pytest.fixture
def plant(marker: Path) -> bytes:
    content = pickle.dumps(Plant(marker))
    pickle.loads(content).close()
    assert marker.exists(), "the plant works"
    marker.unlink()
    return content


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line in which a failed command gives the reason."""
    assert result.returncode == 1, result
    assert "Traceback" not in result.stdout + result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


# No pickle is ever loaded


def test_stages_refuse_pickles_in_one_line(project: Project, plant: bytes) -> None:
    stages = Pipeline(project.folder).stages
    for stage in ("train", "evaluate"):
        name = Pipeline(project.folder).command(stage)[3]  # its first input
        (project.folder / name).write_bytes(plant)
        failed = project.run(*stages[stage]["cmd"].split(), check=False)
        assert f"{name} is not a data set that fetch wrote" in refusal(failed)


def test_a_checkpoint_that_is_a_pickle_is_ignored_with_a_line(project: Project, plant: bytes) -> None:
    command = Pipeline(project.folder).stages["train"]["cmd"].split()
    nowhere = [
        word.replace(MODEL, f"{MODEL}/x") for word in command
    ]  # a file is in the way, so the training ends too early
    assert "cannot write" in refusal(project.run(*nowhere, check=False))
    (checkpoint,) = (project.folder / ".dvc/tmp/checkpoints").iterdir()
    checkpoint.write_bytes(plant)
    result = project.run(*command, warns=True)
    assert f"{checkpoint.relative_to(project.folder)} is ignored: " in result.stderr
    assert "epoch 1/" in result.stdout, "it starts again"


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gzipped"])
def test_fetch_refuses_pickles_and_goes_on_to_the_next_source(
    pack: Callable[[bytes], bytes],
    new_project: Project,
    plant: bytes,
    mirror: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in PARAMS_FILES.values():
        (tmp_path / file["name"]).write_bytes(pack(plant))
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    monkeypatch.setattr(fetch, "DEBIAN_DIR", tmp_path / "nowhere")
    fetch.fetch(read_params(new_project.folder / "params.yaml").fetch)
    said = capsys.readouterr()
    assert said.out == f"fetched from {mirror}\n"
    (line,) = said.err.splitlines()
    assert re.match(r"not from FASHION_MNIST_DIR .*(is not a gzip file|expected .* bytes unpacked)", line)


def test_commands_refuse_or_ignore_pickles(project: Project, plant: bytes, tmp_path: Path) -> None:
    store, outs = Store(project), Pipeline(project.folder).outs("evaluate")
    train, evaluate = store.run("train"), store.run("evaluate")
    artifacts = project.folder / "mlartifacts" / evaluate.info.run_id / "artifacts"
    (artifacts / "metrics/predictions.parquet").write_bytes(plant)
    assert train.outputs
    (model,) = train.outputs.model_outputs
    (weights,) = (project.folder / "mlartifacts/models" / model.model_id).rglob("*.safetensors")
    weights.write_bytes(plant)
    Image.new("L", (28, 28)).save(tmp_path / "image.png")
    for name in (TRAIN_SET, TEST_SET, MODEL, *(out for out in outs if not out.endswith(".png"))):
        (project.folder / name).write_bytes(plant)
    predict = f"predict '{tmp_path}/image.png' --model"
    ends = project.commands(
        f"{predict} {MODEL}",
        f"{predict} models:/{model.model_id}",
        f"export '{tmp_path}/lenet.onnx'",
        "compare HEAD workspace",
        f"compare {train.info.run_id} {evaluate.info.run_id}",
        "audit",
        "sync",
        f"lineage {train.info.run_id}",
        f"lineage {MODEL}",
        f"promote {train.info.run_id}",
    )
    assert [end.returncode for end in ends.values()] == [1] * 5 + [1, 0, 0, 1, 0]
    refused = [place for place, end in enumerate(ends.values()) if end.stderr.startswith("error: ")]
    assert refused == [0, 1, 2, 3, 4, 8], "not audit, sync, the run's lineage and promote"
    assert f"{MODEL}: dvc.lock" in ends["audit"].stdout
    assert not (tmp_path / "lenet.onnx").exists()


def test_params_and_dvc_files_that_are_pickles_are_refused_in_one_line(project: Project, plant: bytes) -> None:
    (project.folder / "params.yaml").write_bytes(plant)
    assert "DVC cannot read the pipeline: unable to read: 'params.yaml'" in refusal(
        project.command("audit", check=False)
    )
    (project.folder / "dvc.yaml").write_bytes(plant)
    assert refusal(project.command("sync", check=False))
    project.run("git", "checkout", "-q", "params.yaml", "dvc.yaml")
    (project.folder / "dvc.lock").write_bytes(plant)
    failed = project.dvc("repro", check=False)
    assert failed.returncode != 0
    assert "dvc.lock" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ("mlflow.pyfunc.model", "expected a model that train made at"),
        ("mlflow.pyfunc.loaders.code_model", "Deserializing model using pickle is disallowed"),
    ],
)
def test_a_model_in_mlflow_that_is_a_pickle_is_refused(
    loader: str,
    reason: str,
    project: Project,
    plant: bytes,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = Store(project).run("train")
    assert train.outputs
    (model,) = train.outputs.model_outputs
    folder = project.folder / "mlartifacts/models" / model.model_id / "artifacts"
    with modify_yaml(folder / "MLmodel") as config:
        flavor = config["flavors"]["python_function"]
        del flavor["model_code_path"]
        flavor |= {"python_model": "python_model.pkl", "loader_module": loader}
    (folder / "python_model.pkl").write_bytes(plant)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    with pytest.raises(Exception):  # noqa: B017  the file object that it loads is no model
        mlflow.pyfunc.load_model(str(folder))
    assert marker.exists(), "MLflow alone loads it"
    marker.unlink()
    Image.new("L", (28, 28)).save(tmp_path / "image.png")
    ends = project.commands(
        f"predict --model models:/{model.model_id} '{tmp_path}/image.png'",
        f"promote {train.info.run_id}",
        f"predict --model models:/fashion-mnist-lenet@champion '{tmp_path}/image.png'",
        f"lineage {train.info.run_id}",
        MLFLOW_ALLOW_PICKLE_DESERIALIZATION="true",
    )
    for command, end in ends.items():
        if command.startswith("predict"):
            assert end.stderr.startswith("error: expected a model")
            assert reason in end.stderr
        else:
            assert end.returncode == 0


SOURCES = [
    path
    for folder in ("stages", "commands", "dvc_mlflow", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
]
# What can run what it reads
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
UNSAFE_CALLS = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "eval", "exec", "os.system", "os.popen"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_code_can_load_a_pickle_or_run_what_it_reads(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            names = {f"{module}.{alias.name}" for alias in node.names}
            assert module not in UNSAFE_MODULES
            assert not names & UNSAFE_CALLS
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in UNSAFE_CALLS
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("shell", "False") == "False"
            assert "allow_pickle" not in options
            if called == "YAML":
                assert options in ({"typ": "'safe'"}, {"typ": "'rt'"})  # neither makes objects: see the next test


@pytest.mark.parametrize("kind", ["safe", "rt"])
def test_yaml_that_asks_for_a_call_calls_nothing(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "called"
    with contextlib.suppress(YAMLError):
        YAML(typ=kind).load(f"a: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert not marker.exists()


@pytest.mark.parametrize("path", sorted((ROOT / "commands").glob("*.py")), ids=lambda path: path.stem)
def test_mlflow_gets_its_settings_before_it_is_imported(path: Path) -> None:
    """No module of commands/ imports MLflow at its top; a command that does so later has configured it by then.

    MLflow reports its use as soon as it is imported.
    """
    parts = {path.stem: path.read_text(encoding="utf-8")}
    for name in re.findall(r"^from commands\.(\w+) import", parts[path.stem], re.MULTILINE):
        parts[name] = (path.parent / f"{name}.py").read_text(encoding="utf-8")
    imports = re.compile(r"^( *)(?:import|from) (?:mlflow|dvc_mlflow\.(?:store|audit|ui|recorder))\b", re.MULTILINE)
    indents = [len(found[1]) for text in parts.values() for found in imports.finditer(_running(text))]
    assert 0 not in indents
    if indents and "__main__" in parts[path.stem]:
        assert re.search(r"\b(configure|open_project|open_store)\(", parts[path.stem])


def _running(text: str) -> str:
    """The code without what only a type checker reads."""
    tree = ast.parse(text)
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.unparse(tree)


# What is downloaded is verified, and stays in its folder


@pytest.mark.parametrize("name", ["..", "../x.gz", "/etc/passwd", "a/b", ".hidden", "a\\b", "a\n", "", "x y"])
def test_a_file_s_name_in_params_leads_nowhere_else(name: str) -> None:
    with pytest.raises(ValidationError):
        File(name=name, bytes=1, sha256="0" * 64)


def make_tar(members: Sequence[tuple[str, bytes, str | bytes]]) -> bytes:
    """A tar archive of members (name, type, content or target)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, 0o755
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.linkname = content
                archive.addfile(member)
    return stream.getvalue()


def make_deb(members: Sequence[tuple[str, bytes, str | bytes]]) -> bytes:
    """A Debian package of these members, which dpkg-deb itself would not build."""
    control = b"Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    package = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar", make_tar([("./control", tarfile.REGTYPE, control)])),
        ("data.tar", make_tar(members)),
    ):
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        package += b"\n" * (len(content) % 2)
    return package


IN_PACKAGE = f".{fetch.DEBIAN_DIR}"
LABELS = PARAMS_FILES["test_labels"]["name"]


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., fetch.DebianPackage]:
    """A function that returns the package with these members, as apt-get downloads it; `outside` is beside it."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "apt-get").write_text(f"#!/bin/sh\nfor last; do :; done\ncp '{tmp_path}/x.deb' . && echo $last\n")
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / LABELS).write_bytes(gzip.compress(b"not to be read"))
    (tmp_path / "apt").mkdir()

    def make(*members: tuple[str, bytes, str | bytes]) -> fetch.DebianPackage:
        (tmp_path / "x.deb").write_bytes(make_deb(members))
        return fetch.DebianPackage(tmp_path / "apt")

    return make


needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is Debian's")


@needs_dpkg
def test_a_debian_package_is_read(debian: Callable[..., fetch.DebianPackage]) -> None:
    package = debian((f"{IN_PACKAGE}/{LABELS}", tarfile.REGTYPE, b"content"))
    assert package.read(File(**PARAMS_FILES["test_labels"])) == b"content"


@needs_dpkg
@pytest.mark.parametrize(
    "members",
    [
        [(f"{IN_PACKAGE}/{LABELS}", tarfile.SYMTYPE, "{outside}/" + LABELS)],
        [(IN_PACKAGE, tarfile.SYMTYPE, "{outside}")],
        [(f"{IN_PACKAGE}/{LABELS}", tarfile.FIFOTYPE, "")],
        [(f"{IN_PACKAGE}/{LABELS}", tarfile.DIRTYPE, "")],
        [(f"{IN_PACKAGE}/{LABELS}", tarfile.LNKTYPE, "{outside}/" + LABELS)],
        [("./usr", tarfile.SYMTYPE, "{outside}"), ("./usr/written", tarfile.REGTYPE, b"x")],
        [("./../../written", tarfile.REGTYPE, b"x"), (f"{IN_PACKAGE}/{LABELS}", tarfile.REGTYPE, b"ordinary")],
        [("{outside}/written", tarfile.REGTYPE, b"x")],
    ],
    ids=["link", "folder link", "pipe", "folder", "hard link", "write through a link", "write above", "write absolute"],
)
def test_a_debian_package_reads_and_writes_nothing_outside_its_folder(
    members: Sequence[tuple[str, bytes, str | bytes]], debian: Callable[..., fetch.DebianPackage], tmp_path: Path
) -> None:
    def place(text: str | bytes) -> Any:
        return text.replace("{outside}", str(tmp_path / "outside")) if isinstance(text, str) else text

    before = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "apt"))
    package = debian(*[(place(name), kind, place(content)) for name, kind, content in members])
    for _ in range(2):  # what a failure leaves behind is not read either
        try:
            assert package.read(File(**PARAMS_FILES["test_labels"])) == b"ordinary"
        except StageError as error:
            assert re.search("regular file|dpkg-deb failed", str(error))
    after = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "apt"))
    assert after == sorted([*before, tmp_path / "x.deb"])


def test_every_line_of_the_lock_is_a_version_with_hashes() -> None:
    lock = re.sub(r"\\\n", " ", (ROOT / "requirements.txt").read_text())
    lines = [line for line in lock.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) > 100
    for line in lines:
        assert re.fullmatch(
            r"[a-z0-9._-]+(\[[a-z,-]+\])?==[^\s;]+( ; [^#]+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*", line
        ), line
    assert (ROOT / "Makefile").read_text().count("--require-hashes") == 2, "pip's and uv's installation check them"


# No secret reaches a record or the terminal

SECRET = "geheim" + "0f4b62c5"  # in two parts, so that this file, which is in the project, does not contain it
BASIC = base64.b64encode(f"user:{SECRET}".encode())
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "MLFLOW_TRACKING_USERNAME": "user",
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "DATABASE_URL": f"postgresql://user:{SECRET}@127.0.0.1/db",
    "HTTP_PROXY": f"http://user:{SECRET}@127.0.0.1:1",
    "HTTPS_PROXY": f"http://user:{SECRET}@127.0.0.1:1",
    "NO_PROXY": "127.0.0.1",
}


def leaks(folder: Path, *outputs: str) -> list[str]:
    """The files in a folder, and the outputs, that contain the secret, as text or as HTTP's Basic scheme sends it."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    texts = files | {output: output.encode() for output in outputs}
    return [name for name, content in texts.items() if SECRET.encode() in content or BASIC in content]


def test_no_secret_of_the_environment_is_recorded_or_shown(new_project: Project, mirror: str, tmp_path: Path) -> None:
    project = new_project
    project.set("fetch.mirrors", ["http://mirror.invalid/", mirror])
    good = project.dvc("repro", check=True, warns=False, **SECRETS)
    assert "Unable to connect to proxy" in good.stderr, "the proxy is asked, and its failure reported"
    assert ran(good.stdout) == [*STAGES]
    Image.new("L", (28, 28)).save(tmp_path / "image.png")
    run_id = Store(project).runs("train")[-1].info.run_id
    commands = ["audit", "sync", "promote", f"lineage {run_id}", f"compare {run_id} {run_id}"]
    commands.append(f"predict --model models:/fashion-mnist-lenet@champion '{tmp_path}/image.png'")
    here = project.commands(*commands, **SECRETS)
    assert here[f"lineage {run_id}"].returncode == 0
    project.set("train.batch_size", 10**6)
    command = Pipeline(project.folder).stages["train"]["cmd"].split()
    address = f"http://user:{SECRET}@127.0.0.1:{free_port()}"
    by_dvc = {"DVC_STAGE": "train", "MLFLOW_TRACKING_URI": address}
    bad = project.run(*command, check=False, warns=False, **SECRETS | by_dvc)
    assert "error: train.batch_size" in bad.stderr
    assert "warning: MLflow cannot use http://…@127.0.0.1" in bad.stderr
    outputs = [good.stdout, good.stderr, bad.stdout, bad.stderr]
    assert leaks(project.folder, *outputs, *map(str, here.values())) == []


@pytest.mark.parametrize(
    "address",
    [
        f"http://user:{SECRET}@127.0.0.1:1",
        f"http://user:@{SECRET}@127.0.0.1:1",
        f"http://user:{SECRET}/x@127.0.0.1:1",
        f"http://user:{SECRET}@127.0.0.1:x",
        f"http://user:{SECRET}@",
        f"user:{SECRET}@127.0.0.1:1",
        f"socks5://user:{SECRET}@127.0.0.1:1",
    ],
)
def test_no_address_of_a_proxy_shows_its_password(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", address)
    monkeypatch.setenv("http_proxy", address)
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setattr(fetch, "DEBIAN_DIR", Path("/nowhere"))
    monkeypatch.setattr(shutil, "which", lambda _: None)  # no apt-get
    params = read_params(ROOT / "params.yaml").fetch.model_copy(update={"mirrors": ["http://mirror.invalid/"]})
    with pytest.raises(StageError) as raised:
        fetch.fetch(params)
    assert "mirror.invalid" in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"cannot use https://user:{SECRET}@host/path (refused)", "cannot use https://…@host/path (refused)"),
        (f"postgresql://user:{SECRET}@/x@host/db", "postgresql://…@host/db"),
        (f"Failed to parse: 'user:{SECRET}' is not a valid host or port", "Failed to parse: no valid host or port"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("file:///home/me@work", "file:///home/me@work"),
        ("http://host/path", "http://host/path"),
    ],
)
def test_credentials_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert hide_credentials(text) == shown
    assert without_credentials(text) == shown


def test_a_mirror_with_a_password_is_refused(new_project: Project) -> None:
    new_project.set("fetch.mirrors", [f"http://user:{SECRET}@127.0.0.1/"])
    with pytest.raises(StageError, match=r"fetch\.mirrors\.0"):
        read_params(new_project.folder / "params.yaml")


# What listens


def test_the_ui_listens_on_loopback_only(served: Served) -> None:
    make = psutil.Process(served.pid)
    sockets = [
        connection.laddr
        for process in (make, *make.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)  # NONE: UDP
    ]
    assert served.port in {address.port for address in sockets}
    assert {address.ip for address in sockets} <= {"127.0.0.1", "::1"}


def test_a_server_s_password_is_neither_recorded_nor_shown(served: Served, tmp_path: Path) -> None:
    project, uri = served.project, f"http://user:{SECRET}@127.0.0.1:{served.port}"
    project.set("evaluate.batch_size", 50)
    result = project.dvc("repro", MLFLOW_TRACKING_URI=uri)
    assert ran(result.stdout) == ["evaluate"]
    assert "warning" not in result.stderr
    run = Store(project).runs("evaluate")[0]
    assert run.data.tags["git.dirty"] == "true"
    restore = f"lineage {run.info.run_id} --restore '{tmp_path}/again'"
    ends = project.commands("audit", "sync", restore, MLFLOW_TRACKING_URI=uri)
    assert {end.returncode for end in ends.values()} == {0}, ends[restore].stderr
    assert "verified " in ends[restore].stdout
    assert leaks(project.folder, result.stdout, result.stderr, *map(str, ends.values())) == []
