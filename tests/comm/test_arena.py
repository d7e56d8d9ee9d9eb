"""Memory that processes share: what is used again, and what is given back to the system."""

from __future__ import annotations

import os

import torch

from shoal.comm.arena import Arena

MIB = 2**20


def written(arena: Arena, offset: int) -> None:
    arena.tensor(offset, MIB // 4, torch.float32).fill_(1.0)


def pages(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def test_units_of_all_sizes_share() -> None:
    """What came back serves whoever needs half of it or more; others get new memory."""
    arena = Arena(4096)
    first = arena.take(MIB)
    arena.give(first, lambda: True)
    assert arena.take(MIB * 3 // 4) == first
    arena.give(first, lambda: True)
    assert arena.take(MIB // 4) != first
    arena.close()


def test_what_steps_do_not_use_loses_its_pages() -> None:
    arena = Arena(4096)
    cold, warm, lent = (arena.take(MIB) for _ in range(3))
    for offset in (cold, warm, lent):
        written(arena, offset)
    busy = True
    arena.give(lent, lambda: not busy)
    arena.give(cold, lambda: True)
    arena.give(warm, lambda: True)
    seen: list[tuple[int, int, int]] = []
    for _ in range(4):
        arena.give(arena.take(MIB), lambda: True)  # each step uses one of the two
        arena.rest()
        seen.append((arena.waiting // MIB, arena.under_way // MIB, pages(arena) // MIB))
    assert seen == [(2, 1, 3), (2, 1, 3), (1, 1, 2), (1, 1, 2)]
    busy = False
    assert (arena.under_way, arena.waiting) == (0, 2 * MIB)
    taken = {arena.take(MIB) for _ in range(3)}
    assert taken == {cold, warm, lent}  # addresses without pages are used again, too
    arena.close()
