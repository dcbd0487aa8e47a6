"""A picture of any kind becomes an image that the model takes; anything else is refused in one line."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps
from support.project import Project

from commands.predict import read_image
from stages.dataset import read_dataset
from stages.stage import StageError

SHAPE = (28, 28)


def predict(project: Project, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return project.command("predict", *arguments, check=check)


@pytest.fixture(scope="module")
def image(finished_project: Project) -> Image.Image:
    """The first test image: uint8, 28 by 28, white on black."""
    return Image.fromarray(read_dataset(finished_project.folder / "data/fashion-mnist/test.safetensors").images[0])


@pytest.fixture(scope="module")
def table(finished_project: Project) -> pd.DataFrame:
    return pd.read_parquet(finished_project.folder / "metrics/predictions.parquet")


def test_a_test_image_gets_the_prediction_of_evaluate(
    finished_project: Project, image: Image.Image, table: pd.DataFrame, tmp_path: Path
) -> None:
    image.save(tmp_path / "first.png")
    ImageOps.invert(image).convert("RGB").save(tmp_path / "light.png")
    paths = [str(tmp_path / name) for name in ("first.png", "light.png")]
    first, light = json.loads(predict(finished_project, "--json", *paths).stdout)
    expected = table.iloc[0, 3:].astype(float).sort_values(ascending=False)[:3]
    for answer, inverted in ((first, False), (light, True)):
        assert answer["inverted"] == inverted
        assert [entry["class"] for entry in answer["top"]] == list(expected.index)
        assert [entry["probability"] for entry in answer["top"]] == pytest.approx(list(expected), abs=1e-6)
        assert (answer["class"], answer["probability"]) == tuple(answer["top"][0].values())
    shown = predict(finished_project, *paths).stdout.splitlines()
    assert [line.split(":")[0] for line in shown] == paths
    assert "(light background: inverted)" not in shown[0]
    assert "(light background: inverted)" in shown[1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_is_read(image: Image.Image, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    if mode == "I;16":
        Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(path)
    else:
        image.convert(mode).save(path)
    read, inverted = read_image(path, SHAPE)
    assert (read.dtype, read.shape, inverted) == (np.uint8, SHAPE, False)
    if mode != "1":
        assert np.abs(read.astype(int) - np.asarray(image)).mean() < 3


@pytest.mark.parametrize("size", [(280, 280), (300, 100), (1, 1), (5, 900)])
def test_every_size_keeps_its_proportions(size: tuple[int, int], tmp_path: Path) -> None:
    picture = Image.new("L", size, 30)
    picture.paste(220, (size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4))
    picture.save(tmp_path / "picture.jpg", quality=95)
    read, _ = read_image(tmp_path / "picture.jpg", SHAPE)
    assert read.shape == SHAPE
    bright = read > 128
    if size == (300, 100):
        assert (bright.any(0).sum(), bright.any(1).sum()) == (14, 5)


def test_transparent_areas_are_white_paper(image: Image.Image, tmp_path: Path) -> None:
    drawing = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    drawing.putalpha(image)  # black ink where the image is bright
    drawing.save(tmp_path / "drawing.png")
    read, inverted = read_image(tmp_path / "drawing.png", SHAPE)
    assert inverted
    assert np.abs(read.astype(int) - np.asarray(image)).max() <= 1


def test_a_file_that_is_no_picture_is_refused_in_one_line(
    finished_project: Project, image: Image.Image, tmp_path: Path
) -> None:
    image.resize((200, 200)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    cases = {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.jpg": b"hello",
        "noise.png": whole[:30] + b"x" * 99,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StageError, match=name):
            read_image(tmp_path / name, SHAPE)
    with pytest.raises(StageError, match="No such file"):
        read_image(tmp_path / "missing.png", SHAPE)
    with pytest.raises(StageError, match="cannot read"):
        read_image(tmp_path, SHAPE)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(StageError, match="expected at most 89,478,485 pixels, found more"):
        read_image(tmp_path / "huge.png", SHAPE)
    failed = predict(finished_project, str(tmp_path / "text.jpg"), check=False)
    assert failed.returncode == 1
    assert failed.stderr == f"error: {tmp_path / 'text.jpg'}: expected a PNG or JPEG image, found something else\n"


@pytest.mark.parametrize("model", ["models/none.safetensors", "models:/m-none", "params.yaml"])
def test_a_missing_model_is_reported_in_one_line(
    finished_project: Project, image: Image.Image, model: str, tmp_path: Path
) -> None:
    image.save(tmp_path / "first.png")
    failed = predict(finished_project, "--model", model, str(tmp_path / "first.png"), check=False)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: ")
    assert model in line
