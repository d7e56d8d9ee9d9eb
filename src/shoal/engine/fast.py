"""Fast numerics: gradients are weighed here, and added up by the backend in an order of its own.

Note: order. A backend knows what belongs together by the order in which it is started, on all ranks the same. Journeys
begin in the plan's order; what follows a first sum begins in the order of the first sums (`Line`), not as they arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.comm.group import Done, Group, MakeSums, Pending, Strips, Sums
from shoal.comm.mesh import Mesh
from shoal.comm.pool import Pool
from shoal.engine.sums import Mean, Sum, between
from shoal.engine.turns import Turns
from shoal.engine.unit import Unit
from shoal.leaves import Node, Weighed


class Nobody:
    """The sums of a rank over itself."""

    scatters = False

    def all_reduce(self, label: str, tensor: Tensor) -> Pending:
        return Done([[tensor]])

    def reduce_scatter(self, label: str, whole: Tensor) -> Pending:
        return Done([[whole]])


class Axes(NamedTuple):
    """Who adds up inside a copy, and who across copies."""

    shard: Sums
    copies: Sums


def axes_of(mesh: Mesh, device: torch.device) -> Axes | None:
    """What adds up gradients of this device. Collective.

    Returns:
        None: there is nobody else, or some rank's carrier adds up no faster than exact numerics.
    """
    world = mesh.world
    make = world.carrier.sums(device)
    told = world.share("sums", bytes([make is not None]))
    if world.size == 1 or make is None or not all(answer[0] for answer in told):
        return None
    return Axes(_over(mesh.shard, make), _over(mesh.copies, make))


def _over(group: Group, make: MakeSums) -> Sums:
    return make(group.name, group.ranks) if group.size > 1 else Nobody()


# ---------------------------------------------------------------- order


class Line:
    """Transfers that begin when another one is over: in the order in which they have come here."""

    def __init__(self) -> None:
        self.waiting: deque[Later] = deque()
        self._begins = False  # does somebody wait for the first of them? Nobody else does meanwhile

    def after(self, first: Pending, then: Callable[[Strips], Pending]) -> Pending:
        """`then` gets what came with `first`, and starts the rest."""
        later = Later(self, first, then)
        self.waiting.append(later)
        self.progress()
        return later

    def progress(self) -> None:
        """Begin what needs no waiting."""
        while self.waiting and not self._begins and self.waiting[0].first.ready():
            self.begin()

    def begin(self) -> None:
        later = self.waiting[0]
        self._begins = True
        try:
            came = later.first.wait()
        finally:
            self._begins = False
        self.waiting.popleft()
        later.rest = later.then(came[0])


class Later:
    """A transfer that follows another one."""

    def __init__(self, line: Line, first: Pending, then: Callable[[Strips], Pending]) -> None:
        self.line, self.first, self.then = line, first, then
        self.rest: Pending | None = None

    def ready(self) -> bool:
        self.line.progress()
        return self.rest is not None and self.rest.ready()

    def wait(self) -> Sequence[Strips]:
        while self.rest is None:
            self.line.begin()
        return self.rest.wait()

    def release(self) -> None:
        return


# ---------------------------------------------------------------- journeys


class Part(NamedTuple):
    """What of a unit's runs belongs to one owner: it lies at `at` of the buffer that travels, strips side by side."""

    start: int
    stop: int
    at: int
    sizes: Sequence[int]

    @property
    def numel(self) -> int:
        return sum(self.sizes)


class Fast:
    """Brings gradients to whom they belong, through the backend's sums.

    Args:
        mesh: the grid of ranks.
        axes: who adds up.
        pool: of the buffers.
    """

    def __init__(self, mesh: Mesh, axes: Axes, pool: Pool) -> None:
        self.mesh, self.axes, self.pool = mesh, axes, pool
        self.line = Line()
        self.held: dict[int, Tensor] = {}  # by unit: this shard's sum over the turns so far

    def journey(
        self, unit: Unit, mine: Sequence[tuple[Node, Weighed[Sum]]], turns: Turns, key: str, *, last: bool
    ) -> Generator[Pending, None, Mean | None]:  # fmt: skip
        """Like `_reduce` and, in the step's last turn, `_agree`.

        Args:
            mine: this rank's partial sums.
            key: what all ranks know this journey by.
            last: does the step end with it?

        Returns:
            The step's gradient over this rank's shard, if it is the last.
        """
        parts, numel = self._parts(unit)
        one_journey = last and (turns.count == 1 or not turns.every_leaf)
        total = turns.divisor if last else 0.0
        whole = self.pool.take(numel, unit.dtypes.reduce, unit.device)
        fold(mine, whole, parts, unit.runs, factor=1 / total if one_journey and total else 1.0)
        own = parts[self.mesh.shard.rank]
        label = f"reduce {self.mesh.shard.name} {key}"
        start = self.axes.shard.reduce_scatter if self.axes.shard.scatters else self.axes.shard.all_reduce

        def arrived(strips: Strips) -> Pending:
            at = 0 if self.axes.shard.scatters else own.at
            self._add(unit.index, whole, strips[0][at : at + own.numel])
            if not last or not own.numel:
                return Done()
            return self.axes.copies.all_reduce(f"agree {self.mesh.copies.name} {key}", self.held[unit.index])

        later = self.line.after(start(label, whole), arrived)
        yield later
        if not last:
            return None
        later.wait()
        flat = self.held.pop(unit.index)
        runs = between(unit.runs, own.start, own.stop)
        if not total:  # no leaf has weight
            self.pool.give(flat)
            return Mean(runs, None)
        if not one_journey:
            flat.div_(total)
        return Mean(runs, torch.split(flat, list(own.sizes)), flat)

    def _parts(self, unit: Unit) -> tuple[list[Part], int]:
        """Owner by owner, and the size of all; of equal size where the backend scatters."""
        bounds = list(pairwise(unit.layout.bounds))
        sizes = [[b - a for a, b in between(unit.runs, start, stop)] for start, stop in bounds]
        most = max(map(sum, sizes))
        parts, at = list[Part](), 0
        for (start, stop), each in zip(bounds, sizes, strict=True):
            parts.append(Part(start, stop, at, each))
            at += most if self.axes.shard.scatters else sum(each)
        return parts, at

    def _add(self, index: int, whole: Tensor, part: Tensor) -> None:
        """Into what this unit's earlier turns have left; `whole` is done with, unless all of it is the part."""
        held = self.held.get(index)
        if held is not None:
            held.add_(part)
        elif self.mesh.shard.size == 1:
            self.held[index] = whole
            return
        else:
            self.held[index] = self.pool.take(part.numel(), part.dtype, part.device).copy_(part)
        self.pool.give(whole)


def fold(
    mine: Sequence[tuple[Node, Weighed[Sum]]], whole: Tensor, parts: Sequence[Part],
    runs: Sequence[tuple[int, int]], *, factor: float,
) -> None:  # fmt: skip
    """Add up one rank's partial sums, each times its weight and `factor`, in the buffer that travels."""
    found = [w for _, w in mine if w.value is not None]
    if not found:
        whole.zero_()
    for part in parts:
        targets = torch.split(whole[part.at : part.at + part.numel], list(part.sizes))
        for number, weighed in enumerate(found):
            assert weighed.value is not None
            by = factor * (1.0 if weighed.weight is None else weighed.weight)
            for target, strip in zip(targets, weighed.value.between(runs, part.start, part.stop), strict=True):
                if number:
                    target.add_(strip, alpha=by)
                else:
                    torch.mul(strip, by, out=target)
