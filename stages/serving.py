"""The model as MLflow serves it: made from this code and the weights, without a pickle.

MLflow runs this file when it logs the model, which needs no PyTorch, and when it loads it; no stage imports it.
"""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

BATCH_SIZE = 1000


class ServedLeNet(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        from stages.lenet import read_model

        self.model = read_model(Path(context.artifacts["model"]))

    def predict(self, context, model_input, params=None):  # no type hints: MLflow would take them as a schema
        """The class, and the probability of each class, of images uint8 (N, *shape), N ≥ 1, as in the data set."""
        import torch

        from stages.lenet import predict

        images = torch.from_numpy(np.ascontiguousarray(model_input, dtype=np.uint8))
        logits = predict(self.model, images, BATCH_SIZE)
        answer = pd.DataFrame(logits.softmax(1).numpy(), columns=self.model.classes)
        answer.insert(0, "class", [self.model.classes[label] for label in logits.argmax(1)])
        return answer


mlflow.models.set_model(ServedLeNet())
