"""Does one round of messages take less time than two? Measured between the ranks of a group, once for each size.

Everybody's sum of what all have takes two rounds that send little (to the owner of a part, and back), or one in which
everybody sends all to all (Thakur, Rabenseifner and Gropp 2005 choose in this way between algorithms of MPI).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from shoal.comm.group import Group

MOST = 2**18
"""Bytes up to which it is tried at all: of more, rounds pass while other bytes travel."""
_WEIGHTS = bytes(8)
_TRIES = 3


def one_round_for(group: Group, nbytes: int) -> bool:
    """Do so many bytes take less time in one round than in two, if they lie in the host's memory? Collective."""
    levels = group.carrier.levels
    most = levels.one_round if levels.asked is None else levels.asked
    if most is None and group.size > 1 and 0 < nbytes <= MOST:
        if (group.ranks, nbytes) not in levels.crossover:
            levels.crossover[group.ranks, nbytes] = _is_faster(group, nbytes)
        return levels.crossover[group.ranks, nbytes]
    return group.size > 1 and 0 < nbytes <= (most or 0)


def _is_faster(group: Group, nbytes: int) -> bool:
    """Before two rounds ranks tell each other what their leaves weigh; one has no need to wait for that."""
    whole, part = bytes(nbytes), bytes(-(-nbytes // group.size))

    def one() -> None:
        group.share("crossover", whole)

    def two() -> None:
        for what in (_WEIGHTS, part, part):
            group.share("crossover", what)

    times = [min(each) for each in zip(*((_took(one), _took(two)) for _ in range(_TRIES)), strict=True)]
    told = [struct.unpack("<2d", b) for b in group.share("crossover", struct.pack("<2d", *times))]
    slowest_one, slowest_two = (max(each) for each in zip(*told, strict=True))
    return slowest_one < slowest_two


def _took(do: Callable[[], None]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began
