"""A stage of any kind that was not run with what stands beside it is named, in the workspace and in a commit."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.project import Project, make_project

from dvc_mlflow.project import Project as DVCProject
from dvc_mlflow.status import changed

FILES = {
    "dvc.yaml": """
vars: [{greeting: hello}]
stages:
  copy:
    cmd: mkdir -p made/sub && cat data/*.csv > made/all && cat mixed/* code/*.py > made/sub/rest
    deps: [data, mixed, code]
    outs: [made]
  part:
    cmd: cat made/sub/rest data/1.csv > part.txt
    deps: [made/sub/rest, data/1.csv]
    outs: [part.txt: {cache: false}]
  frozen:
    cmd: cat part.txt code/a.py > frozen.txt
    frozen: true
    deps: [part.txt, code/a.py]
    outs: [frozen.txt]
  each:
    foreach: [one, two]
    do:
      cmd: echo ${item} ${greeting} > ${item}.txt
      params:
        - settings.py: [Train.rate]
        - whole.toml:
      outs: ["${item}.txt"]
""",
    "sub/dvc.yaml": "stages:\n  deep:\n    cmd: cat ../code/b.py > deep.txt\n    wdir: .\n"
    "    deps: [../code/b.py]\n    outs: [deep.txt]\n",
    "settings.py": "class Train:\n    rate = 0.1\n",
    "whole.toml": "[a]\nb = 1\n",
    "code/a.py": "a = 1\n",
    "code/b.py": "b = 1\n",
    "code/x.pyc": "not code",
    ".dvcignore": "*.pyc\n",
    "data/1.csv": "1\n",
    "data/2.csv": "2\n",
    "mixed/text.txt": "text\n",
    "mixed/large.bin": "large\n",
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with stages of many kinds, run and committed. Not to be changed: copy it."""
    project = Project(tmp_path_factory.mktemp("kinds") / "project")
    make_project(project.folder, FILES)
    project.dvc("add", "-q", "data", "mixed/large.bin")
    unfrozen = FILES["dvc.yaml"].replace("frozen: true", "frozen: false")
    (project.folder / "dvc.yaml").write_text(unfrozen)
    project.dvc("repro", "-q", "--all-pipelines")
    (project.folder / "dvc.yaml").write_text(FILES["dvc.yaml"])
    project.commit("Run it")
    return project


def lines(project: Project, rev: str = "") -> list[str]:
    """What `changed` says of the workspace, or of a commit."""
    dvc = DVCProject(project.folder)
    with dvc.repo.switch(rev) if rev else contextlib.nullcontext():
        return list(changed(dvc.at_this_revision()))


def test_results_of_what_stands_beside_them_are_up_to_date_with_and_without_the_data(
    kinds: Project, tmp_path: Path
) -> None:
    assert lines(kinds) == []
    assert lines(kinds, "HEAD") == []
    shutil.copytree(kinds.folder, tmp_path / "project")
    clone = Project(tmp_path / "project")
    for name in ("data", "made", "mixed/large.bin", "frozen.txt", "one.txt", "two.txt", "sub/deep.txt"):
        path = clone.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert lines(clone) == []
    assert lines(clone, "HEAD") == []


def append(name: str) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        with (project.folder / name).open("a") as file:
            file.write("# changed\n")

    return change


def replace(name: str, old: str, new: str) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        path = project.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def track_other_data(project: Project) -> None:
    (project.folder / "data/1.csv").write_text("other\n")
    project.dvc("add", "-q", "data")


def track_another_file(project: Project) -> None:
    (project.folder / "mixed/large.bin").write_text("larger\n")
    project.dvc("add", "-q", "mixed/large.bin")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (append("code/a.py"), {"code: dvc.lock (copy)", "code/a.py: dvc.lock (frozen)"}),
        (append("code/b.py"), {"code: dvc.lock (copy)", "code/b.py: dvc.lock (sub/dvc.yaml:deep)"}),
        (append("mixed/text.txt"), {"mixed: dvc.lock (copy)"}),
        (append("part.txt"), {"part.txt: dvc.lock (part)", "part.txt: dvc.lock (frozen)"}),
        (replace("settings.py", "0.1", "0.2"), {"Train.rate: settings.py has 0.2, dvc.lock 0.1"}),
        (replace("whole.toml", "1", "2"), {"a.b: whole.toml has 2, dvc.lock 1"}),
        (
            replace("dvc.yaml", "greeting: hello", "greeting: bye"),
            {f"each@{item}: the command in dvc.yaml differs from dvc.lock" for item in ("one", "two")},
        ),
        (
            replace("dvc.yaml", "[one, two]", "[one, two, three]"),
            {"each@three: dvc.yaml has it, dvc.lock does not"},
        ),
        (
            replace("dvc.yaml", "deps: [part.txt, code/a.py]", "deps: [part.txt]"),
            {"frozen: code/a.py: dvc.lock has it, dvc.yaml does not"},
        ),
        (track_other_data, {"data: dvc.lock (copy)", "data/1.csv: dvc.lock (part)"}),
        (track_another_file, {"mixed: dvc.lock (copy)"}),
    ],
    ids=["code", "code in a subfolder", "git file in a folder", "out in git", "Python params", "whole params file",
         "template", "item", "dep", "tracked folder", "tracked file"],
)  # fmt: skip
def test_each_change_is_named_in_the_workspace_and_in_the_commit(
    change: Callable[[Project], None], expected: set[str], kinds: Project, tmp_path: Path
) -> None:
    shutil.copytree(kinds.folder, tmp_path / "project")
    project = Project(tmp_path / "project")
    change(project)
    project.commit("Change it")
    for rev in ("", "HEAD"):
        found = lines(project, rev)
        assert {line.partition(" has MD5 ")[0] for line in found} == expected, found
    assert lines(project, "HEAD~1") == []
