"""What a tracker has to do."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Protocol

from shoal.errors import EnvironmentFault


class Tracker(Protocol):
    """Takes what rank 0 reports. Whatever it raises is said once, and ends nothing but itself."""

    def begin(self, settings: Mapping[str, object]) -> None:
        """A run begins, with these resolved settings of the job."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step."""
        ...

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is whole."""
        ...

    def end(self) -> None:
        """The run is over."""
        ...


def check_installed(package: str, extra: str) -> None:
    """Is it there? All ranks look, so that none of them begins a run that another cannot.

    Raises:
        EnvironmentFault: it is not.
    """
    if find_spec(package) is None:
        raise EnvironmentFault(f"the package {package} is not installed", remedy=f"pip install 'shoal[{extra}]'")


def load(name: str) -> ModuleType:
    """Import late: these packages take long, and only rank 0 needs them."""
    return import_module(name)
