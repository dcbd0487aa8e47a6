"""Generate a DVC project with a long history: python -m benchmarks.history FOLDER --commits 200.

DVC's files are written directly: `dvc repro` in each commit would take minutes. The outputs are as the commands in
dvc.yaml would make them, so `dvc status` finds nothing to do.
"""

import argparse
import hashlib
import json
import subprocess
from pathlib import Path

from dvc.utils.serialize import dumps_yaml

DVC_YAML = """\
stages:
  prepare:
    cmd: sh prepare.sh
    deps: [prepare.sh]
    params: [prepare]
    outs: [data.csv]
  train:
    cmd: sh train.sh
    deps: [train.sh, data.csv]
    params: [train]
    outs: [model.bin]
    plots:
      - history.csv: {x: epoch}
    metrics:
      - train.json: {cache: false}
  evaluate:
    cmd: sh evaluate.sh
    deps: [evaluate.sh, model.bin]
    metrics:
      - evaluate.json: {cache: false}
artifacts:
  net: {path: model.bin, type: model}
"""
SCRIPTS = {
    "prepare.sh": "grep 'rows:' params.yaml > data.csv\n",
    "train.sh": """\
cat data.csv > model.bin; grep 'rate:' params.yaml >> model.bin
printf 'epoch,loss\\n1,0.5\\n2,0.25\\n3,0.125\\n' > history.csv
echo "{\\"loss\\": $(sed -n 's/.*rate: //p' params.yaml)}" > train.json
""",
    "evaluate.sh": """echo "{\\"accuracy\\": 0.$(sed -n 's/.*rate: //p' model.bin)}" > evaluate.json\n""",
}
GIT_IGNORE = "/data.csv\n/model.bin\n/history.csv\n/mlflow.db*\n/mlartifacts\n"
FIRST_DAY = 1_700_000_000  # seconds since 1970: the date of the first commit; the others follow, one a day


def make_history(folder: Path, commits: int, experiments: int = 0) -> None:
    """Create a repository of `commits` commits, each with new runs of all three stages, and experiments on the last."""
    folder.mkdir(parents=True)
    for command in (["git", "init", "-q", "-b", "main"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    subprocess.run(["git", "rm", "-q", "-r", "--cached", "."], cwd=folder, check=True)
    steady = {"dvc.yaml": DVC_YAML, ".gitignore": GIT_IGNORE, **SCRIPTS}
    steady |= {name: (folder / name).read_text() for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore")}
    subprocess.run(["git", "config", "gc.auto", "0"], cwd=folder, check=True)
    _import(folder, [("refs/heads/main", "", number) for number in range(1, commits + 1)], steady)
    subprocess.run(["git", "reset", "-q", "--hard"], cwd=folder, check=True)
    for name, text in files_of(commits)[1].items():
        (folder / name).write_text(text)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    baseline = head.stdout.strip()
    numbers = range(commits + 1, commits + experiments + 1)
    refs = f"refs/exps/{baseline[:2]}/{baseline[2:]}"
    _import(folder, [(f"{refs}/exp-{number}", f"from {baseline}\n", number) for number in numbers], {})


def _import(folder: Path, commits: list[tuple[str, str, int]], steady: dict[str, str]) -> None:
    """Create commits: ref, parent if it is not the ref's, and number of each; the first adds `steady`."""
    stream = []
    for ref, parent, number in commits:
        files, cached = files_of(number)
        for text in cached.values():
            digest = md5(text)
            place = folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.write_text(text)
                place.chmod(0o444)
        who, message = f"Ada {number % 3} <ada@example.org> {FIRST_DAY + 86_400 * number} +0000", f"Try {number}"
        stream.append(f"commit {ref}\nauthor {who}\ncommitter {who}\n{_data(message)}{parent}")
        changed = files | steady if number == 1 else files
        stream += [f"M 100644 inline {name}\n{_data(text)}" for name, text in changed.items()]
    subprocess.run(["git", "fast-import", "--quiet"], cwd=folder, input="".join(stream).encode(), check=True)


def files_of(number: int) -> tuple[dict[str, str], dict[str, str]]:
    """The text of each file in git that changes from commit to commit, and of each file in DVC's cache."""
    data, rate = f"  rows: {number}\n", f"  rate: {number}\n"
    params = f"prepare:\n{data}train:\n{rate}"
    cached = {"data.csv": data, "model.bin": data + rate, "history.csv": "epoch,loss\n1,0.5\n2,0.25\n3,0.125\n"}
    tracked = {
        "train.json": json.dumps({"loss": number}) + "\n",
        "evaluate.json": f'{{"accuracy": 0.{number}}}\n',
    }
    known = {**cached, **tracked, **SCRIPTS}

    def entries(*names: str) -> list[dict[str, object]]:
        return [
            {"path": name, "hash": "md5", "md5": md5(known[name]), "size": len(known[name])} for name in sorted(names)
        ]

    stages: dict[str, object] = {}
    for stage, deps, outs, params_of in (
        ("prepare", ["prepare.sh"], ["data.csv"], {"prepare": {"rows": number}}),
        ("train", ["train.sh", "data.csv"], ["model.bin", "history.csv", "train.json"], {"train": {"rate": number}}),
        ("evaluate", ["evaluate.sh", "model.bin"], ["evaluate.json"], {}),
    ):
        stages[stage] = {
            "cmd": f"sh {stage}.sh",
            "deps": entries(*deps),
            **({"params": {"params.yaml": params_of}} if params_of else {}),
            "outs": entries(*outs),
        }
    return {"params.yaml": params, "dvc.lock": dumps_yaml({"schema": "2.0", "stages": stages}), **tracked}, cached


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def _data(text: str) -> str:
    return f"data {len(text.encode())}\n{text}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commits", type=int, default=200)
    parser.add_argument("--experiments", type=int, default=0)
    arguments = parser.parse_args()
    make_history(arguments.folder, arguments.commits, arguments.experiments)
