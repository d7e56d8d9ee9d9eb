"""Averages over the leaves of a step."""

from __future__ import annotations

import math
import struct

from shoal.comm.meet import Meeting, Want
from shoal.data.loader import Handed
from shoal.leaves import Node, Tree, Weighed, weigh

_VALUE = struct.Struct("<qdd")  # leaf, value, weight


class Means:
    """Collects the numbers of this rank's leaves until the step's last one."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.handed: Handed | None = None
        self.calls = 0
        self.values: dict[int, dict[int, tuple[float, float]]] = {}

    def begin(self, handed: Handed) -> None:
        """A leaf begins."""
        self.handed, self.calls = handed, 0
        if handed.turn == 0:
            self.values = {}

    def weigh(self, weight: float) -> None:
        if self.handed is not None:
            self.handed = self.handed._replace(weight=weight)

    def mean(self, value: float, cell: int, step: int) -> float | None:
        """See `Job.mean`. The n-th call in a leaf belongs to the n-th call in the others."""
        handed = self.handed
        assert handed is not None, "begin comes first"
        mine = self.values.setdefault(self.calls, {})
        self.calls += 1
        if handed.leaf is not None:
            mine[handed.leaf] = (value, handed.weight)
        if handed.turn < handed.turns.run_by(cell) - 1:
            return None
        self.meeting.meet(Want.MEAN, step)
        packed = b"".join(_VALUE.pack(leaf, v, w) for leaf, (v, w) in mine.items())
        room = max(len(leaves) for leaves in handed.turns.assignment) * _VALUE.size
        packed += _VALUE.pack(-1, 0.0, 0.0) * ((room - len(packed)) // _VALUE.size)
        tree: Tree[Weighed[float]] = Tree(handed.turns.leaves, weigh(lambda x, w: x * w, lambda a, b: a + b))
        found: dict[int, tuple[float, float]] = {}
        for data in self.meeting.world.share("mean", packed):
            found |= {leaf: (v, w) for leaf, v, w in _VALUE.iter_unpack(data) if leaf >= 0}
        for leaf in range(handed.turns.leaves):
            v, w = found.get(leaf, (0.0, 0.0))
            tree.put(Node(0, leaf), Weighed(v, w) if w else Weighed(None))
        total = tree.take()
        if total.value is None:
            return None
        return total.value if total.alone else total.value / math.fsum(w for _, w in found.values())
