"""The same program over every carrier: ranks that are threads, ranks that are processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shoal.comm.group import Carrier, Group
from shoal.comm.threads import run
from shoal.start import find_carrier
from tests.pool import Pool

KINDS = ("threads", "gloo", "shared")
TIMEOUT = 3.0


@contextmanager
def joined(timeout: float = 5 * TIMEOUT) -> Iterator[Carrier]:
    """This rank's carrier, of the kind that `on` was asked for. Ranks that start slowly are no fault here."""
    carrier, _ = find_carrier(timeout, os.environ.get("KIND", "gloo"))
    try:
        yield carrier
    finally:
        carrier.close()


def world_of(carrier: Carrier) -> Group:
    return Group("world", range(carrier.size), carrier)


def on(kind: str, pool: Pool, program: Callable[..., Any], *arguments: object, world: int = 2) -> list[Any]:
    """Run a function at the top of a module on every rank."""
    if kind == "threads":
        return run(world, lambda _rank: program(*arguments))
    return pool.run(_of_kind, kind, program, *arguments, world=world, timeout=20)


def _of_kind(kind: str, program: Callable[..., Any], *arguments: object) -> Any:
    os.environ["KIND"] = kind  # of a worker, which has an environment of its own for every call
    return program(*arguments)
