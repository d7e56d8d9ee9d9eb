"""Partial sums of gradients in memory, and their two journeys: to a shard's owner, and across copies."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from shoal.comm.group import Group, Pending
from shoal.layout import ALIGN
from shoal.leaves import Node, Tree, Weighed, weigh

Flow = Generator[Pending, None, None]
"""Work that yields whenever it has to wait for the network."""


class Pool:
    """Buffers that are used again: filling fresh pages costs three times as much."""

    def __init__(self) -> None:
        self.free: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        waiting = self.free.get((numel, dtype, device))
        return waiting.pop() if waiting else torch.empty(numel, dtype=dtype, device=device)

    def give(self, buffer: Tensor) -> None:
        waiting = self.free.setdefault((buffer.numel(), buffer.dtype, buffer.device), [])
        if len(waiting) < 2:
            waiting.append(buffer)

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for waiting in self.free.values() for b in waiting)


@dataclass(slots=True)
class Sum:
    """A partial sum. `borrowed`: a view of somebody else's buffer, never written to."""

    data: Tensor
    borrowed: bool = False


Sums = Tree[Weighed[Sum]]
Known = Sequence[tuple[Node, Weighed[bool]]]
"""Which partial sums somebody holds, without their values."""


def new_tree(leaves: int, pool: Pool) -> Sums:
    """A tree of gradients that reuses memory: sums are taken in place where the memory is ours."""

    def scale(x: Sum, weight: float) -> Sum:
        return Sum(x.data * weight) if x.borrowed else Sum(x.data.mul_(weight))

    def add(left: Sum, right: Sum) -> Sum:
        if not left.borrowed:
            left.data.add_(right.data)
            if not right.borrowed:
                pool.give(right.data)
            return left
        if not right.borrowed:
            return Sum(torch.add(left.data, right.data, out=right.data))
        return Sum(left.data + right.data)

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


def swap(
    group: Group, verb: str, bounds: Sequence[int], mine: list[tuple[Node, Weighed[Sum]]],
    theirs: Sequence[Known], tree: Sums, pool: Pool, like: Tensor,
) -> Flow:  # fmt: skip
    """Put everybody's partial sums of this member's part (`bounds`) into `tree`.

    Args:
        mine: this member's, each over the whole of `bounds`. They may be given back to the pool afterwards.
        theirs: what each member has.
        like: dtype and device of what travels.
    """
    me = group.rank
    if group.size == 1:
        for node, weighed in mine:
            tree.put(node, weighed)
        return
    numel = bounds[me + 1] - bounds[me]
    parts = [[w.value.data[a:b] for _, w in mine if w.value] for a, b in pairwise(bounds)]
    boxes = [
        [] if r == me else [pool.take(numel, like.dtype, like.device) for _, w in has if w.value]
        for r, has in enumerate(theirs)
    ]
    yield group.swap(verb, parts, boxes)
    for r, has in enumerate(theirs):
        values = iter(Sum(p, borrowed=True) for p in parts[me]) if r == me else iter(Sum(b) for b in boxes[r])
        for node, weighed in has:
            tree.put(node, Weighed(next(values) if weighed.value else None, weighed.weight))


def own(tree: Sums, pool: Pool) -> None:
    """Copy what is still borrowed, so that the lender's buffer is free."""
    for node, weighed in tree.nodes.items():
        if weighed.value and weighed.value.borrowed:
            data = weighed.value.data
            copy = pool.take(data.numel(), data.dtype, data.device)
            tree.nodes[node] = Weighed(Sum(copy.copy_(data)), weighed.weight)


def mean(total: Weighed[Sum], weights: float) -> Tensor | None:
    """The step's gradient from the sum over all leaves. One leaf alone stays untouched; None: no leaf has weight."""
    if total.value is None:
        return None
    if total.alone:
        return total.value.data
    data = total.value.data
    out = torch.empty_like(data) if total.value.borrowed else data
    if math.frexp(weights)[0] == 0.5:  # a power of two: multiplying is dividing, and one pass does all
        return torch.add(torch.zeros((), dtype=data.dtype, device=data.device), data, alpha=1 / weights, out=out)
    return torch.div(data, weights, out=out).add_(0.0)  # -0.0 becomes +0.0 in both


def even_bounds(numel: int, parts: int) -> list[int]:
    """Cut `numel` elements into aligned parts, as equal as can be."""
    blocks = -(-numel // ALIGN)
    return [min(numel, blocks * i // parts * ALIGN) for i in range(parts)] + [numel]


def agree(
    group: Group, mine: list[tuple[Node, Weighed[Sum]]], theirs: Sequence[Known], weights: float,
    leaves: int, pool: Pool, numel: int, like: Tensor,
) -> Generator[Pending, None, Tensor | None]:  # fmt: skip
    """The step's gradient on every member of `group`, from what each of them has summed up.

    An all-reduce in a fixed order: everybody adds up one part of the `numel` elements and hands it to all.
    """
    bounds = even_bounds(numel, group.size)
    tree = new_tree(leaves, pool)
    yield from swap(group, "agree", bounds, mine, theirs, tree, pool, like)
    part = mean(tree.take(), weights)
    if group.size == 1 or part is None:
        return part
    buffers = [w.value.data for _, w in mine if w.value]
    whole = buffers[0] if buffers else pool.take(numel, like.dtype, like.device)
    whole[bounds[group.rank] : bounds[group.rank + 1]].copy_(part)
    yield group.gather("agree", whole, bounds)
    for spare in buffers[1:]:
        pool.give(spare)
    return whole
