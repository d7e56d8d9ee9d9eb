"""When units are updated: as their gradients come, not as they are needed; and no more at once than others can bear."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import SimpleNamespace
from typing import Any, cast

from shoal.comm.group import Done, Pending
from shoal.comm.levels import Levels
from shoal.engine.journeys import Journeys
from shoal.engine.unit import Unit
from shoal.engine.updates import Decided, Updates
from tests.engine.test_journeys import Door

MANY = 2**20


def unit(index: int, elements: int) -> Unit:
    made = SimpleNamespace(index=index, mine=slice(0, elements), hide=lambda: None, wait=lambda: None)
    return cast(Unit, made)


def way(*stages: Pending) -> Generator[Pending, None, None]:
    yield from stages


def updated(units: Sequence[Unit], started: Sequence[int], stages: Pending) -> list[list[int]]:
    """The units of every call of the optimizer. Their gradients set out in the order `started`."""
    calls = list[list[int]]()
    journeys = Journeys(Levels.one(1), ordered=False, limit=1000)
    gradients = SimpleNamespace(journeys=journeys, hand_out=lambda *_, **__: None, forget=lambda _: None)
    updates = Updates(cast(Any, gradients), lambda *_: None)
    updates.order = [u.index for u in units]
    for index in started:
        journeys.start(index, way(type(stages)()), 1)
    decided = Decided(step=0, touched={"x"}, apart=False, update=lambda some: calls.append([u.index for u in some]))
    updates.decide(units, decided, later=False)
    assert not journeys.under_way
    assert not updates.coming
    return calls


def test_what_comes_first_is_updated_first() -> None:
    """The gradients of the unit that the next forward needs first set out last."""
    assert updated([unit(i, 10) for i in range(3)], [2, 1, 0], Door()) == [[2], [1], [0]]


def test_small_units_that_are_there_are_updated_at_once() -> None:
    assert updated([unit(i, 10) for i in range(3)], [2, 1, 0], Done()) == [[0, 1, 2]]


def test_between_large_ones_others_sums_are_looked_at() -> None:
    sizes = (MANY, MANY // 2, MANY // 2, 5)
    assert updated([unit(i, n) for i, n in enumerate(sizes)], [3, 2, 1, 0], Done()) == [[0], [1, 2], [3]]
