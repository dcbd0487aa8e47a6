"""Classify pictures.

python -m commands.predict shirt.jpg bag.png
python -m commands.predict --json shirt.jpg
python -m commands.predict --model models:/fashion-mnist-lenet@champion shirt.jpg

A PNG or JPEG of any size and mode is converted to the format of Fashion-MNIST: grey, 28 by 28, white on black.
Transparent areas count as white paper. A picture with a light border is inverted, and the output says so. Proportions
are kept, on a square of the picture's background. Pictures of one piece of clothing on a plain background work best.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.stage import StageError, shorten

MODEL = "models/lenet.safetensors"
Predict = Callable[[np.ndarray], tuple[list[str], np.ndarray]]  # from images to classes and probabilities (N, classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG or JPEG")
    parser.add_argument("--model", default=MODEL, help=f"file, or models:/… in MLflow (default: {MODEL})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        shape, ask = open_model(args.model)
        read = [read_image(path, shape) for path in args.images]
        answers = best_three(*ask(np.stack([image for image, _ in read])))
    except StageError as error:
        sys.exit(f"error: {error}")
    rows = [
        {"image": str(path), "inverted": inverted, **answer}
        for path, (_, inverted), answer in zip(args.images, read, answers, strict=True)
    ]
    if args.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        top = ", ".join(f"{entry['class']} {entry['probability']:.1%}" for entry in row["top"])
        note = " (light background: inverted)" if row["inverted"] else ""
        print(f"{row['image']}: {row['class']} {row['probability']:.1%}{note}; top 3: {top}")


def read_image(path: Path, shape: Sequence[int]) -> tuple[np.ndarray, bool]:
    """Return uint8 of this shape, and whether it was inverted: grey images are white on black.

    Raises StageError if it is not a PNG or JPEG image, or has more pixels than Pillow allows.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as file:
                image: Image.Image = file
                image.load()
                with contextlib.suppress(Exception):  # damaged metadata raises more than Pillow's own exceptions
                    image = ImageOps.exif_transpose(file)  # a photo taken sideways
                image = image.convert("RGB") if len(shape) == 3 else _grey(image)
    except UnidentifiedImageError:
        raise StageError(f"{path}: expected a PNG or JPEG image, found something else") from None
    except OSError as error:
        raise StageError(f"cannot read {path}: {shorten(error.strerror or error)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise StageError(f"{path}: expected at most {Image.MAX_IMAGE_PIXELS:,} pixels, found more") from None
    except Exception as error:  # Pillow's decoders may raise anything on a damaged file
        raise StageError(f"{path} is damaged: {shorten(f'{type(error).__name__}: {error}')}") from None
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    inverted = len(shape) == 2 and bool(np.median(border) > 127)
    if inverted:
        image, border = ImageOps.invert(image), 255 - border
    background = tuple(int(value) for value in np.atleast_1d(np.median(border, axis=0)))
    size = (shape[1], shape[0])
    return np.asarray(ImageOps.pad(image, size, Image.Resampling.LANCZOS, background)), inverted


def _grey(image: Image.Image) -> Image.Image:
    """The image in 8-bit grey, on white paper. At Pillow's limit, each copy in colour takes 360 MB."""
    if image.mode.startswith(("I", "F")):  # 16 bits or more a pixel: Pillow would clip it
        values = np.asarray(image)
        shares = values / np.float32(max(values.max(), 1))
        shares *= 255
        return Image.fromarray(shares.astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("L")
    coloured = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    paper = Image.new("L", image.size, 255)
    paper.paste(coloured.convert("L"), mask=coloured.getchannel("A"))
    return paper


def best_three(classes: Sequence[str], probabilities: np.ndarray) -> list[dict[str, Any]]:
    """The class, its probability and the three best, of each row of probabilities (N, classes)."""
    answers = []
    for row in probabilities:
        top = [{"class": classes[label], "probability": float(row[label])} for label in np.argsort(-row)[:3]]
        answers.append({**top[0], "top": top})
    return answers


def open_model(name: str) -> tuple[Sequence[int], Predict]:
    """The shape of an image that the model takes, and the model. Raises StageError if there is no such model."""
    return _from_mlflow(name) if name.startswith("models:/") else _from_file(name)


def _from_file(name: str) -> tuple[Sequence[int], Predict]:
    import torch

    from stages import lenet

    model = lenet.read_model(Path(name))

    def ask(images: np.ndarray) -> tuple[list[str], np.ndarray]:
        logits = lenet.predict(model, torch.from_numpy(images), len(images))
        return model.classes, logits.softmax(1).numpy()

    return model.shape, ask


def _from_mlflow(name: str) -> tuple[Sequence[int], Predict]:
    from dvc_mlflow.command import open_store

    folder = tempfile.TemporaryDirectory()  # MLflow loads nothing from a path with a % in it
    with open_store(f"expected a model at {name}, found none"):
        import mlflow
        from mlflow.models import Model

        path = mlflow.artifacts.download_artifacts(name, dst_path=folder.name)
        loader = Model.load(path).flavors.get("python_function", {}).get("loader_module")
        if loader != "mlflow.pyfunc.loaders.code_model":
            sys.exit(
                f"error: expected a model that train made at {name}, found one of another kind, perhaps a pickle; "
                "it was not loaded"
            )
        model = mlflow.pyfunc.load_model(path)
        shape = model.metadata.get_input_schema().inputs[0].shape[1:]

    def ask(images: np.ndarray) -> tuple[list[str], np.ndarray]:
        try:
            answer = model.predict(images)
        except Exception as error:  # the model may raise anything
            raise StageError(
                f"{name} cannot classify images {tuple(shape)}, the shape of its signature in dvc.yaml: "
                f"{shorten(f'{type(error).__name__}: {error}')}"
            ) from None
        finally:
            folder.cleanup()  # the model's code is there
        return list(answer.columns[1:]), answer.iloc[:, 1:].to_numpy()

    return shape, ask


if __name__ == "__main__":
    main()
