"""Ranks tell each other the weights of their leaves. What a unit's gradients are worth is known when all have."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from shoal.comm.group import Done
from shoal.comm.meet import Meeting, Met, Want
from shoal.comm.mesh import Mesh
from shoal.comm.meter import Meter
from shoal.engine.journeys import Journeys
from shoal.engine.leaf import Leaf
from shoal.engine.turns import Turns

_A_MOMENT = 0.005
"""Seconds for which ranks of several hosts wait for each other's weights: a network is idle until they are there."""


class Votes(Done):
    """Those of one step, which tell what leaves weigh."""

    counted = False

    def ready(self) -> bool:
        return self.counted


class Weights:
    """Those of one model's leaves, as far as this rank knows.

    Args:
        mesh: the grid of ranks.
        meeting: where ranks tell them.
        number: of the model in its job.
        journeys: of gradients, the first of which wait for them.
        voted: do they come with the votes only?
    """

    def __init__(self, mesh: Mesh, meeting: Meeting, number: int, journeys: Journeys, *, voted: bool) -> None:
        self.mesh, self.meeting, self.number, self.journeys, self.voted = mesh, meeting, number, journeys, voted
        carrier = mesh.world.carrier
        self.far = not carrier.levels.together(range(carrier.size))

    def begin(self, turns: Turns) -> None:
        """A step begins."""
        self.turns, self.said = turns, -1
        self.hearing: Met | None = None  # not all are known yet
        self.votes = Votes()

    def say(self, leaf: Leaf) -> None:
        """Once a turn: everybody hears the weights of everybody's leaves so far, and computes on until then."""
        if self.said >= leaf.turn:
            return
        self.hear()
        self.said = leaf.turn
        if leaf.number is not None:
            self.turns.weights[leaf.number] = leaf.weight
        if self.voted:
            return
        self.hearing = self.meeting.begin(Want.REDUCE, leaf.serial, self._mine(), model=self.number)
        if self.journeys.ordered or leaf.cursor is None or (self.far and self.hearing.ready_within(_A_MOMENT)):
            self.hear()

    def _mine(self) -> bytes:
        mine = self.turns.of(self.mesh.cell)
        return struct.pack(f"<{len(mine)}d", *(self.turns.weights[n] for n in mine)).ljust(8 * self.turns.leaves, b"\0")

    def with_vote(self, vote: bytes) -> bytes:
        """What this rank says at the end of a step."""
        return self._mine() + vote if self.voted else vote

    def from_votes(self, told: Sequence[bytes]) -> list[bytes]:
        """The votes alone."""
        if not self.voted:
            return list(told)
        self._take(told)
        self.votes.counted = True
        return [said[8 * self.turns.leaves :] for said in told]

    def hear(self) -> None:
        """Wait until all have said theirs; gradients that wait for that begin their journeys."""
        hearing = self.hearing
        if hearing is not None:
            self.learn()
            self.journeys.passed(hearing)

    def learn(self) -> None:
        """Take what all have said."""
        hearing, self.hearing = self.hearing, None
        if hearing is not None:
            self._take(hearing.answers())

    def _take(self, answers: Sequence[bytes]) -> None:
        turns = self.turns
        if isinstance(self.mesh.world.carrier, Meter):
            turns.assume_full()  # in a dry run everybody answers what this rank says
            return
        for rank, answer in enumerate(answers):
            theirs = turns.of(self.mesh.cell_of(rank))
            turns.learn(dict(zip(theirs, struct.unpack_from(f"<{len(theirs)}d", answer), strict=True)))
