"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from shoal.trackers.protocol import check_installed, load


class _Run(Protocol):
    summary: dict[str, object]

    def log(self, data: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class WandB:
    """A run of Weights & Biases. Its own variables (WANDB_MODE, WANDB_API_KEY) hold.

    Args:
        project: its name there.
        name: of the run; None: made up there.

    Raises:
        EnvironmentFault: wandb is not installed.
    """

    def __init__(self, project: str, name: str | None = None) -> None:
        check_installed("wandb", "wandb")
        self.project, self.name = project, name

    def begin(self, settings: Mapping[str, object]) -> None:
        self._run = cast(_Run, load("wandb").init(project=self.project, name=self.name, config=dict(settings)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def saved(self, step: int, path: Path) -> None:
        self._run.summary["checkpoint"] = str(path)

    def end(self) -> None:
        self._run.finish()
