"""The watch alone, over a store in memory: what is reported, what ends a wait, and who says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shoal.comm import watch
from shoal.comm.group import LAST_DOING
from shoal.comm.watch import Mark, Verdict, Watch
from shoal.errors import PeerLost, StalledError

TIMEOUT = 0.4


class Store:
    """As torch's, in memory; can be told to hang or to be gone."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.up, self.gone = threading.Event(), False
        self.up.set()

    def _answer(self) -> None:
        self.up.wait(10)
        if self.gone:
            raise RuntimeError("connection was closed")

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._answer()
        return self.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def add(self, key: str, amount: int) -> int:
        total = int(self.values.get(key, b"0")) + amount
        self.set(key, str(total))
        return total

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        if self.values.get(key, b"") == expected.encode():
            self.set(key, value)
        return self.get(key)


class Rank:
    """A watch, and what it did."""

    def __init__(self, store: Store, rank: int, size: int, alive: Callable[[], bool]) -> None:
        self.reports: list[str] = []
        self.watch = Watch(
            store, rank, size, timeout=TIMEOUT, report=self.reports.append, alive=alive, server=0
        )  # fmt: skip

    def ends(self, seconds: float) -> bool:
        """Wait as a carrier does: with a look at the clock now and then. Is the wait ended within `seconds`?"""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.watch.judge() is not None:
                return True
            time.sleep(watch.TICK)
        return False


@contextmanager
def ranks(size: int, store: Store, *, alive: Callable[[], bool] = lambda: True) -> Iterator[list[Rank]]:
    for rank in range(size):
        Watch.enter(store, rank)
    made = [Rank(store, rank, size, alive) for rank in range(size)]
    try:
        yield made
    finally:
        store.up.set()
        for one in made:
            one.watch.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"REPORT": 0.15, "TICK": 0.01, "LOOK": 0.02, "LEFT": 0.1, "ANSWER": 0.2, "LINGER": 0.3}
    for name, seconds in quick.items():
        monkeypatch.setattr(watch, name, seconds)


def test_a_wait_is_reported_once_and_ended_with_a_table() -> None:
    with ranks(3, Store()) as (first, second, third):
        second.watch.at("norm shard #3")
        second.watch.note("has done step 4")
        third.watch.hold("job.save")
        third.watch.hold("job.state_dict")
        time.sleep(0.1)
        begin = time.monotonic()
        first.watch.note("begins leaf turn 2")
        with first.watch.waiting("meet world #5"), third.watch.waiting("file world #1"):
            assert first.ends(5)
        assert TIMEOUT < time.monotonic() - begin < TIMEOUT + 0.3
        table = (
            "    rank 0 waits in 'meet world #5' (begins leaf turn 2)\n"
            "    rank 1 runs since 'norm shard #3' (has done step 4)\n"
            "    rank 2 holds: job.state_dict in 'file world #1' (starts)"
        )
        assert first.reports == [f"rank 0 has waited 0 s\n{table}"]
        error = first.watch.ended.error(0, "meet world #5")
        assert isinstance(error, StalledError)
        assert str(error) == (
            f"shoal[E31] nobody moved for 0.4 s; the last marks are\n{table}\n"
            "  cause: ranks do different things, or one of them is stuck or stopped\n"
            "  try:   if a rank rightly works for longer, raise timeout= (seconds), or do it inside job.whole(model)"
        )


@pytest.mark.parametrize("doing", ["notes", "transfers", "works under a lease"])
def test_who_moves_is_waited_for(doing: str) -> None:
    with ranks(2, Store()) as (first, second), first.watch.waiting("meet world #1"):
        if doing == "works under a lease":
            second.watch.hold("job.whole")
        for n in range(10):
            if doing == "notes":
                second.watch.note("has done something")
            if doing == "transfers":
                second.watch.at(f"gather shard #{n}")
            assert not first.ends(0.1)
        if doing == "works under a lease":
            second.watch.hold("")
        assert first.ends(5)  # and when it stops moving, the count begins
    assert first.reports[0].startswith("rank 0 has waited 0 s\n")


def test_who_waits_under_a_lease_does_not_move() -> None:
    with ranks(2, Store()) as (first, second):
        for rank in (first, second):
            rank.watch.hold("job.save")
        with first.watch.waiting("file world #1"), second.watch.waiting("file world #2"):
            assert first.ends(5)
            assert second.ends(5)


def test_a_short_wait_is_not_looked_at() -> None:
    store = Store()
    with ranks(2, store) as (first, _):
        for _ in range(50):
            with first.watch.waiting("meet world #1"):
                assert not first.ends(0.01)
        assert first.watch.ended is None
        assert first.reports == []


def test_the_first_verdict_is_everybody_s() -> None:
    with ranks(3, Store()) as (first, second, third):
        word = Verdict(PeerLost.code, "rank 2 failed", "ValueError: boom", "see rank 2's own traceback or log")
        assert third.watch.end(word) == word
        assert first.watch.end(Verdict(PeerLost.code, "rank 1 is gone", "", "")) == word
        with second.watch.waiting("gather shard #2"):
            assert second.ends(5)  # it waits for somebody else, and is freed
        assert second.watch.verdict() == word
        assert str(second.watch.ended.error(1, "gather shard #2")) == (
            "shoal[E30] rank 2 failed; rank 1 was in 'gather shard #2'\n"
            "  cause: ValueError: boom\n"
            "  try:   see rank 2's own traceback or log"
        )


def test_nothing_is_known_of_a_rank_that_just_went() -> None:
    with ranks(2, Store()) as (first, _):
        begin = time.monotonic()
        assert first.watch.verdict() is None
        assert time.monotonic() - begin < 0.15  # the store has answered


def test_a_rank_that_has_closed_the_job_is_not_waited_for() -> None:
    with ranks(2, Store()) as (first, second):
        second.watch.note(LAST_DOING)
        with first.watch.waiting("meet world #7"), second.watch.waiting("meet world #7"):
            assert not first.ends(0.25)  # in a meeting it takes part
        begin = time.monotonic()
        with first.watch.waiting("gather shard #7"), second.watch.waiting("meet world #8"):
            assert first.ends(5)
        assert time.monotonic() - begin < TIMEOUT
        assert first.watch.ended.what == f"rank 1 {LAST_DOING}"


def test_a_store_that_hangs() -> None:
    """The rank that serves it is stopped: marks are old, and the clock goes on."""
    store = Store()
    with ranks(2, store) as (_, second):
        store.up.clear()
        begin = time.monotonic()
        with second.watch.waiting("gather shard #1"):
            assert second.ends(5)
        assert time.monotonic() - begin < TIMEOUT + 0.5
        assert second.watch.ended.what.splitlines()[1:] == [
            "    rank 0 is not known of",
            "    rank 1 waits in 'gather shard #1' (starts)",
            "    rank 0, which keeps these marks, does not answer: the marks may be old",
        ]


@pytest.mark.parametrize("how", ["closed", "seen"])
def test_a_store_that_is_gone(how: str) -> None:
    store, alive = Store(), [True]
    with ranks(2, store, alive=lambda: alive[0]) as (_, second):
        store.gone, alive[0] = how == "closed", how == "closed"
        time.sleep(0.05)
        word = Verdict(PeerLost.code, "rank 0 is gone", "", "")
        begin = time.monotonic()
        assert second.watch.verdict() is None
        assert second.watch.end(word) == word
        assert second.watch.deaf
        assert time.monotonic() - begin < 0.1


@pytest.mark.parametrize(("deaf", "waits"), [(0, True), (1, False)])
def test_who_serves_the_store_lingers_until_it_is_read(deaf: int, waits: bool) -> None:
    """A rank that is known to be dead is not waited for."""
    store = Store()
    for rank in range(2):
        Watch.enter(store, rank)
    only = Rank(store, 0, 2, lambda: True)
    only.watch.end(Verdict(PeerLost.code, "rank 1 is gone", "", "", deaf))
    begin = time.monotonic()
    only.watch.linger()
    assert (time.monotonic() - begin >= watch.LINGER) == waits
    only.watch.close()


def test_all_have_read_it() -> None:
    with ranks(3, Store()) as made:
        made[0].watch.end(Verdict(PeerLost.code, "rank 0 failed", "", ""))
        begin = time.monotonic()
        made[0].watch.linger()
        assert time.monotonic() - begin < watch.LINGER


def test_close_ends_its_thread() -> None:
    before = threading.active_count()
    with ranks(2, Store()):
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_marks_in_words() -> None:
    assert str(Mark()) == "runs (starts)"
    assert str(Mark(1, "has done step 0", "norm shard #1")) == "runs since 'norm shard #1' (has done step 0)"
    assert str(Mark(1, "starts", "meet world #1", "job.save")) == "holds: job.save since 'meet world #1' (starts)"
