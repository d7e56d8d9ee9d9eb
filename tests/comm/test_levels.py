from __future__ import annotations

import os

import pytest
import torch

from shoal.comm.group import Carrier, Group
from shoal.comm.levels import Hosts, Levels
from shoal.comm.threads import run
from shoal.errors import StalledError
from shoal.start import find_carrier
from tests.comm.carriers import TIMEOUT
from tests.comm.shared import pretending
from tests.pool import Pool


def test_members_by_host() -> None:
    hosts = Hosts.among([7, 7, 4, 7, 4])
    assert hosts == Hosts(((0, 1, 3), (2, 4)), (0, 0, 1, 0, 1))
    assert hosts.two_levels


@pytest.mark.parametrize("hosts", [[0], [0, 0, 0], [0, 1, 2]])
def test_one_level_is_enough(hosts: list[int]) -> None:
    assert not Hosts.among(hosts).two_levels


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 2, 2, 0]])
def test_every_owner_is_spoken_to_by_one_member_of_every_other_host(hosts: list[int], turn: int) -> None:
    group = Hosts.among(hosts)
    spoken = [(m, owner) for m in range(len(hosts)) for owner in group.spoken_to(m, turn)]
    for owner, home in enumerate(group.home):
        assert sorted(group.home[m] for m, to in spoken if to == owner) == sorted({*group.home} - {home})
    for m, owner in spoken:
        assert m == group.speaker(group.home[m], owner, turn)


def test_equal_hosts_share_the_talking() -> None:
    hosts = Hosts.among([0, 0, 0, 1, 1, 1])
    assert [hosts.spoken_to(m, 0) for m in range(6)] == [[3], [4], [5], [0], [1], [2]]


def test_unequal_hosts_take_turns() -> None:
    hosts = Hosts.among([0, 0, 1])
    assert [[hosts.spoken_to(m, turn) for m in range(3)] for turn in range(2)] == [[[2], [], [0, 1]], [[], [2], [0, 1]]]


@pytest.mark.parametrize(
    ("hosts", "most"),
    [([0], 0), ([0, 0], 1 / 2), ([0, 1], 1 / 2), ([0, 0, 1, 1], 3 / 4), ([0, 0, 1, 1, 1, 1, 1, 1], 11 / 8)],
)
def test_what_the_last_member_receives(hosts: list[int], most: float) -> None:
    assert Hosts.among(hosts).received(len(hosts) - 1) == most


def test_ranks_of_hosts() -> None:
    levels = Levels.of(5, (2, 3))
    assert levels.hosts == (0, 0, 1, 1, 1)
    assert levels.together((2, 4))
    assert not levels.together((1, 2))
    assert Levels.of(3, ()).hosts == Levels.one(3).hosts == (0, 0, 0)


# ---------------------------------------------------------------- gathers


def gathered(carrier: Carrier, sizes: list[int]) -> tuple[list[float], int]:
    """What a rank has after a gather, and how many bytes it has sent to other hosts."""
    group = Group("world", range(carrier.size), carrier)
    bounds = [sum(sizes[:r]) for r in range(len(sizes) + 1)]
    flat = torch.full((bounds[-1],), -1.0)
    mine = flat[bounds[group.rank] : bounds[group.rank + 1]]
    mine.copy_(torch.arange(bounds[group.rank], bounds[group.rank + 1]))
    group.gather("gather", flat, bounds).wait()
    group.gather("gather", flat, bounds, "named").wait()
    return flat.tolist(), carrier.levels.crossed["gather"] // 2


@pytest.mark.parametrize("order", [None, 1, 2])
@pytest.mark.parametrize(
    ("ranks_per_host", "sizes"), [((2, 2), [5, 8, 0, 3]), ((2, 1), [4, 1, 6]), ((1, 3, 2), [9, 2, 2, 7, 1, 0])], ids=str
)
def test_a_part_crosses_to_another_host_once(
    ranks_per_host: tuple[int, ...], sizes: list[int], order: int | None
) -> None:
    results = run(
        len(sizes), lambda _rank: gathered(find_carrier(1.0)[0], sizes), seed=order, ranks_per_host=ranks_per_host
    )
    assert [flat for flat, _ in results] == [list(range(sum(sizes)))] * len(sizes)
    assert [crossed for _, crossed in results] == [4 * size * (len(ranks_per_host) - 1) for size in sizes]


# ---------------------------------------------------------------- what others wait for


def crosswise(carrier: Carrier) -> list[float]:
    """Ranks 1 and 3 wait for a word of rank 0. It comes when ranks 0 and 2 have all pieces, some of them from 1 and 3."""
    group = Group("world", range(4), carrier)
    flat = torch.full((8,), -1.0)
    flat[2 * group.rank : 2 * group.rank + 2] = group.rank
    pending = group.gather("gather", flat, [0, 2, 4, 6, 8])
    word = torch.zeros(1)
    if group.rank == 2:
        pending.wait()
        group.swap("all", [[[word]], [], [], []], [[]] * 4, "here").wait()
    if group.rank == 0:
        pending.wait()
        group.swap("all", [[]] * 4, [[], [], [[word]], []], "here").wait()
        group.swap("word", [[[word]] if r in (1, 3) else [] for r in range(4)], [[]] * 4, "of 0").wait()
    elif group.rank in (1, 3):
        group.swap("word", [[]] * 4, [[[word]], [], [], []], "of 0").wait()
    pending.wait()
    return flat.tolist()


def test_pieces_are_passed_on_whatever_a_rank_waits_for() -> None:
    assert (
        run(4, lambda _rank: crosswise(find_carrier(1.0)[0]), ranks_per_host=(2, 2)) == [[0, 0, 1, 1, 2, 2, 3, 3]] * 4
    )


def crosswise_among_processes() -> list[float]:
    with pretending(2):
        carrier, _ = find_carrier(TIMEOUT, "shared")
    assert carrier.levels.hosts == (0, 0, 2, 2)
    try:
        return crosswise(carrier)
    finally:
        carrier.close()


def test_processes_pass_pieces_on_whatever_they_wait_for(pool: Pool) -> None:
    """Rank 1 waits for a neighbour, rank 3 for a rank of the other host."""
    results = pool.run(crosswise_among_processes, world=4, timeout=20)
    assert results == [[0, 0, 1, 1, 2, 2, 3, 3]] * 4


def nobody_speaks() -> None:
    with pretending(2):
        carrier, _ = find_carrier(TIMEOUT, "shared")
    try:
        group = Group("world", range(4), carrier)
        flat, word = torch.zeros(8), torch.zeros(1)
        relay = group.gather("gather", flat, [0, 2, 4, 6, 8])
        awaited = 1 if group.rank == 0 else 3 - group.rank  # a neighbour, or somebody afar
        try:
            group.swap("word", [[]] * 4, [[[word]] if r == awaited else [] for r in range(4)], "never").wait()
        finally:
            assert relay.ready()
    except StalledError as e:
        carrier.fail(str(e))
        raise
    finally:
        carrier.close()


def test_who_passes_on_meanwhile_still_hears_that_nobody_moves(pool: Pool) -> None:
    with pytest.raises(StalledError, match="in 'word world never'"):
        pool.run(nobody_speaks, world=4, timeout=20)


def alone_on_a_host() -> tuple[int, ...]:
    with pretending(2):
        carrier, _ = find_carrier(TIMEOUT, "auto")
    try:
        flat, _ = gathered(carrier, [3, 4, 5])
        assert flat == list(range(12)), int(os.environ["RANK"])
        return carrier.levels.hosts
    finally:
        carrier.close()


def test_a_rank_alone_on_its_host_knows_the_others(pool: Pool) -> None:
    assert pool.run(alone_on_a_host, world=3, timeout=20) == [(0, 0, 2)] * 3
