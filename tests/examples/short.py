"""Running the short examples: in workers of the pool, or whole as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.pool import Pool

EXAMPLES = Path(__file__).parents[2] / "examples"
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SHOAL_")
STRATEGIES = ("zero1", "zero3")


def load(name: str) -> ModuleType:
    """An example as a module."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return import_module(name)


def found(name: str, small: dict[str, Any], argv: Sequence[str]) -> Any:
    """What rank 0 finds when the example's constants are these."""
    example, common = load(name), load("common")
    for constant, value in small.items():
        setattr(example, constant, value)
    return common.work(example.train, common.parse(example.OPTIONS, argv))


def by_all(pool: Pool, name: str, small: dict[str, Any], *argv: str) -> tuple[Any, list[Any]]:
    """What one process finds, and what two workers find under each strategy."""
    alone = pool.run(found, name, small, [*argv, "--strategy", "ddp"], world=1)[0]
    return alone, [pool.run(found, name, small, [*argv, "--strategy", s], world=2)[0] for s in STRATEGIES]


def program(name: str, *argv: str, timeout: float = 300.0) -> dict[str, str]:
    """Run the example as a reader does. Returns what it prints in the end, by name."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(PLACES)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *argv]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    lines = (line.rpartition(" ") for line in done.stdout.splitlines() if not line.startswith("step "))
    return {what.strip(): value for what, _, value in lines}
