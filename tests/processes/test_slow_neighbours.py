"""Processes that share memory and are slow by chance at everything that they do with each other: the bits stay."""

from __future__ import annotations

import os

import pytest

from shoal.strategy import Strategy
from tests.comm.shared import delayed, pretending
from tests.equivalence.models import Outcome, on_threads, trainer
from tests.equivalence.test_table import STRATEGIES
from tests.pool import Pool


def train(strategy: Strategy | str, leaves: int, seed: int, per_host: int) -> Outcome | None:
    with delayed(seed), pretending(per_host):
        carrier = "auto" if per_host else "shared"  # a rank may be alone on its host
        return trainer(strategy, timeout=20.0, leaves=leaves, carrier=carrier, global_batch=120)(
            int(os.environ["RANK"])
        )


@pytest.mark.parametrize(("world", "leaves"), [(2, 2), (2, 5), (3, 2), (3, 5)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_slow_neighbours(name: str, world: int, leaves: int, pool: Pool) -> None:
    results = pool.run(train, name, leaves, 10 * world + leaves, 0, world=world)
    assert results == [on_threads(1, "ddp", leaves=leaves, global_batch=120)] + [None] * (world - 1)


@pytest.mark.parametrize(
    ("name", "world"), [("hybrid", 4), *((name, world) for name in STRATEGIES for world in (3, 4))]
)
def test_two_hosts(name: str, world: int, pool: Pool) -> None:
    """Two ranks and the others. Some are near, some far; `hybrid` shards within hosts, the others across."""
    results = pool.run(train, name, 5, 1, 2, world=world, ranks_per_host=2)
    assert results[0] == on_threads(1, "ddp", leaves=5, global_batch=120)
