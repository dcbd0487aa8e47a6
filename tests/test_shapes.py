"""Shape and classes come from the data: 32 by 32 colour images in five classes, through stages and commands."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.project import Pipeline, Project, copy

from stages.dataset import Dataset, write_dataset
from stages.lenet import LeNet, read_model

CLASSES = ["red", "green", "blue", "yellow", "grey"]
COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [120, 120, 120]], np.uint8)


def make_dataset(size: int) -> Dataset:
    """Noisy images of one colour each, uint8 (N, 32, 32, 3)."""
    rng = np.random.default_rng(size)
    labels = (np.arange(size) % len(CLASSES)).astype(np.uint8)
    noise = rng.integers(0, 30, (size, 32, 32, 3), dtype=np.uint8)
    return Dataset(noise + COLOURS[labels][:, None, None], labels, CLASSES)


def data_of(project: Project, stage: str) -> Path:
    """The data set that a stage reads: the first argument of its command."""
    return project.folder / Pipeline(project.folder).command(stage)[3]


@pytest.fixture(scope="module")
def colours(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after train and evaluate on these images. Copy it before you change it."""
    project = copy(finished_project, tmp_path_factory.mktemp("colours"))
    project.set("train.validation_size", 50)
    for stage, size in (("train", 300), ("evaluate", 50)):
        write_dataset(data_of(project, stage), make_dataset(size))
        project.run(*Pipeline(project.folder).command(stage))
    return project


def test_another_shape_and_number_of_classes_need_no_change(colours: Project, tmp_path: Path) -> None:
    model = read_model(colours.folder / "models/lenet.safetensors")
    assert (model.shape, model.classes) == ((32, 32, 3), CLASSES)
    table = pd.read_parquet(colours.folder / "metrics/predictions.parquet")
    assert list(table.columns) == ["index", "label", "predicted", *CLASSES]
    scores = json.loads((colours.folder / "metrics/evaluate.json").read_text())
    assert scores["test_accuracy"] == (table["label"] == table["predicted"]).mean() > 0.9
    f1 = json.loads((colours.folder / "metrics/per_class.json").read_text())["f1"]
    assert list(f1) == CLASSES
    assert scores["test_macro_f1"] == pytest.approx(np.mean(list(f1.values())))

    picture = tmp_path / "blue.png"
    Image.new("RGB", (100, 60), (40, 40, 210)).save(picture)
    (answer,) = json.loads(colours.command("predict", "--json", str(picture)).stdout)
    assert (answer["class"], answer["inverted"]) == ("blue", False)
    assert "on all 50 test images" in colours.command("export", "models/lenet.onnx").stdout


def test_a_model_of_another_data_set_is_not_evaluated(colours: Project, tmp_path: Path) -> None:
    project = copy(colours, tmp_path)
    write_dataset(data_of(project, "evaluate"), make_dataset(50)._replace(classes=CLASSES[::-1]))
    result = project.run(*Pipeline(project.folder).command("evaluate"), check=False)
    assert result.returncode == 1
    assert "to have the classes and shape of data/fashion-mnist/test.safetensors, found others" in result.stderr


@pytest.mark.parametrize("shape", [(15, 28), (28, 257), (28,), (28, 28, 3, 3)])
def test_images_that_do_not_fit_the_network_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected images of 16 to 256 pixels a side"):
        LeNet("sigmoid", CLASSES, shape)


def test_a_training_on_images_that_are_too_small_ends_in_one_line(project: Project) -> None:
    dataset = make_dataset(300)
    write_dataset(data_of(project, "train"), dataset._replace(images=dataset.images[:, :12]))
    result = project.run(*Pipeline(project.folder).command("train"), check=False)
    assert result.returncode == 1
    assert "error: expected images of 16 to 256 pixels a side, found (12, 32, 3)" in result.stderr
