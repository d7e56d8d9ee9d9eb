"""How large a message may be for one round to take less time than two: measured, once for the ranks of a group.

Everybody's sum of what all have takes two rounds that send little (to the owner of a part, and back), or one in which
everybody sends all to all (Thakur, Rabenseifner and Gropp 2005 choose in this way between algorithms of MPI).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from shoal.comm.group import Group

SIZES = (2**12, 2**15, 2**18)
"""Bytes for which both are tried, up to the first for which one round does not take less."""
MOST = SIZES[-1]
_TRIES = 3


def one_round_for(group: Group, nbytes: int) -> bool:
    """Do so many bytes take less time in one round than in two, if they lie in the host's memory? Collective."""
    levels = group.carrier.levels
    most = levels.one_round if levels.asked is None else levels.asked
    if most is None and group.size > 1 and nbytes <= MOST:
        if group.ranks not in levels.crossover:
            levels.crossover[group.ranks] = _measured(group)
        most = levels.crossover[group.ranks]
    return group.size > 1 and 0 < nbytes <= (most or 0)


def _measured(group: Group) -> int:
    best = 0
    for nbytes in SIZES:
        part = bytes(nbytes // group.size)
        whole = bytes(nbytes)

        def two(part: bytes = part) -> None:
            group.share("crossover", part)
            group.share("crossover", part)

        def one(whole: bytes = whole) -> None:
            group.share("crossover", whole)

        times = [min(each) for each in zip(*((_took(one), _took(two)) for _ in range(_TRIES)), strict=True)]
        told = [struct.unpack("<2d", b) for b in group.share("crossover", struct.pack("<2d", *times))]
        slowest_one, slowest_two = (max(each) for each in zip(*told, strict=True))
        if slowest_one >= slowest_two:
            break
        best = nbytes
    return best


def _took(do: Callable[[], None]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began
