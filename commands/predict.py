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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.stage import StageError, shorten

MODEL = "models/lenet.safetensors"
SIZE = 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG or JPEG")
    parser.add_argument("--model", default=MODEL, help=f"file, or models:/… in MLflow (default: {MODEL})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        read = [read_image(path) for path in args.images]
        answers = predict(args.model, np.stack([image for image, _ in read]))
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


def read_image(path: Path) -> tuple[np.ndarray, bool]:
    """Return uint8 (28, 28), white on black, and whether it was inverted for that.

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
                grey = _grey(image)
    except UnidentifiedImageError:
        raise StageError(f"{path}: expected a PNG or JPEG image, found something else") from None
    except OSError as error:
        raise StageError(f"cannot read {path}: {shorten(error.strerror or error)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise StageError(f"{path}: expected at most {Image.MAX_IMAGE_PIXELS:,} pixels, found more") from None
    except Exception as error:  # Pillow's decoders may raise anything on a damaged file
        raise StageError(f"{path} is damaged: {shorten(f'{type(error).__name__}: {error}')}") from None
    pixels = np.asarray(grey)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    inverted = bool(np.median(border) > 127)
    if inverted:
        grey, border = ImageOps.invert(grey), 255 - border
    return np.asarray(ImageOps.pad(grey, (SIZE, SIZE), Image.Resampling.LANCZOS, int(np.median(border)))), inverted


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


def predict(model: str, images: np.ndarray) -> list[dict[str, Any]]:
    """The class, its probability and the top three of each image in uint8 (N, 28, 28).

    Raises StageError if there is no such model.
    """
    classes, probabilities = _ask_mlflow(model, images) if model.startswith("models:/") else _ask_file(model, images)
    answers = []
    for row in probabilities:
        top = [{"class": classes[label], "probability": float(row[label])} for label in np.argsort(-row)[:3]]
        answers.append({**top[0], "top": top})
    return answers


def _ask_file(model: str, images: np.ndarray) -> tuple[list[str], np.ndarray]:
    import torch

    from stages import lenet

    read = lenet.read_model(Path(model))
    return read.classes, lenet.predict(read, torch.from_numpy(images), len(images)).softmax(1).numpy()


def _ask_mlflow(model: str, images: np.ndarray) -> tuple[list[str], np.ndarray]:
    from dvc_mlflow.project import Project
    from dvc_mlflow.store import Model, Store, describe, mlflow, quiet

    quiet()
    try:
        Store(Project(Path.cwd()))
        with tempfile.TemporaryDirectory() as folder:  # MLflow loads nothing from a path with a % in it
            path = mlflow.artifacts.download_artifacts(model, dst_path=folder)
            loader = Model.load(path).flavors.get("python_function", {}).get("loader_module")
            if loader != "mlflow.pyfunc.loaders.code_model":
                raise StageError(
                    f"expected a model that train made at {model}, found one of another kind, perhaps a "
                    "pickle; it was not loaded"
                )
            answer = mlflow.pyfunc.load_model(path).predict(images)
    except StageError:
        raise
    except Exception as error:  # the store's or the model's, of any kind
        raise StageError(f"expected a model at {model}, found none: {describe(error)}") from None
    return list(answer.columns[1:]), answer.iloc[:, 1:].to_numpy()


if __name__ == "__main__":
    main()
