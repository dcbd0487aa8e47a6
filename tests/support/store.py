"""The MLflow store of a project, as a test reads it."""

import mlflow
from mlflow.entities import Run

from support.project import Project


class Store:
    """The MLflow store of a project, read with MLflow's own client."""

    def __init__(self, project: Project) -> None:
        self.uri = f"sqlite:///{project.folder / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(self.uri)
        experiment = self.client.get_experiment_by_name("fashion-mnist-lenet")
        assert experiment
        self.experiment_id = experiment.experiment_id

    def runs(self, stage: str) -> list[Run]:
        """The stage's runs, newest first."""
        return list(self.client.search_runs([self.experiment_id], f"tags.stage = '{stage}'"))

    def run(self, stage: str) -> Run:
        (run,) = self.runs(stage)
        return run

    def curve(self, run: Run, metric: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, metric)]
