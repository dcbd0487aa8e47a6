"""A team: a git remote and a DVC remote, and clones."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from support.project import Project


class Remote(NamedTuple):
    """A DVC remote: the settings of `dvc remote`, and the environment of those who may use it."""

    url: str
    settings: Mapping[str, str]
    env: dict[str, str]


def found_team(project: Project, remote: Remote, parent: Path) -> None:
    """Give the project a git remote, `origin`, in a folder of that name, and this DVC remote; commit and push."""
    project.run("git", "init", "-q", "--bare", "-b", "main", str(parent / "origin"))
    project.run("git", "remote", "add", "origin", str(parent / "origin"))
    project.dvc("remote", "add", "--default", "team", remote.url)
    for key, value in remote.settings.items():
        project.dvc("remote", "modify", "team", key, value)
    project.run("git", "add", ".dvc/config")
    project.run("git", "commit", "-qm", "Add the team's remote")
    project.run("git", "push", "-qu", "origin", "main")


def join(parent: Path, name: str) -> Project:
    """A colleague's fresh clone."""
    clone = Project(parent / name)
    subprocess.run(["git", "clone", "-q", str(parent / "origin"), str(clone.folder)], check=True)
    return clone
