"""The params decide the bits, whatever the environment says; cores are those that the process may use."""

import os
import sys
from pathlib import Path

import pytest
from support.project import ROOT, Pipeline, Project

from stages import cpu

PARAMS = (ROOT / "params.yaml").read_text(encoding="utf-8")
OTHERS = {
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "AVX",
    "OMP_THREAD_LIMIT": "1",
    "DNNL_MAX_CPU_ISA": "SSE41",
}


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A replacement of the process's environment, in a folder that has params.yaml."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    values: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", values)
    return values


def set_bits(bits: str) -> None:
    Path("params.yaml").write_text(PARAMS.replace("bits: portable", f"bits: {bits}"))


@pytest.mark.parametrize("section", ["train", "evaluate"])
@pytest.mark.parametrize(("bits", "expected"), [("portable", cpu.PORTABLE), ("native", {})])
def test_the_param_overrules_the_environment_with_a_warning_for_each_variable(
    bits: str, expected: dict[str, str], section: str, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    set_bits(bits)
    cpu.import_torch(section)
    assert {name: value for name, value in env.items() if name in {*OTHERS, *cpu.UNSET}} == expected
    cpu.import_torch(section)
    assert capsys.readouterr().err == ""
    env |= OTHERS
    cpu.import_torch(section)
    assert {name: value for name, value in env.items() if name in {*OTHERS, *cpu.UNSET}} == expected
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(
        f"warning: {name}={value} in the environment is ignored: {section}.bits decides"
        for name, value in OTHERS.items()
    )


def test_a_cpu_that_cannot_give_portable_bits_gets_a_warning(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "has_avx2", lambda: False)
    cpu.import_torch("train")
    assert not {*env} & {*cpu.PORTABLE}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: train.bits: portable needs an x86-64 CPU with AVX2, which this is not; ")
    set_bits("native")
    cpu.import_torch("train")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "- a list", "train: 7", "train: [1]", "train:\n  bits: 7", "train: {", "\0"])
def test_mistakes_in_params_are_left_to_the_stage(
    text: str, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("params.yaml").write_text(text)
    cpu.import_torch("train")
    assert capsys.readouterr().err == ""


def test_stages_give_the_bits_of_the_params_in_any_environment(project: Project) -> None:
    settings = [f"{name}={value}" for name, value in OTHERS.items()]
    if cpu.has_avx2():
        code = "from stages import cpu; cpu.import_torch('train'); import torch; print(torch.__config__.show())"
        shown = project.run("env", *settings, sys.executable, "-c", code, warns=True).stdout
        assert "CPU capability usage: AVX2\n" in shown
    expected = project.md5s()
    for stage in ("train", "evaluate"):
        outs = Pipeline(project.folder).outs(stage)
        for out in outs:
            (project.folder / out).unlink()
        command = Pipeline(project.folder).command(stage)
        result = project.run("env", *settings, *command, warns=True)
        assert result.stderr.count("in the environment is ignored") == len(OTHERS)
        assert Pipeline(project.folder).hash(outs) == {out: expected[out] for out in outs}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux, to give a process fewer cores")
def test_more_threads_than_cores_give_the_bits_that_they_give_on_more_cores(project: Project) -> None:
    command = Pipeline(project.folder).command("train")[3:]
    code = (
        "import os, runpy, sys; os.sched_setaffinity(0, eval(sys.argv.pop(1))); "
        "runpy.run_module('stages.train', run_name='__main__', alter_sys=True)"
    )
    project.set("train.threads", 3)
    project.set("train.epochs", 1)
    allowed = sorted(os.sched_getaffinity(0))
    found = []
    for few in (allowed[:1], allowed):
        result = project.run(sys.executable, "-c", code, str(few), *command)
        line = f"3 threads share {len(few)} CPU core(s): slower, but with the same bits\n"
        assert result.stderr == (line if len(few) < 3 else "")
        found.append((project.folder / "models/lenet.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 64),
        ({"": "max 100000"}, 64),
        ({"": "200000 100000"}, 2),
        ({"": "150000 100000"}, 2),
        ({"": "10000 100000"}, 1),
        ({"a/b": "300000 100000", "a": "max 100000"}, 3),
        ({"a/b": "max 100000", "a": "400000 100000"}, 4),
        ({"a/b": "not what the kernel writes"}, 64),
    ],
)
def test_cores_are_those_of_the_affinity_and_the_quota_of_a_container(
    limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.cpu.ALLOWED", set())  # a leftover of an earlier test
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(100, 164)), raising=False)
    (tmp_path / "own").write_text("1:cpu:/elsewhere\n0::/a/b\n")
    (tmp_path / "a/b").mkdir(parents=True)
    for folder, text in limits.items():
        (tmp_path / folder / "cpu.max").write_text(text + "\n")
    monkeypatch.setattr(cpu, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(cpu, "CGROUPS", tmp_path)
    assert cpu.cores() == list(range(100, 100 + expected))
