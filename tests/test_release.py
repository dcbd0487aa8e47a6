"""The package as others get it: a complete wheel, which records a pipeline if it is installed alone."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from support.commands import environment
from support.project import ROOT

import dvc_mlflow

PIPELINE = "stages:\n  one:\n    cmd: cat params.yaml > out\n    params: [n]\n    outs: [out]\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, as `python -m build` makes it."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "source").mkdir()
    for name in ("dvc_mlflow", "docs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")]
    subprocess.run(build, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_has_only_the_package_its_licence_and_the_typed_marker(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("METADATA"))).decode())
    sources = {f"dvc_mlflow/{path.name}" for path in (ROOT / "dvc_mlflow").iterdir() if path.is_file()}
    assert "dvc_mlflow/py.typed" in sources
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any(name.endswith("LICENSE") for name in names)
    assert metadata["Version"] == dvc_mlflow.__version__
    assert not [one for one in metadata.get_all("Requires-Dist") or [] if one.startswith("torch")]


def test_the_changelog_begins_with_this_version() -> None:
    (first, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == dvc_mlflow.__version__


def test_twine_finds_no_fault(wheel: Path) -> None:
    files = [str(wheel), *map(str, wheel.parent.glob("*.tar.gz"))]
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("PASSED") == len(files) == 2


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_wheel_alone_records_a_pipeline(version: str, wheel: Path, tmp_path: Path, stress: bool) -> None:
    if not stress:
        pytest.skip("installs DVC and MLflow from the package index: runs with --stress")
    uv = [sys.executable, "-m", "uv"]
    found = subprocess.run([*uv, "python", "find", "--no-project", version], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"Python {version} is not installed")
    home = tmp_path / "venv"
    subprocess.run([*uv, "venv", "--quiet", "--python", found.stdout.strip(), str(home)], check=True)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(home / "bin/python"), str(wheel)], check=True)
    env = environment() | {"PATH": f"{home / 'bin'}:{environment()['PATH']}"}
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text("n: 1\n")
    for command in ("git init -q", "dvc init -q", "dvc repro -q", "dvc-mlflow sync", "dvc-mlflow audit"):
        ended = subprocess.run(command.split(), cwd=folder, env=env, capture_output=True, text=True)
        assert ended.returncode == 0 and "Traceback" not in ended.stderr, (command, ended)
    assert "agree" in ended.stdout
