"""The same params give the same bits on other CPUs, which QEMU emulates."""

import itertools
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from support.project import STAGES, Pipeline, Project

# CPUs of each maker, all with AVX2. The short form takes the first of the maker that did not make this machine's.
CPUS = {"Intel": ["Haswell", "Broadwell", "Skylake-Client"], "AMD": ["EPYC", "EPYC-Rome"]}

# One process for two stages: an emulated one spends most of its time on importing PyTorch.
TWO_STAGES = """
import shlex, sys
from stages import cpu
cpu.import_torch("train")
import stages.train, stages.evaluate
for module, command in zip((stages.train, stages.evaluate), sys.argv[1:]):
    sys.argv = shlex.split(command)
    module.main()
"""

needs_qemu = pytest.mark.skipif(
    not shutil.which("qemu-x86_64") or os.uname().machine != "x86_64",
    reason="needs qemu-x86_64 (Debian: qemu-user), on an x86-64 CPU",
)


def cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text()


def arguments(project: Project, stage: str) -> str:
    """The stage's command from its module on."""
    return shlex.join(Pipeline(project.folder).command(stage)[2:])


def turns(project: Project) -> str:
    """A separate folder for the locks of turns: an emulated training takes long, and should hold up no other."""
    return str(project.folder.parent)


def remove_outs(project: Project, *stages: str) -> None:
    for stage in stages:
        for out in Pipeline(project.folder).outs(stage):
            (project.folder / out).unlink()


@needs_qemu
@pytest.mark.parametrize("maker", CPUS)
def test_an_emulated_cpu_gives_the_bits_of_the_real_one(maker: str, project: Project, stress: bool) -> None:
    if maker in cpuinfo() and not stress:
        pytest.skip("the long form: --stress")
    expected = project.md5s()
    outs = [out for stage in ("train", "evaluate") for out in Pipeline(project.folder).outs(stage)]
    for model in CPUS[maker] if stress else CPUS[maker][:1]:
        remove_outs(project, "train", "evaluate")
        commands = [arguments(project, stage) for stage in ("train", "evaluate")]
        result = project.run(
            "qemu-x86_64", "-cpu", model, sys.executable, "-c", TWO_STAGES, *commands, TMPDIR=turns(project)
        )
        assert "epoch 3/3" in result.stdout
        found = Pipeline(project.folder).hash(outs)
        assert found == {out: expected[out] for out in outs}, model


@needs_qemu
def test_all_outs_of_all_stages_have_the_same_bits_with_two_threads(new_project: Project, stress: bool) -> None:
    """The commands of dvc.yaml, with the default number of threads."""
    if not stress:
        pytest.skip("the long form: --stress")
    for stage in ("train", "evaluate"):
        new_project.set(f"{stage}.threads", 2)

    def run(*before: str) -> dict[str, str]:
        for stage in STAGES:
            new_project.run(
                *before, sys.executable, "-m", *shlex.split(arguments(new_project, stage)), TMPDIR=turns(new_project)
            )
        found = Pipeline(new_project.folder).hash(outs)
        remove_outs(new_project, *STAGES)
        return found

    outs = [out for stage in STAGES for out in Pipeline(new_project.folder).outs(stage)]
    expected = run()
    assert "" not in expected.values()
    for model in itertools.chain.from_iterable(CPUS.values()):
        assert run("qemu-x86_64", "-cpu", model) == expected, model


@needs_qemu
def test_a_cpu_without_avx2_trains_and_says_that_its_bits_differ(project: Project, stress: bool) -> None:
    if not stress:
        pytest.skip("the long form: --stress")
    commands = [arguments(project, stage) for stage in ("train", "evaluate")]
    emulated = ("qemu-x86_64", "-cpu", "SandyBridge", sys.executable)
    # NumPy's OpenBLAS would take the emulated CPU for a Haswell.
    result = project.run(*emulated, "-c", TWO_STAGES, *commands, warns=True, OPENBLAS_CORETYPE="Sandybridge")
    assert "epoch 3/3" in result.stdout
    assert "warning: train.bits: portable needs an x86-64 CPU with AVX2, which this is not" in result.stderr
