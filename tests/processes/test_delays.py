"""Processes that are slow by chance at everything that they do with each other, over every carrier: the bits stay."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import pytest

from shoal.comm.group import current
from shoal.comm.staged import Staged
from shoal.start import find_carrier
from tests.comm import test_nccl
from tests.comm.shared import delayed, pretending
from tests.equivalence.models import Outcome, on_threads, trainer
from tests.equivalence.test_table import STRATEGIES
from tests.pool import Pool


class Run(NamedTuple):
    """`carrier`: "hosts" are some of `per_host` ranks, "staged" and "nccl" play a device. `seed`: of the delays."""

    carrier: str
    strategy: str
    world: int
    leaves: int
    seed: int
    pending: bool = True
    overlap: bool = True
    clip: float | None = None
    precision: str = "float32"
    per_host: int = 2


@contextmanager
def carried(kind: str, per_host: int) -> Iterator[str]:
    """Gives the name of the carrier, which a given one overrides."""
    if kind == "hosts":
        with pretending(per_host):
            yield "auto"
    elif kind == "nccl":
        with test_nccl.carrier(20.0):
            yield "auto"
    elif kind == "staged":
        token = current.set(Staged(find_carrier(20.0, "gloo")[0], pinned=False))
        try:
            yield "auto"
        finally:
            current.reset(token)
    else:
        yield kind


def train(what: Run) -> Outcome | None:
    settings = {name: getattr(what, name) for name in ("leaves", "pending", "overlap", "clip", "precision")}
    with delayed(what.seed), carried(what.carrier, what.per_host) as carrier:
        return trainer(what.strategy, timeout=20.0, carrier=carrier, global_batch=120, **settings)(
            int(os.environ["RANK"])
        )


@cache
def one_process(leaves: int, clip: float | None, precision: str) -> Outcome:
    return on_threads(1, "ddp", leaves=leaves, clip=clip, precision=precision, global_batch=120)


def check(what: Run, pool: Pool) -> None:
    local = what.per_host if what.carrier == "hosts" else None
    results = pool.run(train, what, world=what.world, ranks_per_host=local)
    assert results == [one_process(what.leaves, what.clip, what.precision)] + [None] * (what.world - 1)


@pytest.mark.every(3)
@pytest.mark.parametrize(("world", "leaves"), [(2, 5), (3, 2)])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("carrier", ["gloo", "shared", "staged", "nccl"])
def test_delays_change_nothing(carrier: str, strategy: str, world: int, leaves: int, pool: Pool) -> None:
    check(Run(carrier, strategy, world, leaves, seed=10 * world + leaves), pool)


@pytest.mark.parametrize(
    ("strategy", "world"), [("hybrid", 4), *((name, world) for name in STRATEGIES for world in (3, 4))]
)
def test_two_hosts(strategy: str, world: int, pool: Pool) -> None:
    """Two ranks and the others. Some are near, some far; `hybrid` shards within hosts, the others across."""
    check(Run("hosts", strategy, world, leaves=5, seed=world), pool)


def chosen(seed: int) -> Run:
    """Any of all that should end in the same bits."""
    chance = random.Random(seed)
    carrier, world = chance.choice(["gloo", "shared", "hosts", "hosts", "staged", "nccl"]), chance.choice([2, 3, 4])
    if carrier == "hosts":
        world = chance.choice([3, 4, 5])
    overlap = chance.random() < 0.8
    return Run(
        carrier, chance.choice(list(STRATEGIES)), world, leaves=chance.choice([1, 2, 3, 4, 5, 6, 8]), seed=seed,
        pending=overlap and chance.random() < 0.7, overlap=overlap, clip=chance.choice([None, 0.5]),
        precision=chance.choice(["float32", "bfloat16"]), per_host=chance.choice([2, 3]) if world > 3 else 2,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_any_of_them(seed: int, pool: Pool) -> None:
    check(chosen(seed), pool)
