"""Which ranks share this host's memory, and how they come to see each other's."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shoal.comm.arena import Arena, View
from shoal.comm.group import Group
from shoal.comm.levels import Levels
from shoal.comm.pairwise import Gloo
from shoal.comm.rings import ALIVE, Ring, reserved
from shoal.comm.shared_memory import Neighbour, Shared
from shoal.errors import EnvironmentFault

_NONCE = 16  # bytes at the beginning of an arena, after the word that says whether its rank lives


def identity() -> bytes:
    """Equal for processes that can reach each other's memory: the same kernel, the same process and network namespaces.

    Two containers, or two network namespaces that play hosts, are two hosts.
    """
    parts = [Path("/proc/sys/kernel/random/boot_id").read_text()]
    parts += [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
    return hashlib.sha256("".join(parts).encode()).digest()


def join_host(carrier: Gloo, *, wanted: bool) -> Gloo | Shared:
    """The same carrier, or one that shares memory with neighbours, if there are any. Collective.

    Args:
        carrier: between all ranks.
        wanted: did somebody ask for shared memory by name?

    Raises:
        EnvironmentFault: it was asked for, and there is none.
    """
    world = Group("world", range(carrier.size), carrier)
    arena, here, why = _arena(carrier.size)
    nonce = secrets.token_bytes(_NONCE)
    card = bytes(32 + 16 + _NONCE)
    if arena is not None:
        arena.map[8 : 8 + _NONCE] = nonce
        card = here + os.getpid().to_bytes(8, "little") + arena.fd.to_bytes(8, "little") + nonce
    cards = world.share("host", card)
    mates = [r for r, c in enumerate(cards) if arena is not None and c[:32] == card[:32]]
    views = {r: _view(cards[r], arena) for r in mates if r != carrier.rank and arena is not None}
    told = world.share("host", bytes(r == carrier.rank or views.get(r) is not None for r in range(carrier.size)))
    del carrier.sent["host"]  # of no model
    carrier.levels = Levels(_hosts([c[:32] for c in cards], told))
    if arena is None or not all(told[a][b] for a in mates for b in mates):
        why = why or "processes may not open each other's files under /proc"
        mates = []
    if len(mates) < 2:
        if arena is not None:
            arena.close()
        if wanted:
            raise _refusal(carrier, why or "no other rank is on its host")
        return carrier
    assert arena is not None
    near: dict[int, Neighbour] = {}
    for rank, view in views.items():
        assert view is not None
        ring = Ring(arena, view, mates.index(carrier.rank), mates.index(rank), rank)
        try:
            near[rank] = Neighbour(ring, os.pidfd_open(int.from_bytes(cards[rank][32:40], "little")))
        except OSError as e:  # it has ended since
            raise carrier.broken("host", rank, RuntimeError(e.strerror)) from None
    return Shared(carrier, near, arena)


def _hosts(identities: Sequence[bytes], told: Sequence[bytes]) -> list[int]:
    """A number for the host of every rank: that of its first rank, if all its ranks see each other's memory."""
    numbers: list[int] = []
    for rank, here in enumerate(identities):
        mates = [r for r, there in enumerate(identities) if there == here]
        numbers.append(mates[0] if any(here) and all(told[a][b] for a in mates for b in mates) else rank)
    return numbers


def _refusal(carrier: Gloo, why: str) -> EnvironmentFault:
    """The other ranks hear of it too: some may have found neighbours."""
    error = EnvironmentFault(
        f"rank {carrier.rank} shares no memory with other ranks: {why}", remedy='carrier="auto", or carrier="gloo"'
    )
    carrier.fail(f"EnvironmentFault: {error}")
    carrier.close()
    return error


def _arena(ranks: int) -> tuple[Arena | None, bytes, str]:
    """This rank's arena and where it is, or why there is none."""
    if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        return None, b"", "this system has no memfd or no pidfd"
    try:
        os.close(os.pidfd_open(os.getpid()))
        here, arena = identity(), Arena(reserved(ranks))
    except OSError as e:
        return None, b"", f"no memory can be mapped ({e.strerror})"
    arena.words[0] = ALIVE
    return arena, here, ""


def _view(card: bytes, mine: Arena | None) -> View | None:
    """Another rank's arena, if it can be opened and is the one that it means."""
    pid, fd, nonce = int.from_bytes(card[32:40], "little"), int.from_bytes(card[40:48], "little"), card[48:]
    assert mine is not None
    with suppress(OSError):
        found = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        try:
            view = View(found, mine.nbytes)
        finally:
            os.close(found)
        return view if view.map[8 : 8 + _NONCE] == nonce else None
    return None
