"""Export the model to ONNX, and verify that it predicts the same.

python -m commands.export models/lenet.onnx
python -m commands.export --model models/other.safetensors other.onnx

The input `images` is uint8 (N, *shape), as in the data set: (N, 28, 28), white on black. The output `probabilities` is
float32 (N, classes); the names of the classes are in the file's metadata, under `classes`. The file is written only if
onnxruntime predicts the same class as PyTorch for every test image, with probabilities within 1e-5.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from stages.stage import StageError, write

MODEL = "models/lenet.safetensors"
DATASET = "data/fashion-mnist/test.safetensors"
TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="FILE", help="ONNX file to write")
    parser.add_argument("--model", type=Path, default=Path(MODEL), help=f"weights (default: {MODEL})")
    parser.add_argument("--dataset", type=Path, default=Path(DATASET), help=f"test set (default: {DATASET})")
    args = parser.parse_args()
    try:
        export(args.output, args.model, args.dataset)
    except StageError as error:
        sys.exit(f"error: {error}")


def export(output: Path, path: Path, dataset: Path) -> None:
    """Write the model at `path` as ONNX. Raises StageError if onnxruntime does not match PyTorch."""
    import logging
    import warnings

    import numpy as np
    import onnx
    import onnxruntime
    import torch
    from torch import nn

    from stages.dataset import read_dataset
    from stages.lenet import predict, read_model

    model, images = read_model(path).eval(), read_dataset(dataset).images
    example = torch.from_numpy(images[:2].copy())
    stream = io.BytesIO()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            nn.Sequential(model, nn.Softmax(1)),
            (example,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            dynamo=True,
            verbose=False,
        )
    logging.disable(logging.NOTSET)
    proto = program.model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(proto, {"classes": json.dumps(model.classes)})
    onnx.save_model(proto, stream)

    session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["probabilities"], {"images": images})
    expected = predict(model, torch.from_numpy(images), 1000).softmax(1).numpy()
    others, distance = int((found.argmax(1) != expected.argmax(1)).sum()), float(np.abs(found - expected).max())
    if others or distance > TOLERANCE:
        raise StageError(
            f"expected onnxruntime to match PyTorch on {len(images):,} images, found {others} different classes "
            f"and probabilities up to {distance:.1e} apart; nothing is written"
        )
    write(output, stream.getvalue())
    print(f"{output}: matches PyTorch on all {len(images):,} test images (largest difference {distance:.1e})")


if __name__ == "__main__":
    main()
