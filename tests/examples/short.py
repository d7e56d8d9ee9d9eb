"""Running the short examples: in workers of the pool, or whole as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from tests.pool import Pool

EXAMPLES = Path(__file__).parents[2] / "examples"
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SHOAL_")


def load(name: str) -> ModuleType:
    """An example as a module."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return import_module(name)


class Found(NamedTuple):
    """What rank 0 has found."""

    numbers: dict[str, float]
    sha256: str


def found(name: str, small: dict[str, Any], argv: Sequence[str]) -> Found | None:
    """What this rank finds when the example's constants are these."""
    example, common = load(name), load("common")
    with mock.patch.multiple(example, **small) if small else nullcontext():  # the worker serves others after us
        made = common.work(example.train, common.parse(example.OPTIONS, argv))
    return made and Found(made.numbers, made.sha256)  # of a class that every process knows


def alone(pool: Pool, name: str, small: dict[str, Any], *argv: str) -> Found:
    """What one process finds."""
    return pool.run(found, name, small, [*argv, "--strategy", "ddp"], world=1)[0]


def together(pool: Pool, name: str, small: dict[str, Any], *argv: str) -> Found:
    """What two workers find under ZeRO-3."""
    both = pool.run(found, name, small, [*argv, "--strategy", "zero3"], world=2)
    assert both[1] is None
    return both[0]


def program(name: str, *argv: str, timeout: float = 300.0) -> dict[str, str]:
    """Run the example as a reader does. Returns what it prints in the end, by name."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(PLACES)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *argv]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    lines = (line.rpartition(" ") for line in done.stdout.splitlines() if not line.startswith("step "))
    return {what.strip(): value for what, _, value in lines}
