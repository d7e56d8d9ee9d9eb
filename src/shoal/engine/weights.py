"""Ranks tell each other the weights of their leaves. What a unit's gradients are worth is known when all have."""

from __future__ import annotations

import struct

from shoal.comm.meet import Meeting, Met, Want
from shoal.comm.mesh import Mesh
from shoal.comm.meter import Meter
from shoal.engine.journeys import Journeys
from shoal.engine.leaf import Leaf
from shoal.engine.turns import Turns

_A_MOMENT = 0.005
"""Seconds for which ranks of several hosts wait for each other's weights: a network is idle until they are there."""


class Weights:
    """Those of one model's leaves, as far as this rank knows.

    Args:
        mesh: the grid of ranks.
        meeting: where ranks tell them.
        number: of the model in its job.
        journeys: of gradients, the first of which wait for them.
    """

    def __init__(self, mesh: Mesh, meeting: Meeting, number: int, journeys: Journeys) -> None:
        self.mesh, self.meeting, self.number, self.journeys = mesh, meeting, number, journeys
        carrier = mesh.world.carrier
        self.far = not carrier.levels.together(range(carrier.size))

    def begin(self, turns: Turns) -> None:
        """A step begins."""
        self.turns, self.said = turns, -1
        self.hearing: Met | None = None  # not all are known yet

    def say(self, leaf: Leaf) -> None:
        """Once a turn: everybody hears the weights of everybody's leaves so far, and computes on until then."""
        if self.said >= leaf.turn:
            return
        self.hear()
        self.said = leaf.turn
        turns = self.turns
        mine = turns.of(self.mesh.cell)
        if leaf.number is not None:
            turns.weights[leaf.number] = leaf.weight
        payload = struct.pack(f"<{len(mine)}d", *(turns.weights[n] for n in mine)).ljust(8 * turns.leaves, b"\0")
        self.hearing = self.meeting.begin(Want.REDUCE, leaf.serial, payload, model=self.number)
        if self.journeys.ordered or leaf.cursor is None or (self.far and self.hearing.ready_within(_A_MOMENT)):
            self.hear()

    def hear(self) -> None:
        """Wait until all have said theirs; gradients that wait for that begin their journeys."""
        hearing = self.hearing
        if hearing is not None:
            self.learn()
            self.journeys.passed(hearing)

    def learn(self) -> None:
        """Take what all have said."""
        hearing, self.hearing = self.hearing, None
        if hearing is None:
            return
        turns = self.turns
        if isinstance(self.mesh.world.carrier, Meter):
            turns.assume_full()  # in a dry run everybody answers what this rank says
            return
        for rank, answer in enumerate(hearing.answers()):
            theirs = turns.of(self.mesh.cell_of(rank))
            turns.learn(dict(zip(theirs, struct.unpack_from(f"<{len(theirs)}d", answer), strict=True)))
