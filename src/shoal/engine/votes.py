"""What ranks tell each other at the end of a step, from which all of them decide the same about its update."""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from typing import NamedTuple

from shoal.engine.scale import Overflow

_OVERFLOW = struct.Struct("<ii")
_NONE = (-1, -1)


class Vote(NamedTuple):
    """One rank's.

    `touched`: parameters that its leaves have touched. `changed`: has a forward changed buffers? `overflow`: the first
    one of its gradients.
    """

    touched: Collection[str]
    changed: bool
    overflow: Overflow | None

    def packed(self, names: Sequence[str]) -> bytes:
        """`size_of(names)` bytes. `names`: of all parameters that are trained."""
        bits = sum(1 << i for i, name in enumerate(names) if name in self.touched)
        bits |= self.changed << len(names)
        return _OVERFLOW.pack(*(self.overflow or _NONE)) + bits.to_bytes(len(names) // 8 + 1, "little")


class Counted(NamedTuple):
    """What any rank has said. `overflow`: the first one in the order of leaves, and its rank."""

    touched: frozenset[str]
    changed: bool
    overflow: tuple[Overflow, int] | None


def counted(votes: Sequence[bytes], names: Sequence[str]) -> Counted:
    """The votes of all ranks, in their order."""
    everyone = 0
    overflows: list[tuple[Overflow, int]] = []
    for rank, vote in enumerate(votes):
        everyone |= int.from_bytes(vote[_OVERFLOW.size :], "little")
        overflow = Overflow(*_OVERFLOW.unpack_from(vote))
        overflows += [(overflow, rank)] if overflow != _NONE else []
    touched = frozenset(name for i, name in enumerate(names) if everyone >> i & 1)
    return Counted(touched, bool(everyone >> len(names)), min(overflows, default=None))


def size_of(names: Sequence[str]) -> int:
    """Bytes of a vote."""
    return _OVERFLOW.size + len(names) // 8 + 1
