"""DVC's executions as MLflow runs: a record of what any DVC pipeline did."""

__version__ = "0.2.0"
