"""Processes that are made slow by chance, or made to believe that they are on several hosts."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shoal.comm import host
from shoal.comm.common import Currency, Seen
from shoal.comm.mpi import Mpi, Requests
from shoal.comm.pairwise import Gloo, Works
from shoal.comm.shared_memory import Letters, Shared
from shoal.start import find_carrier
from tests.comm.carriers import TIMEOUT

MOMENTS: list[tuple[type, str]] = [
    (Shared, "post"), (Letters, "wait"), (Letters, "release"), (Seen, "publish"), (Currency, "wait"),
    (Gloo, "post"), (Works, "wait"), (Works, "release"), (Mpi, "post"), (Requests, "wait"),
]  # fmt: skip
GLANCES: list[tuple[type, str]] = [(kind, "ready") for kind in (Letters, Currency, Works, Requests)]
LONGEST = 0.003


@contextmanager
def neighbours(*, per_host: int = 0, timeout: float = TIMEOUT) -> Iterator[Shared]:
    """This rank's carrier. `per_host`: so many ranks believe to be on one host; 0: all."""
    with pretending(per_host):
        carrier, _ = find_carrier(timeout, "shared")
    assert isinstance(carrier, Shared)
    try:
        yield carrier
    finally:
        carrier.close()


@contextmanager
def pretending(per_host: int) -> Iterator[None]:
    real, rank = host.identity, int(os.environ["RANK"])
    if per_host:
        host.identity = lambda: bytes([rank // per_host + 1]) * 32
    try:
        yield
    finally:
        host.identity = real


@contextmanager
def delayed(seed: int) -> Iterator[None]:
    """Sleep before and after everything that this rank does with others, for a time that the seed says.

    What has come is not always seen at once, either.
    """
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"]
    chance = random.Random(f"{seed} {rank}")
    real = [(kind, name, getattr(kind, name)) for kind, name in [*MOMENTS, *GLANCES]]

    def late(look: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda transfer: chance.random() < 0.5 and look(transfer)

    def slow(work: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(*arguments: Any) -> Any:
            nap(chance)
            result = work(*arguments)
            nap(chance)
            return result

        return slowly

    for kind, name, work in real:
        setattr(kind, name, late(work) if name == "ready" else slow(work))
    try:
        yield
    finally:
        for kind, name, work in real:
            setattr(kind, name, work)


def nap(chance: random.Random) -> None:
    if chance.random() < 0.4:
        time.sleep(chance.random() * LONGEST)
