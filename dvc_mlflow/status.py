"""Whether dvc.lock matches the code, the params and the data beside it, in the workspace or in a commit."""

import hashlib
import json
import posixpath
from collections.abc import Iterator
from typing import Any

from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.fs import LocalFileSystem

from dvc_mlflow.execution import Execution, flatten
from dvc_mlflow.project import Project, Unprovable, _plain, _tree_digest, hash_path, matches, one_command
from dvc_mlflow.text import one_line

KINDS = ("md5", "md5-dos2unix")  # of hashes that DVC's file system tells


def changed(project: Project) -> Iterator[str]:
    """Yield where dvc.yaml, the params or the files differ from dvc.lock, as the workspace or commit has them.

    A file that only DVC's cache or remote has is taken to match dvc.lock, or its .dvc file. Stages that DVC would not
    run are checked, too: a frozen one may still have results of other code.
    """
    for address in project.stages:
        execution = project.locked_alone(address)
        if execution is None:
            yield f"{address}: dvc.yaml has it, dvc.lock does not"
            continue
        yield from changed_declarations(project, address, execution)
        for path, digest in {**execution.deps, **execution.outs}.items():
            if "://" in path:
                continue
            try:
                found = digest_now(project, path, digest)
            except Exception as error:  # of a cache or remote, of any kind
                yield f"{path}: cannot be checked against dvc.lock ({address}): {one_line(error)}"
                continue
            if found != digest:
                yield f"{path}: dvc.lock ({address}) has MD5 {digest}, the file {found or 'is missing'}"
        try:
            project.check_run_cache(execution)
        except Unprovable as error:
            yield f"{address}: {error}"


def changed_declarations(project: Project, address: str, execution: Execution) -> Iterator[str]:
    """Yield where the command, the params or the lists of deps and outs of a stage differ from dvc.lock."""
    stage = project.stages[address]
    if execution.cmd != one_command(stage.cmd):
        yield f"{address}: the command in dvc.yaml differs from dvc.lock"
    params = {}
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            try:
                params[project.path(stage, dep.def_path)] = _plain(dep.read_params())
            except DvcException as error:
                yield f"{address}: {error}"
    now, then = (
        {f"{p}:{k}": v for p, ps in some.items() for k, v in flatten(ps).items()} for some in (params, execution.params)
    )
    for key in sorted({*now, *then}):
        if now.get(key) != then.get(key):
            path, _, name = key.partition(":")
            yield f"{name}: {path} has {_show(now, key)}, dvc.lock {_show(then, key)}"
    deps = [project.path(stage, dep.def_path) for dep in stage.deps if not isinstance(dep, ParamsDependency)]
    for listed, locked in ((deps, execution.deps), (project.outs(stage), execution.outs)):
        for path in sorted({*listed} ^ {*locked}):
            where = ("dvc.yaml", "dvc.lock") if path in listed else ("dvc.lock", "dvc.yaml")
            yield f"{address}: {path}: {where[0]} has it, {where[1]} does not"


def digest_of(project: Project, path: str, digest: str) -> str:
    """The current hash of a file or directory in the workspace, computed from its bytes; "" if it is missing."""
    file = project.folder / path
    if matches(file, digest):
        return digest
    if not file.exists():
        return ""
    return hash_path(file, project.repo).hash_info.value


def digest_now(project: Project, path: str, digest: str) -> str:
    """The hash of a file or directory in the workspace or the commit that DVC looks at; "" if it is missing.

    It is computed from the bytes; if only DVC's cache or remote has them, it is the hash in dvc.lock or the .dvc file.
    """
    in_workspace = isinstance(project.repo.fs, LocalFileSystem)
    file = project.folder / path
    if in_workspace and file.exists() and ((found := digest_of(project, path, digest)) == digest or file.is_file()):
        return found
    if posixpath.isabs(path) or path.startswith("../"):  # not of this DVC project
        there = posixpath.normpath(posixpath.join(project.repo.root_dir, path))
        if project.repo.fs.exists(there):
            return hash_path(there, project.repo, project.repo.fs).hash_info.value
        return "" if in_workspace else digest  # git does not have it: no commit says what it should be
    fs = project.repo.dvcfs.fs  # the files, and what DVC would put beside them
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return ""
    if info["type"] != "directory" or any(info.get(kind) for kind in KINDS):
        return _digest(fs, path, info, digest)
    files = fs.find(path, detail=True, dvcfiles=True)
    return _tree_digest({posixpath.relpath(name, path): _digest(fs, name, one, "") for name, one in files.items()}, ".")


def _digest(fs: Any, path: str, info: dict[str, Any], expected: str) -> str:
    """The hash that DVC has for a file, else its MD5: in old projects, with Unix line endings."""
    for kind in KINDS:
        if info.get(kind):
            return str(info[kind])
    data = fs.cat_file(path)
    found = hashlib.md5(data).hexdigest()
    return expected if hashlib.md5(data.replace(b"\r\n", b"\n")).hexdigest() == expected else found


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], default=str) if key in values else "none"
