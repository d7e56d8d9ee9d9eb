"""The leaves of one step: who computes which, in which turn, and which partial sums that leaves where. No tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from shoal.engine.sums import Known, known
from shoal.leaves import Assignment, Node, Weighed


class Turns:
    """One step. In turn t every rank computes its t-th leaf, or serves the others if it has fewer.

    Args:
        leaves: L of the job; a step with less data has only the first `present` of them, the others weigh nothing.
        assignment: the leaves of every rank.
        ranks_per_copy: to find the ranks of a copy.
        every_leaf: are gradients reduced after every leaf?
        all_turns: do all ranks run user code in all turns?
        twig: so many neighbouring leaves make one partial sum before the tree.
    """

    def __init__(
        self, leaves: int, present: int, assignment: Assignment, ranks_per_copy: int, *, every_leaf: bool,
        all_turns: bool = False, twig: int = 1,
    ) -> None:  # fmt: skip
        self.all_turns, self.twig = all_turns, twig
        self.summed = False  # do gradients of the leaves add up, as where a loop divides its losses itself?
        self.twigs = -(-leaves // twig)
        self.leaves, self.present, self.assignment = leaves, present, assignment
        self.ranks_per_copy, self.every_leaf = ranks_per_copy, every_leaf
        self.weights = {leaf: math.nan if leaf < present else 0.0 for leaf in range(leaves)}
        self.count = max(1, *(len(self.of(r)) for r in range(len(assignment))))

    def of(self, rank: int) -> tuple[int, ...]:
        """The leaves of a rank that have data."""
        return tuple(leaf for leaf in self.assignment[rank] if leaf < self.present)

    @classmethod
    def one_each(cls, ranks: int) -> Turns:
        """Every rank computes one full leaf."""
        turns = cls(ranks, ranks, tuple((r,) for r in range(ranks)), 1, every_leaf=False)
        turns.assume_full()
        return turns

    def run_by(self, rank: int) -> int:
        """How many turns run user code on a rank: at least one, so that all ranks run it."""
        return self.count if self.all_turns else max(1, len(self.of(rank)))

    def leaf(self, rank: int, turn: int) -> int | None:
        mine = self.of(rank)
        return mine[turn] if turn < len(mine) else None

    def reduces(self, turn: int) -> bool:
        """Do gradients travel inside a copy at the end of this turn?"""
        return turn == self.count - 1 or (self.every_leaf and turn % self.twig == self.twig - 1)

    def learn(self, weights: Mapping[int, float]) -> None:
        """Nobody knows (NaN) the weights of leaves to come; who hears late may have one of those by now."""
        self.weights.update({leaf: weight for leaf, weight in weights.items() if not math.isnan(weight)})

    def assume_full(self) -> None:
        """Leaves of unknown weight are full ones."""
        self.weights = {leaf: 1.0 if math.isnan(w) else w for leaf, w in self.weights.items()}

    @property
    def total(self) -> float:
        """The sum of all weights, taken in the order of the leaves."""
        return math.fsum(self.weights.values())

    @property
    def divisor(self) -> float:
        """What the sum of the leaves' gradients is divided by."""
        return 1.0 if self.summed and self.total else self.total

    def _weighed(self, leaf: int) -> Weighed[bool]:
        weight = self.weights[leaf]
        assert not math.isnan(weight), f"leaf {leaf} has no weight yet"
        return Weighed(True, weight) if weight else Weighed(None)

    def absent(self, rank: int) -> tuple[int, ...]:
        return tuple(leaf for leaf in self.assignment[rank] if leaf >= self.present)

    def enters(self, rank: int, turn: int) -> tuple[int, ...]:
        """The leaves whose gradients a rank takes into its own sums in this turn; absent ones in the last."""
        leaf = self.leaf(rank, turn)
        present = () if leaf is None else (leaf,)
        return present + (self.absent(rank) if turn == self.count - 1 else ())

    def twig_size(self, twig: int) -> int:
        """How many leaves it has."""
        return min(self.twig, self.leaves - twig * self.twig)

    def given(self, rank: int, turn: int) -> Known:
        """The partial sums that a rank hands in at the end of a turn in which gradients travel."""
        first = turn // self.twig * self.twig if self.every_leaf else 0
        return self._known([leaf for t in range(first, turn + 1) for leaf in self.enters(rank, t)])

    def copy_holds(self, copy: int) -> Known:
        """The partial sums of one copy when the step is over."""
        ranks = range(copy * self.ranks_per_copy, (copy + 1) * self.ranks_per_copy)
        return self._known([leaf for r in ranks for leaf in self.assignment[r]])

    @property
    def sums(self) -> list[int]:
        """How many partial sums each rank has in the end, whatever its leaves weigh."""
        twigs = [sorted({leaf // self.twig for leaf in mine}) for mine in self.assignment]
        return [len(known(self.twigs, [(Node(0, twig), Weighed(True)) for twig in mine])) for mine in twigs]

    def rank_holds(self, rank: int) -> Known:
        """The partial sums of one rank's own leaves in a tree without twigs."""
        return known(self.leaves, [(Node(0, leaf), self._weighed(leaf)) for leaf in self.assignment[rank]])

    def _known(self, leaves: Sequence[int]) -> Known:
        twigs: dict[int, list[Weighed[bool]]] = {}
        for leaf in leaves:
            twigs.setdefault(leaf // self.twig, []).append(self._weighed(leaf))
        return known(self.twigs, [(Node(0, twig), _together(parts)) for twig, parts in twigs.items()])


def _together(parts: Sequence[Weighed[bool]]) -> Weighed[bool]:
    """What the leaves of a twig make: one alone keeps its weight."""
    found = [part for part in parts if part.value]
    return found[0] if len(found) == 1 else Weighed(True if found else None)
