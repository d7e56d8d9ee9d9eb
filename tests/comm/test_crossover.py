"""When one round takes less time than two, and receives that others hear of before anything is sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from shoal.comm import crossover
from shoal.comm.crossover import MOST, one_round_for
from shoal.comm.group import Carrier, Group
from shoal.comm.threads import run
from shoal.errors import PeerError
from shoal.start import find_carrier
from tests.comm.carriers import TIMEOUT
from tests.pool import Pool


def measured(
    monkeypatch: pytest.MonkeyPatch, *ranks: tuple[float, float], ask: int = 1
) -> tuple[list[list[bool]], int]:
    """What each rank hears as often as it asks, and how many times were taken.

    Args:
        ranks: what one round and two take on each of them.
    """
    left: dict[int, Iterator[float]] = {}
    taken: list[float] = []

    def took(do: Callable[[], None]) -> float:
        rank = torch.initial_seed()
        do()
        taken.append(next(left[rank]))
        return taken[-1]

    monkeypatch.setattr(crossover, "_took", took)

    def main(rank: int) -> list[bool]:
        torch.manual_seed(rank)  # each rank has its own
        one, two = ranks[rank]
        left[rank] = iter((one + 9, two, one, two, one + 1, two + 1))  # the first is disturbed
        carrier = find_carrier(1.0)[0]
        carrier.levels.one_round = None
        return [one_round_for(Group(f"some{n}", range(len(ranks)), carrier), 100) for n in range(ask)]

    return run(len(ranks), main), len(taken)


@pytest.mark.parametrize(
    ("ranks", "faster"),
    [(((1.0, 2.0), (1.5, 1.6)), True), (((1.0, 2.0), (2.0, 1.0)), False), (((1.0, 1.0),) * 2, False)],
)
def test_the_slowest_rank_decides_for_all(
    ranks: tuple[tuple[float, float], ...], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of several tries counts."""
    assert measured(monkeypatch, *ranks) == ([[faster]] * 2, 12)


def test_the_same_ranks_measure_a_size_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, (1.0, 2.0), (1.0, 2.0), ask=3) == ([[True] * 3] * 2, 12)


def test_what_is_measured_is_what_would_be_sent() -> None:
    def main(_rank: int) -> tuple[int, int]:
        carrier = find_carrier(1.0)[0]
        carrier.levels.one_round = None
        one_round_for(Group("all", range(3), carrier), 100)
        return carrier.sent["crossover"], len(carrier.levels.crossover)

    assert run(3, main) == [(2 * (3 * (100 + 8 + 34 + 34) + 16), 1)] * 3


def test_settings_decide_and_large_models_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "_is_faster", lambda _group, _nbytes: pytest.fail("measures"))

    def main(_rank: int) -> list[bool]:
        carrier = find_carrier(1.0, one_round=100)[0]
        group, alone = Group("some", range(2), carrier), Group("one", [carrier.rank], carrier)
        found = [one_round_for(group, 100), one_round_for(group, 101), one_round_for(group, 0), one_round_for(alone, 1)]
        find_carrier(1.0)
        carrier.levels.one_round = None
        return [*found, one_round_for(group, MOST + 1)]

    assert run(2, main) == [[True, False, False, False, False]] * 2


def test_where_no_time_passes_nothing_is_measured() -> None:
    assert run(2, lambda _rank: one_round_for(Group("all", range(2), find_carrier(1.0)[0]), 4)) == [False] * 2


# ---------------------------------------------------------------- receives that are announced


def announced(kind: str) -> list[float]:
    """A share that was expected a round ahead, one that comes without, one that never comes; one with who has left."""
    carrier: Carrier = find_carrier(TIMEOUT, kind)[0]
    group, got = Group("all", range(2), carrier), list[float]()
    ahead = group.expect_share("some", 1, "ahead 0")
    for number in range(3):
        sharing = group.begin_share("some", bytes([10 * number + group.rank]), ahead, f"ahead {number}")
        ahead = group.expect_share("some", 1, f"ahead {number + 1}")
        got += [b[0] for b in sharing.bytes()]
    got += [b[0] for b in group.share("some", bytes([100 + group.rank]))]
    if group.rank == 0:
        carrier.close()
    else:
        time.sleep(0.5)
        group.expect_share("some", 1, "ahead 8")  # is no error: whoever waits will hear
        with pytest.raises(PeerError):
            group.share("some", b"x")
        carrier.close()
    group.expect_share("some", 1, "ahead 9")
    return got


@pytest.mark.parametrize("kind", ["gloo", "shared"])
def test_announced_or_not_it_comes(kind: str, pool: Pool) -> None:
    assert pool.run(announced, kind) == [[0, 1, 10, 11, 20, 21, 100, 101]] * 2


def elsewhere() -> None:
    carrier = find_carrier(TIMEOUT, "gloo")[0]
    group = Group("all", range(2), carrier)
    ahead = group.expect_share("some", 1, "ahead 0")
    with pytest.raises(AssertionError, match="'some all ahead 0' was to come elsewhere"):
        group.begin_share("some", b"x", key="ahead 0")
    del ahead
    carrier.close()


def test_what_is_announced_comes_nowhere_else(pool: Pool) -> None:
    pool.run(elsewhere)
