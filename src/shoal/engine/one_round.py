"""Gradients of a small model: everybody sends all of its partial sums to everybody, and adds up all of them.

Note: what that saves. Sums go in one message for all units, to be added up when the votes have told what leaves weigh:
a step takes one transfer beside the votes, and no time but that of the slower of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shoal.comm.group import Done, Group, Pending, Strips
from shoal.engine.sums import Known, Mean, Sum, mean, new_tree
from shoal.engine.unit import Unit
from shoal.leaves import Node, Weighed

_ALIGN = 64


class Round(Done):
    """One step's transfer, which begins when the sums of the last unit are there."""

    def __init__(self, frames: list[Tensor]) -> None:
        super().__init__()
        self.frames = frames  # one for each of this rank's sums
        self.boxes: Sequence[Sequence[Strips]] = ()
        self.joined = 0
        self.pending: Pending | None = None

    def ready(self) -> bool:
        return self.pending is not None and self.pending.ready()

    def wait(self) -> Sequence[Strips]:
        assert self.pending is not None, "waited for before all units have joined"
        return self.pending.wait()


class OneRound:
    """That of one model, whose ranks say a step ahead that they will receive.

    Args:
        copies: the ranks that agree.
        units: all that are trained.
    """

    def __init__(self, copies: Group, units: Sequence[Unit]) -> None:
        self.copies, self.name, self.device = copies, copies.new_key(), units[0].device
        self.count, self.nbytes = 0, 0
        self.places: dict[int, list[tuple[int, int]]] = {}  # of a unit's runs in a frame, in bytes
        for unit in units:
            self.places[unit.index] = [self._place((b - a) * unit.dtypes.reduce.itemsize) for a, b in unit.runs]
        self.dtypes = {unit.index: unit.dtypes.reduce for unit in units}
        self.runs = {unit.index: unit.runs for unit in units}
        self.now: Round | None = None
        self.ahead: tuple[list[list[Strips]], object] | None = None

    def _place(self, nbytes: int) -> tuple[int, int]:
        start, self.nbytes = self.nbytes, self.nbytes + -(-nbytes // _ALIGN) * _ALIGN
        return start, start + nbytes

    @property
    def tensors(self) -> list[Tensor]:
        """What waits for the next step's gradients."""
        return [t for sums in (self.ahead[0] if self.ahead else ()) for strips in sums for t in strips]

    def join(self, unit: int, mine: Sequence[tuple[Node, Weighed[Sum]]], held: Sequence[int]) -> Round:
        """A unit's sums of this step go into its message.

        Args:
            held: how many sums each rank has, whatever its leaves weigh.
        """
        now = self.now = self.now or Round([self._frame() for _ in mine])
        for frame, (_, weighed) in zip(now.frames, mine, strict=True):
            if weighed.value is not None:
                for place, strip in zip(self._views(frame, unit), weighed.value.strips, strict=True):
                    place.copy_(strip)
        now.joined += 1
        if now.joined == len(self.places):
            self._send(now, held)
        return now

    def _send(self, now: Round, held: Sequence[int]) -> None:
        now.boxes, expected = self.ahead or (self._boxes(held), None)
        sent = [[frame] for frame in now.frames]
        now.pending = self.copies.swap("agree", [sent] * self.copies.size, now.boxes, self._key())
        del expected  # it is under way
        self.now, self.count = None, self.count + 1
        following = self._boxes(held)
        self.ahead = following, self.copies.expect("agree", following, self._key())

    def result(self, unit: int, now: Round, theirs: Sequence[Known], weights: float, leaves: int) -> Mean:
        """The step's gradient, when the transfer is over.

        Args:
            theirs, weights, leaves: see `exchange.agree`.
        """
        tree = new_tree(leaves)
        for rank, has in enumerate(theirs):
            frames = now.frames if rank == self.copies.rank else [frame for (frame,) in now.boxes[rank]]
            for (node, weighed), frame in zip(has, frames, strict=True):
                value = Sum(list(self._views(frame, unit))) if weighed.value else None
                tree.put(node, Weighed(value, weighed.weight))
        return Mean(self.runs[unit], mean(tree.take(), weights))

    def _views(self, frame: Tensor, unit: int) -> Iterator[Tensor]:
        for start, stop in self.places[unit]:
            yield frame[start:stop].view(self.dtypes[unit])

    def _boxes(self, held: Sequence[int]) -> list[list[Strips]]:
        me = self.copies.rank
        return [[] if r == me else [[self._frame()] for _ in range(sums)] for r, sums in enumerate(held)]

    def _frame(self) -> Tensor:
        return torch.zeros(self.nbytes, dtype=torch.uint8, device=self.device)

    def _key(self) -> str:
        return f"{self.name} round {self.count}"
