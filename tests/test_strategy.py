"""The user's words for a strategy: what they mean, what is refused, and the table that they give."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import shoal
from shoal.comm.threads import run
from shoal.errors import StrategyError
from shoal.strategy import NAMED, Cut, Shard, Strategy

REFUSED: dict[str, tuple[Callable[[], object], str, str]] = {
    "unknown name": (lambda: Strategy.named("zero4"), "there is no strategy 'zero4'", "did you mean 'zero3'?"),
    "far name": (lambda: Strategy.named("?"), "there is no strategy '?'", "known: ddp, zero1, zero2, zero3, hybrid"),
    "no ranks": (lambda: Strategy(shard=Shard.OPTIMIZER, ranks_per_copy=0), "ranks_per_copy=0", "at least 1"),
    "no number": (lambda: Strategy(ranks_per_copy="two"), "ranks_per_copy='two'", 'None or "host"'),
    "nothing to share": (
        lambda: Strategy(ranks_per_copy=4),
        "ranks_per_copy=4 but nothing is sharded",
        "shard=Shard.OPTIMIZER or more, or ranks_per_copy=1 for data parallelism",
    ),
    "no leaves": (lambda: Strategy(leaves=0), "leaves=0: a step has at least one leaf", "leaves=1"),
    "precision": (
        lambda: Strategy(precision="half16"),
        "precision='half16' is not known",
        "known: float32, bfloat16, float16",
    ),
    "twig": (lambda: Strategy(twig=0), "twig=0: a twig has at least one leaf", "twig=1"),
    "masters": (
        lambda: Strategy(precision="float16", masters=False),
        "masters=False with precision='float16'",
        'precision="bfloat16", or masters=True',
    ),
    "reduce": (lambda: Strategy(reduce="int8"), "reduce='int8' is not known", "known: float32, bfloat16"),
    "numerics": (lambda: Strategy(numerics="quick"), "numerics='quick' is not known", "known: exact, fast"),
    "fast cells": (
        lambda: Strategy(tensor=2, numerics="fast"),
        'numerics="fast" with tensor=2',
        'numerics="exact", or tensor=1',
    ),
    "world": (
        lambda: Strategy(shard=Shard.PARAMETERS, ranks_per_copy=4).settled(6, 6),
        "a world of 6 ranks does not divide into copies of 4",
        "ranks_per_copy=3, or a world that is a multiple of 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_nearest_possible(name: str) -> None:
    make, what, remedy = REFUSED[name]
    with pytest.raises(StrategyError) as e:
        make()
    assert what in str(e.value)
    assert remedy in str(e.value)


def test_refused_in_init_too() -> None:
    with pytest.raises(StrategyError, match="there is no strategy 'zero'"):
        run(1, lambda _: shoal.init("zero"))
    with pytest.raises(StrategyError, match="a world of 3 ranks does not divide into copies of 2"):
        run(3, lambda _: shoal.init("zero3", ranks_per_copy=2))


def test_names_and_what_they_leave_open() -> None:
    assert [s.name for s in NAMED.values()] == list(NAMED)
    grids = {name: s.settled(8, 4).ranks_per_copy for name, s in NAMED.items()}
    assert grids == {"ddp": 1, "zero1": 8, "zero2": 8, "zero3": 8, "hybrid": 4}
    assert NAMED["ddp"].settled(8, 4).leaves == 8
    assert Strategy(leaves=3).settled(8, 4).leaves == 3
    assert Strategy(shard=Shard.GRADIENTS, ranks_per_copy=2).settled(8, 4).ranks_per_copy == 2


def test_a_strategy_is_a_value() -> None:
    assert Strategy() == NAMED["ddp"]
    assert len({Strategy(), Strategy(cut=Cut.PARAMETER), NAMED["ddp"]}) == 2
    with pytest.raises(AttributeError):
        Strategy().leaves = 3  # type: ignore[misc]
