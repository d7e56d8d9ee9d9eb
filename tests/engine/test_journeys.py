"""Who goes on when: journeys made of waits that the test opens by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence

import pytest
from torch import nn
from torch.optim import SGD

import shoal
from shoal.comm.group import FAR, NEAR, Done, Pending, Strips
from shoal.comm.levels import Levels
from shoal.comm.meter import Meter
from shoal.engine.journeys import Gate, Journeys
from tests.pool import Pool


class Door:
    """A wait that is over when the test says so; who waits for it in earnest opens it."""

    def __init__(self) -> None:
        self.open = False
        self.waited = 0

    def ready(self) -> bool:
        return self.open

    def wait(self) -> Sequence[Strips]:
        self.waited += 1
        self.open = True
        return ()

    def release(self) -> None:
        return


def way(log: list[str], name: str, *stages: Pending) -> Generator[Pending, None, None]:
    for number, stage in enumerate(stages):
        yield stage
        log.append(f"{name}{number}")


def test_what_is_open_goes_on_and_the_rest_stays() -> None:
    log, ends = list[str](), list[int]()
    journeys = Journeys(Levels.one(2), ordered=False, limit=100)
    journeys.arrived = ends.append
    first, second = Door(), Door()
    journeys.start(1, way(log, "a", first, Done()), 10)
    journeys.start(2, way(log, "b", second), 10)
    second.open = True
    journeys.progress()
    assert log == ["b0"]
    assert ends == [2]
    first.open = True
    journeys.progress()
    assert log == ["b0", "a0", "a1"]
    assert ends == [2, 1]
    assert not journeys.under_way


def test_too_much_under_way_waits_for_the_oldest_and_never_for_itself() -> None:
    log = list[str]()
    doors = [Door(), Door(), Door()]
    journeys = Journeys(Levels.one(2), ordered=False, limit=25)
    for unit, door in enumerate(doors):
        journeys.start(unit, way(log, str(unit), door), 10)
    assert [door.waited for door in doors] == [1, 0, 0]
    journeys.start(3, way(log, "3", Door()), 1000)
    assert [door.waited for door in doors] == [1, 1, 1]
    assert list(journeys.under_way) == [3]


def test_those_who_wait_for_the_same_go_on_together_in_their_order() -> None:
    log = list[str]()
    shared, other = Door(), Door()
    journeys = Journeys(Levels.one(2), ordered=True, limit=100)
    for unit, door in ((1, shared), (2, other), (3, shared)):
        journeys.start(unit, way(log, str(unit), door, Door()), 1)
    journeys.wait_for(1)
    assert log[:2] == ["10", "30"]
    assert shared.waited == 1


def test_nothing_goes_on_by_itself_where_order_is_all() -> None:
    log, door = list[str](), Door()
    door.open = True
    journeys = Journeys(Levels.one(2), ordered=True, limit=100)
    journeys.start(1, way(log, "a", door), 1)
    journeys.progress()
    assert log == []
    journeys.finish()
    assert log == ["a0"]


def test_behind_gates_goes_what_is_needed_first() -> None:
    log = list[str]()
    journeys = Journeys(Levels.one(2), ordered=False, limit=100)
    late = Door()
    journeys.start(1, way(log, "a", Gate(), Done()), 1)
    journeys.start(2, way(log, "b", late, Gate(), Done()), 1)
    journeys.all_started([2, 1])
    journeys.progress()
    assert log == []  # one has not come to its gate yet
    late.open = True
    journeys.progress()
    assert log[0] == "b0"
    assert log.index("b1") < log.index("a0")
    journeys.finish()
    assert not journeys.under_way


def test_shared_memory_needs_less_under_way_than_a_network() -> None:
    assert Meter(0, 4, shared=True).plenty == NEAR
    assert Meter(0, 4).plenty == FAR
    assert Meter(0, 4, shared=True, ranks_per_host=(2, 2)).plenty == FAR


def test_whatever_a_rank_waits_for_others_go_on() -> None:
    """As when the first one's result is behind the others' sums, for which the other ranks wait."""
    log, levels = list[str](), Levels.one(2)
    first, second = Awaited(levels), Awaited(levels)
    journeys = Journeys(levels, ordered=False, limit=100)
    journeys.start(1, way(log, "a", first), 1)
    journeys.start(2, way(log, "b", second, Opens(first)), 1)
    threading.Timer(0.02, lambda: setattr(second, "open", True)).start()
    journeys.wait()
    assert log == ["b0", "b1", "a0"]
    assert first.waited == 1  # though others saw that it was there while somebody waited for it
    assert not levels.errands


def test_a_vote_too_lets_them_go_on() -> None:
    """A wait that has nothing to do with gradients."""
    log, levels = list[str](), Levels.one(2)
    door, vote = Door(), Awaited(levels)
    journeys = Journeys(levels, ordered=False, limit=100)
    journeys.start(1, way(log, "a", door, Opens(vote)), 1)
    door.open = True
    vote.wait()
    assert log == ["a0", "a1"]


def test_where_order_is_all_no_wait_moves_others() -> None:
    levels = Levels.one(2)
    Journeys(levels, ordered=True, limit=100).start(1, way([], "a", Door()), 1)
    assert not levels.errands


def test_a_flow_that_waits_itself_is_not_run_again_meanwhile() -> None:
    """Nor any other: what moves one journey is in the middle of something."""
    levels, log = Levels.one(2), list[str]()
    inner, other = Awaited(levels), Door()
    journeys = Journeys(levels, ordered=False, limit=100)

    def waits() -> Generator[Pending, None, None]:
        yield Done()
        threading.Timer(0.02, lambda: setattr(inner, "open", True)).start()
        other.open = True
        inner.wait()
        log.append("a0")

    journeys.start(1, waits(), 1)
    journeys.start(2, way(log, "b", other), 1)
    journeys.progress()
    assert log == ["a0", "b0"]


class Awaited(Door):
    """Who waits for it looks after errands until it is open, as with carriers; not for ever."""

    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.levels = levels

    def wait(self) -> Sequence[Strips]:
        self.waited += 1
        ends = time.monotonic() + 5
        while not self.open:
            assert time.monotonic() < ends
            self.levels.go_on()
            time.sleep(0.001)
        self.levels.go_on()
        return ()


class Opens(Done):
    """Over at once; and so is what waits behind the door."""

    def __init__(self, door: Door) -> None:
        super().__init__()
        self.door = door

    def wait(self) -> Sequence[Strips]:
        self.door.open = True
        return ()


def limit_of_a_job() -> int:
    with shoal.init("zero2", run_dir="none") as job:
        model = nn.Linear(4, 4)
        job.prepare(model, SGD(model.parameters(), lr=0.1))
        (binding,) = job._all_bound()  # pyright: ignore[reportPrivateUsage]
        return binding.engine.gradients.journeys.limit


@pytest.mark.parametrize(("carrier", "limit"), [("shared", NEAR), ("gloo", FAR)])
def test_a_job_keeps_to_what_its_carrier_needs(pool: Pool, carrier: str, limit: int) -> None:
    assert pool.run(limit_of_a_job, env={"SHOAL_CARRIER": carrier}) == [limit, limit]
