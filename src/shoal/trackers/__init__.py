"""Where numbers of a run go besides its `events.jsonl`: one protocol, one file per outside library."""

from shoal.trackers.mlflow import MLflow
from shoal.trackers.protocol import Tracker
from shoal.trackers.tensorboard import TensorBoard
from shoal.trackers.wandb import WandB

__all__ = ["MLflow", "TensorBoard", "Tracker", "WandB"]
