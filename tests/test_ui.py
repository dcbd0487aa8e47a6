"""What a person sees in the MLflow UI: a real browser, and two real pipeline runs with different rates.

Screenshots are kept below pytest's temporary folder; its path is in the report of a failure.
"""

import json
import re
import shutil
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright
from support.project import PIPELINE, Project, copy
from support.servers import Served, serve
from support.store import Store

from benchmarks.servers import free_port

SECONDS = 30  # seconds for the UI to show something


@pytest.fixture(scope="module")
def watched_project(two_results: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy(two_results, tmp_path_factory.mktemp("ui"))


@pytest.fixture(scope="module")
def address(watched_project: Project) -> Iterator[str]:
    """The UI, as `mlflow server` serves it on loopback."""
    port, store = free_port(), "sqlite:///mlflow.db"
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(port)]
    with serve(watched_project, port, *server, "--workers", "1"):
        yield f"http://127.0.0.1:{port}/#/experiments/{Store(watched_project).experiment_id}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1100})
        page.set_default_timeout(1000 * SECONDS)
        yield page
        browser.close()


def test_the_experiment_page_shows_named_runs_and_what_they_are_for(
    page: Page, address: str, watched_project: Project, tmp_path: Path
) -> None:
    slow, first = Store(watched_project).runs("train")
    page.goto(f"{address}/runs?workflowType=machine_learning")
    page.get_by_role("link", name="train slow lr=0.0001").wait_for()
    page.screenshot(path=tmp_path / "runs.png")
    names = [name for name in page.get_by_role("link").all_inner_texts() if re.match("fetch|train|evaluate", name)]
    (fetch,) = Store(watched_project).runs("fetch")
    assert names == ["train slow lr=0.0001", first.info.run_name, fetch.info.run_name], "evaluations are folded"
    assert page.get_by_text("What DVC ran: each execution of a stage is a run.").is_visible()
    page.get_by_role("link", name="train slow lr=0.0001").click()
    page.get_by_text(PIPELINE.stages["train"]["desc"]).wait_for()
    assert page.get_by_text("Params: as committed, except lr=0.0001.").is_visible()
    page.screenshot(path=tmp_path / "run.png")
    assert slow.info.run_id in page.url


def test_two_runs_compare_by_rate_accuracy_and_curves(
    page: Page, address: str, watched_project: Project, tmp_path: Path
) -> None:
    runs = Store(watched_project).runs("train")
    page.goto(f"{address}/runs?workflowType=machine_learning")
    page.get_by_role("link", name="train slow lr=0.0001").wait_for()
    for run in runs:
        page.get_by_role("row").filter(has=page.get_by_role("link", name=run.info.run_name)).get_by_role(
            "checkbox"
        ).first.click()
    page.get_by_role("button", name="Compare").or_(page.get_by_role("link", name="Compare")).first.click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    page.get_by_role("row").filter(has_text="train.lr").first.wait_for()
    page.screenshot(path=tmp_path / "compare.png", full_page=True)
    shown = page.get_by_role("row").filter(has_text="train.lr").first.inner_text().split()
    assert sorted(shown) == ["0.0001", "0.01", "train.lr"]
    text = page.locator("body").inner_text()
    for run in runs:
        accuracy = run.data.metrics["test_accuracy"]
        assert re.search(rf"^{accuracy:g}$", text, re.MULTILINE), accuracy
    page.get_by_role("link", name="train_loss").first.click()
    page.locator(".js-plotly-plot path.js-line").nth(1).wait_for()
    page.screenshot(path=tmp_path / "curves.png")
    for run in runs:
        assert page.get_by_text(run.info.run_name).first.is_visible()


def test_the_model_page_shows_this_model_s_test_metric(
    page: Page, address: str, watched_project: Project, tmp_path: Path
) -> None:
    weights = watched_project.md5s()["models/lenet.safetensors"]
    evaluated = json.loads((watched_project.folder / "metrics/evaluate.json").read_text())
    page.goto(f"{address}/models?workflowType=machine_learning")
    page.get_by_role("link", name=f"lenet-{weights[:8]}").click()
    row = page.get_by_role("row").filter(has_text="test_accuracy")
    row.wait_for()
    page.screenshot(path=tmp_path / "model.png")
    assert str(evaluated["test_accuracy"]) in row.inner_text()
    assert "fashion-mnist-test" in row.inner_text()
    assert page.get_by_text("dvc.yaml:train").first.is_visible()
    assert page.get_by_text("The class of each image, and the probability of every class.").first.is_visible()


def test_the_saved_view_has_the_declared_metrics_the_params_that_vary_and_the_best_run_first(
    page: Page, watched_project: Project, tmp_path: Path
) -> None:
    port = free_port()
    with serve(watched_project, port, "dvc-mlflow", "ui", "--port", str(port)):
        (address,) = re.findall("table +(http://.*)", (watched_project.folder / "ui.log").read_text())
        page.set_viewport_size({"width": 3000, "height": 1100})  # the table draws no columns outside the window
        page.goto(address)
        page.get_by_role("link", name="train slow lr=0.0001").wait_for()
        page.get_by_role("columnheader", name="train.lr").first.wait_for()
        page.screenshot(path=tmp_path / "view.png")
        boxes = {
            header.inner_text(): box["x"]
            for header in page.get_by_role("columnheader").all()
            if (box := header.bounding_box()) and header.inner_text()
        }
        rows = {
            name: box["y"]
            for link in page.get_by_role("link").all()
            if re.match("fetch|train|evaluate", name := link.inner_text()) and (box := link.bounding_box())
        }
    files = [
        json.loads((watched_project.folder / f"metrics/{name}.json").read_text()) for name in ("evaluate", "train")
    ]
    declared = [key for values in files for key in values]
    shown = sorted((name for name in boxes if name in {*declared, "train.lr"}), key=lambda name: boxes[name])
    assert shown == ["test_accuracy", *(key for key in declared if key != "test_accuracy"), "train.lr"]
    assert not [name for name in boxes if "." in name and name != "train.lr"], "params that do not vary"
    runs = Store(watched_project).runs("train")
    best = sorted(runs, key=lambda run: -run.data.metrics["test_accuracy"])
    (fetch,) = Store(watched_project).runs("fetch")
    assert sorted(rows, key=lambda name: rows[name]) == [run.info.run_name for run in [*best, fetch]]


def test_the_charts_show_the_curves_of_all_training_runs(
    page: Page, address: str, watched_project: Project, tmp_path: Path
) -> None:
    ended = watched_project.run("dvc-mlflow", "ui", MLFLOW_TRACKING_URI=address.partition("/#/")[0])
    (charts,) = re.findall("charts +(http://.*)", ended.stdout)
    page.goto(charts)
    page.get_by_text("train_loss").first.wait_for()
    page.locator(".js-plotly-plot").first.wait_for()
    page.screenshot(path=tmp_path / "charts.png")
    assert page.get_by_text("test_accuracy").first.is_visible()


def test_for_a_server_the_ui_command_prints_only_the_addresses(served: Served) -> None:
    with_user = f"http://ada:secret@127.0.0.1:{served.port}"
    ended = served.project.run("dvc-mlflow", "ui", MLFLOW_TRACKING_URI=with_user)
    assert re.fullmatch(
        rf"(?:(?:table |charts)  http://127.0.0.1:{served.port}/#/experiments/\d+/runs\?viewStateShareKey=\S+\n){{2}}",
        ended.stdout,
    )


def test_the_ui_shows_the_artifacts_of_a_project_that_was_moved(served: Served) -> None:
    run = Store(served.project).runs("evaluate")[-1]
    query = urllib.parse.urlencode({"run_uuid": run.info.run_id, "path": "metrics/per_class.json"})
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/get-artifact?{query}") as answer:
        assert b"precision" in answer.read()
