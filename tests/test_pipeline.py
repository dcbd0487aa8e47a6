"""Rules about the whole project: what reruns when, what imports what, and that each tool's own commands work."""

import ast
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from dvc.utils.serialize import load_yaml
from support.project import PIPELINE, ROOT, STAGES, Project, copy, ran

from dvc_mlflow.execution import flatten
from stages.stage import md5

PARAMS = load_yaml(ROOT / "params.yaml")

# Not in any stage's deps: params.py only checks what DVC tracks, serving.py is for MLflow.
UNTRACKED = {"__init__", "params", "serving"}


def imports(module: str) -> set[str]:
    """Names of all modules that stages/<module>.py imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / "stages" / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def own_imports(module: str) -> set[str]:
    """The modules of stages/ that stages/<module>.py imports directly."""
    modules = {path.stem for path in (ROOT / "stages").glob("*.py")}
    return {name.split(".")[1] for name in imports(module) if name.startswith("stages.")} & modules


def closure(module: str) -> set[str]:
    """The module and all modules of stages/ that it imports, directly or not."""
    found = {module}
    while more := set().union(*map(own_imports, found)) - found:
        found |= more
    return found


def code_deps(stage: str) -> set[str]:
    return {Path(path).stem for path in PIPELINE.deps(stage) if path.endswith(".py")}


MODULES = sorted(path.stem for path in (ROOT / "stages").glob("*.py"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_in_a_stage_s_deps_is_exactly_what_it_imports(stage: str) -> None:
    assert code_deps(stage) == closure(stage) - UNTRACKED


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_stage_and_each_library_has_its_place(module: str) -> None:
    assert not own_imports(module) & {*STAGES}
    libraries = {name.split(".")[0] for name in imports(module)}
    assert "torchvision" not in libraries
    assert "mlflow" not in libraries or module == "serving"
    assert "dvc_mlflow" not in libraries
    if module in STAGES:
        assert not closure(module) & {"serving"}
    if module in closure("fetch"):
        assert not libraries & {"torch", "pandas", "matplotlib", "sklearn"}


def test_only_dvc_yaml_has_the_paths_of_data_models_and_metrics() -> None:
    outs = {out for stage in STAGES for out in PIPELINE.outs(stage)}
    for module in MODULES:
        tree = ast.parse((ROOT / "stages" / f"{module}.py").read_text(encoding="utf-8"))
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not strings & outs


def test_dvc_lock_matches_the_code_and_the_params() -> None:
    locked = load_yaml(ROOT / "dvc.lock")["stages"]
    for stage in STAGES:
        deps = {entry["path"]: entry["md5"] for entry in locked[stage]["deps"]}
        assert {path: deps[path] for path in deps if path.endswith(".py")} == {
            path: md5(ROOT / path) for path in PIPELINE.deps(stage) if path.endswith(".py")
        }
        params = {"params.yaml": {stage: PARAMS[stage]}} if stage in PARAMS else {}
        assert locked[stage].get("params", {}) == params
        assert locked[stage]["cmd"] == PIPELINE.stages[stage]["cmd"]


def other(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case list():
            return [*value[:-1], value[-1] + "x"]
    return value + "x"


@pytest.fixture(scope="module")
def status_project(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy(finished_project, tmp_path_factory.mktemp("status"))


@pytest.fixture
def stale(status_project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Return the stages that `dvc status` says would run, before any that follow from them."""
    monkeypatch.chdir(status_project.folder)  # DVC names stages relative to the current folder

    def status() -> set[str]:
        with Repo() as repo:
            return set(repo.status())

    assert status() == set()
    return status


@pytest.mark.parametrize("key", flatten(PARAMS))
def test_a_changed_param_reruns_exactly_its_stage(
    key: str, status_project: Project, stale: Callable[[], set[str]]
) -> None:
    path = status_project.folder / "params.yaml"
    original = path.read_bytes()
    status_project.set(key, other(flatten(load_yaml(path))[key]))
    try:
        assert stale() == {key.split(".")[0]}
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("module", MODULES)
def test_a_changed_module_reruns_exactly_the_stages_that_import_it(
    module: str, status_project: Project, stale: Callable[[], set[str]]
) -> None:
    path = status_project.folder / "stages" / f"{module}.py"
    original = path.read_bytes()
    path.write_bytes(original + b"# changed\n")
    try:
        assert stale() == {stage for stage in STAGES if module in closure(stage) - UNTRACKED}
    finally:
        path.write_bytes(original)


def test_a_stage_whose_inputs_stay_the_same_is_skipped(project: Project, mirror: str) -> None:
    """A chain of changes, each with the stages that it reruns."""
    project.set("fetch.mirrors", ["http://127.0.0.1:1/", mirror])
    assert project.repro() == ["fetch"], "other mirrors, same bytes"
    project.set("train.device", "cpu")
    assert project.repro() == ["train"], "the device that auto chose, same bytes"
    project.set("evaluate.batch_size", 7)
    assert project.repro() == ["evaluate"]


def test_a_fresh_clone_runs_every_stage_and_gets_the_same_bits(finished_project: Project, tmp_path: Path) -> None:
    clone = Project(tmp_path / "clone")
    finished_project.run("git", "clone", "-q", ".", str(clone.folder))
    assert set(clone.repro()) == {*STAGES}
    assert (clone.folder / "dvc.lock").read_bytes() == (finished_project.folder / "dvc.lock").read_bytes()
    assert clone.repro() == []


def test_metrics_show_shows_the_metrics_files(finished_project: Project) -> None:
    shown = json.loads(finished_project.dvc("metrics", "show", "--json").stdout)[""]["data"]
    assert set(shown) == {path for stage in STAGES for path in PIPELINE.outs(stage, ["metrics"])}
    for path, entry in shown.items():
        assert entry["data"] == json.loads((finished_project.folder / path).read_text())


PICTURES = [Path(path).stem for stage in STAGES for path in PIPELINE.outs(stage, ["plots"])]


def test_plots_show_and_plots_diff_render_all_plots(two_results: Project) -> None:
    for arguments, sides in ((["show"], 1), (["diff", "HEAD", "workspace"], 2)):
        page = two_results.dvc("plots", *arguments, "--out", f"plots_{arguments[0]}").stdout.strip().splitlines()[-1]
        folder = Path(re.sub("^file://", "", page)).parent
        html = (folder / "index.html").read_text()
        assert '"Loss"' in html
        assert '"Accuracy"' in html
        pictures = sorted(path.name for path in (folder / "static").glob("*.png"))
        assert len(pictures) == sides * len(PICTURES)
        for name in PICTURES:
            assert sum(picture.endswith(f"_{name}.png") for picture in pictures) == sides
        for picture in pictures:
            assert f"static/{picture}" in html


def test_the_curves_of_plots_show_are_those_of_the_history(two_results: Project) -> None:
    shown = json.loads(two_results.dvc("plots", "show", "--json").stdout)
    assert not shown.get("errors")
    text = {name: json.dumps(plots[0].get("content")) for name, plots in shown["data"].items()}
    with (two_results.folder / "metrics/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for metric in ("loss", "accuracy"):
            for part in ("train", "validation"):
                assert row[f"{part}_{metric}"] in text[metric]


def test_an_experiment_runs_what_its_change_affects_and_shows_its_values(project: Project) -> None:
    result = project.dvc("exp", "run", "--name", "small", "--set-param", "evaluate.batch_size=50")
    assert ran(result.stdout) == ["evaluate"]
    shown = json.loads(project.dvc("exp", "show", "--json").stdout)
    experiments = [revision for entry in shown for group in entry["experiments"] or [] for revision in group["revs"]]
    (experiment,) = experiments
    assert experiment["name"] == "small"
    assert experiment["data"]["params"]["params.yaml"]["data"]["evaluate"]["batch_size"] == 50
    metrics = experiment["data"]["metrics"]["metrics/evaluate.json"]["data"]
    assert metrics == json.loads((project.folder / "metrics/evaluate.json").read_text())


def test_no_test_imports_another_or_the_fixtures() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    found = [name for name, text in texts.items() if re.search(r"^(from|import) (test_|conftest)", text, re.MULTILINE)]
    assert found == []


PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = "".join(path.read_text(encoding="utf-8") for path in PAGES)


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_docs_name_every_make_target() -> None:
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    assert [target for target in targets if f"make {target}" not in DOCS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{target}#{anchor}"


def test_the_tests_that_the_docs_name_exist() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    files, names = re.findall(r"tests/test_\w+\.py", DOCS), re.findall(r"`(test_\w+)…?`", DOCS)
    assert files
    assert names
    assert [path for path in files if not (ROOT / path).exists()] == []
    assert [name for name in names if f"def {name}" not in tests] == []


@pytest.mark.parametrize(
    "command", sorted(path.stem for path in (ROOT / "commands").glob("*.py") if "__main__" in path.read_text())
)
def test_each_command_is_documented_and_its_help_has_examples(command: str, finished_project: Project) -> None:
    assert f"python -m commands.{command}" in DOCS
    tree = ast.parse((ROOT / "commands" / f"{command}.py").read_text(encoding="utf-8"))
    assert f"python -m commands.{command}" in (ast.get_docstring(tree) or ""), "the help is the docstring"
    assert f"python -m commands.{command}" in finished_project.command(command, "--help").stdout


def test_the_lock_holds_every_direct_dependency_with_hashes() -> None:
    names = re.findall(r"^([\w-]+)", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    lock = (ROOT / "requirements.txt").read_text()
    for name in names:
        assert re.search(rf"^{name}(\[\w+\])?==[^\n]+\\\n +--hash=sha256:", lock, re.MULTILINE), name
    assert "://" not in lock
