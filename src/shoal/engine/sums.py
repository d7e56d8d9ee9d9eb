"""Partial sums of gradients in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from shoal.comm.group import Common, Pending, Strips
from shoal.comm.pool import Pool
from shoal.layout import ALIGN
from shoal.leaves import Node, Tree, Weighed, weigh

_foreach_add_ = cast("Callable[[Strips, Strips], None]", torch._foreach_add_)  # pyright: ignore
_foreach_mul_ = cast("Callable[[Strips, float], None]", torch._foreach_mul_)  # pyright: ignore
# the bits of one call per tensor, in less time where there are many

Flow = Generator[Pending, None, None]
"""Work that yields whenever it has to wait for the network."""
Runs = Sequence[tuple[int, int]]
"""Which parts of a unit's flat buffer have gradients: `(start, stop)`, ascending, without the padding between them."""


def between(runs: Runs, start: int, stop: int) -> Runs:
    """What of the runs lies in `start:stop`."""
    return [(max(a, start), min(b, stop)) for a, b in runs if a < stop and b > start]


@dataclass(slots=True)
class Sum:
    """A partial sum: one tensor for every run."""

    strips: Strips

    def between(self, runs: Runs, start: int, stop: int) -> list[Tensor]:
        """The strips of `between(runs, start, stop)`."""
        return [
            strip if start <= a and b <= stop else strip[max(start - a, 0) : min(stop, b) - a]
            for strip, (a, b) in zip(self.strips, runs, strict=True)
            if a < stop and b > start
        ]


def lying_in(flat: Tensor, runs: Runs, start: int = 0) -> list[Tensor]:
    """The strips of a buffer that begins at `start`."""
    return [flat[a - start : b - start] for a, b in runs]


Sums = Tree[Weighed[Sum]]
Known = Sequence[tuple[Node, Weighed[bool]]]
"""Which partial sums somebody holds, without their values."""


def new_tree(leaves: int) -> Sums:
    """A tree of gradients. Sums are taken in place."""

    def scale(x: Sum, weight: float) -> Sum:
        if x.strips:  # torch takes no empty lists
            _foreach_mul_(x.strips, weight)
        return x

    def add(left: Sum, right: Sum) -> Sum:
        if left.strips:
            _foreach_add_(left.strips, right.strips)
        return left

    return Tree(leaves, weigh(scale, add))


def known(leaves: int, given: Sequence[tuple[Node, Weighed[bool]]]) -> Known:
    """What partial sums result from `given`."""

    def scale(x: bool, _weight: float) -> bool:
        return x

    tree: Tree[Weighed[bool]] = Tree(leaves, weigh(scale, lambda _a, _b: True))
    for node, value in given:
        tree.put(node, value)
    return sorted(tree.nodes.items(), key=lambda item: item[0])


def drain(tree: Sums) -> list[tuple[Node, Weighed[Sum]]]:
    """Take all partial sums out, in the order of `known`."""
    nodes = sorted(tree.nodes.items(), key=lambda item: item[0])
    tree.nodes.clear()
    return nodes


def own(tree: Sums) -> None:
    """Copy all that waits in a tree, so that the memory it came in is free."""
    for node, weighed in tree.nodes.items():
        if weighed.value is not None:
            tree.nodes[node] = Weighed(Sum([t.clone() for t in weighed.value.strips]), weighed.weight)


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """The gradient of a step, over the part that somebody updates. `strips` None: no leaf had weight.

    `flat`: the buffer of a pool that it lies in, if it does. `common`: memory of several ranks that it lies in, of
    which this one has filled `own`.
    """

    runs: Runs
    strips: Strips | None
    flat: Tensor | None = None
    common: Common | None = None
    own: Strips = ()

    def cut(self, places: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        """Stretches of it, ascending, each of which lies in one run; empty ones, too."""
        assert self.strips is not None
        runs = zip(self.runs, self.strips, strict=True)
        (begin, end), strip = next(runs)
        for start, stop in places:
            while start >= end and start < stop:
                (begin, end), strip = next(runs)
            if start == stop:
                yield strip.reshape(-1)[:0]
            else:
                yield strip if (start, stop) == (begin, end) else strip[start - begin : stop - begin]


def mean(total: Weighed[Sum], weights: float, out: Strips | None = None) -> Strips | None:
    """The step's gradient from the sum over all leaves. One leaf alone stays untouched; None: no leaf has weight.

    Args:
        total: the sum.
        weights: of all leaves.
        out: where to put it; None: in place.
    """
    if total.value is None:
        return None
    strips = total.value.strips
    if total.alone:
        if out is None:
            return strips
        for target, strip in zip(out, strips, strict=True):
            target.copy_(strip)
        return out
    out = strips if out is None else out
    half = math.frexp(weights)[0] == 0.5  # a power of two: multiplying is dividing, and one pass does all
    for target, data in zip(out, strips, strict=True):
        if half:
            zero = torch.zeros((), dtype=data.dtype, device=data.device)
            torch.add(zero, data, alpha=1 / weights, out=target)
        else:
            torch.div(data, weights, out=target).add_(0.0)  # -0.0 becomes +0.0 in both
    return out


def even_bounds(start: int, stop: int, parts: int) -> list[int]:
    """Cut `start:stop` into aligned parts, as equal as can be."""
    blocks = -(-(stop - start) // ALIGN)
    return [min(stop, start + blocks * i // parts * ALIGN) for i in range(parts)] + [stop]


def keep(total: Weighed[Sum], weights: float, runs: Runs, start: int, flat: Tensor, pool: Pool) -> Mean:
    """The step's gradient, in `flat`, which begins at `start`; back to the pool with it if there is none."""
    strips = mean(total, weights, lying_in(flat, runs, start))
    if strips is None:
        pool.give(flat)
        return Mean(runs, None)
    return Mean(runs, strips, flat)
