"""Memory for others to read: what is given out, when it is used again, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from shoal.comm import arena as arenas
from shoal.comm.arena import WARM, Arena, Fence, View
from shoal.errors import EnvironmentFault

MIB = 2**20
RESERVED = 8192


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(RESERVED)
    yield made
    made.close()


def pages(arena: Arena) -> int:
    """Bytes of the file that exist."""
    return os.fstat(arena.fd).st_blocks * 512


def test_no_two_overlap_and_none_lies_in_what_is_reserved(arena: Arena) -> None:
    sizes = [1, 256, 257, 4096, 5000, 100_000, 3, 4096]
    taken = sorted((arena.take(n), n) for n in sizes)
    assert taken[0][0] >= RESERVED
    assert all(a + n <= b for (a, n), (b, _) in pairwise(taken))
    assert all(at % 256 == 0 for at, _ in taken)


def test_what_is_given_back_is_used_again_once_it_is_idle(arena: Arena) -> None:
    first, readers = arena.take(5000), [True]
    arena.give(first, lambda: not readers)
    second = arena.take(5000)
    assert second != first
    readers.clear()
    assert arena.take(5000) == first
    assert arena.take(5000) not in (first, second)


def test_sizes_that_differ_by_little_share_what_was_given_back(arena: Arena) -> None:
    """Messages of ever other lengths must not use up the arena."""
    for nbytes in range(100_000, 130_000, 100):
        arena.give(arena.take(nbytes), lambda: True)
    assert arena.end < RESERVED + 10 * 130_000


def test_fresh_memory_is_zeros(arena: Arena) -> None:
    used = arena.take(1000)
    arena.tensor(used, 1000, torch.uint8).fill_(7)
    arena.give(used, lambda: True)
    fresh = arena.take(1000, fresh=True)
    assert fresh == used
    assert not arena.tensor(fresh, 1000, torch.uint8).any()


def test_memory_costs_nothing_until_it_is_written(arena: Arena) -> None:
    arena.take(100 * MIB)
    assert pages(arena) < MIB


def test_where_a_tensor_lies(arena: Arena) -> None:
    at = arena.take(4000)
    whole = arena.tensor(at, 1000, torch.float32)
    assert arena.offset_of(whole) == at
    assert arena.offset_of(whole[10:]) == at + 40
    assert arena.offset_of(torch.zeros(1000)) is None
    assert arena.tensor(at, 0, torch.float32).numel() == 0


def test_another_view_sees_the_same(arena: Arena) -> None:
    view = View(arena.fd, arena.nbytes)
    at = arena.take(8)
    arena.words[at // 8] = 2**63 + 5
    assert view.words[at // 8] == 2**63 + 5
    view.tensor(at, 2, torch.float32).copy_(torch.tensor([1.5, -2.0]))
    assert arena.tensor(at, 2, torch.float32).tolist() == [1.5, -2.0]


def test_a_full_arena_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "capacity", lambda: 4 * MIB)
    arena = Arena(RESERVED)
    kept = arena.take(2 * MIB)
    with pytest.raises(EnvironmentFault) as caught:
        arena.take(3 * MIB)
    assert str(caught.value) == (
        "shoal[E50] 3072 KiB do not fit into what is left of 4 MiB of shared memory\n"
        "  cause: tensors under way and shards take more memory than this host has\n"
        '  try:   fewer ranks on this host, or carrier="gloo"'
    )
    arena.give(kept, lambda: True)
    assert arena.take(2 * MIB) == kept  # what fits is still given out
    arena.close()


class Steps:
    """A lock that notes what is done with it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def release(self) -> None:
        self.done.append("release")

    def acquire(self) -> None:
        self.done.append("acquire")


@pytest.mark.parametrize(("ordered", "steps"), [(True, []), (False, ["release", "acquire"])])
def test_a_fence_is_a_lock_where_stores_are_reordered(
    ordered: bool, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arenas, "_ORDERED", ordered)
    fence = Fence()
    fence()  # does not wait for itself
    fence._lock = Steps()
    fence()
    assert fence._lock.done == steps


# ---------------------------------------------------------------- between steps


def test_units_of_all_sizes_share() -> None:
    """What came back serves whoever needs half of it or more; others get new memory."""
    arena = Arena(4096)
    first = arena.take(MIB)
    arena.give(first, lambda: True)
    assert arena.take(MIB * 3 // 4) == first
    arena.give(first, lambda: True)
    assert arena.take(MIB // 4) != first
    arena.close()


def test_between_steps_only_the_smallest_parts_keep_their_pages() -> None:
    arena = Arena(4096)
    sizes = [3 * MIB, MIB, MIB, MIB, MIB]
    offsets = [arena.take(size) for size in sizes]
    for offset, size in zip(offsets, sizes, strict=True):
        arena.tensor(offset, size // 4, torch.float32).fill_(1.0)
    busy = True
    arena.give(offsets[-1], lambda: not busy)  # others read it
    for offset in offsets[:-1]:
        arena.give(offset, lambda: True)
    assert (arena.under_way, arena.waiting, pages(arena) // MIB) == (MIB, 6 * MIB, 7)
    arena.rest()
    assert (arena.under_way, arena.waiting, pages(arena) // MIB) == (MIB, 2 * MIB, 3)
    busy = False
    arena.rest()
    assert (arena.under_way, arena.waiting, pages(arena) // MIB) == (0, WARM, 2)
    assert {arena.take(size) for size in sizes} == set(offsets)  # addresses without pages are used again, too
    arena.close()
