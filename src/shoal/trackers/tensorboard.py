"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from shoal.trackers.protocol import check_installed, load


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def add_text(self, tag: str, text_string: str, global_step: int = 0) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Scalars for `tensorboard --logdir PATH`.

    Args:
        path: a directory.

    Raises:
        EnvironmentFault: tensorboard is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        check_installed("tensorboard", "tensorboard")
        self.path = Path(path)

    def begin(self, settings: Mapping[str, object]) -> None:
        self._writer = cast(_Writer, load("torch.utils.tensorboard").SummaryWriter(str(self.path)))
        self._writer.add_text("settings", "\n\n".join(f"{name}: {value}" for name, value in settings.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def saved(self, step: int, path: Path) -> None:
        self._writer.add_text("checkpoint", str(path), step)

    def end(self) -> None:
        self._writer.close()
