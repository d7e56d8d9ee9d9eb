"""MLflow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from shoal.trackers.protocol import check_installed, load

_REFUSED = re.compile(r"[^A-Za-z0-9_\-./ :]")
"""MLflow takes no metric whose name has one of these."""


class MLflow:
    """A run of MLflow. Its own variables (MLFLOW_TRACKING_URI) hold. A metric "acc@1" is "acc_1" there.

    Args:
        experiment: its name there.
        name: of the run; None: made up there.

    Raises:
        EnvironmentFault: mlflow is not installed.
    """

    def __init__(self, experiment: str, name: str | None = None) -> None:
        check_installed("mlflow", "mlflow")
        self.experiment, self.name = experiment, name

    def begin(self, settings: Mapping[str, object]) -> None:
        self._mlflow = load("mlflow")
        self._mlflow.set_experiment(self.experiment)
        self._mlflow.start_run(run_name=self.name)
        self._mlflow.log_params(dict(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({_REFUSED.sub("_", name): value for name, value in values.items()}, step=step)

    def saved(self, step: int, path: Path) -> None:
        self._mlflow.set_tag("checkpoint", str(path))

    def end(self) -> None:
        self._mlflow.end_run()
