"""The leaf tree: who computes which leaf, in which order sums are taken, and which partial sums travel.

Node (k, j) of a tree over L leaves covers leaves j*2^k to (j+1)*2^k - 1, cut off at L, and is the sum of nodes
(k-1, 2j) and (k-1, 2j+1); a missing right half is left out. Because the tree hangs on leaf numbers alone, any rank may
compute any leaf, in any order, and the sum has the same bits. Global norms use the same tree over blocks of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    """One partial sum: `level` k and `place` j."""

    level: int
    place: int


class Tree(Generic[T]):
    """Partial sums that have arrived so far; two siblings are added as soon as both are there.

    Args:
        leaves: L, the number of leaves.
        add: `add(left, right)`, left being the smaller leaf numbers. It may work in place on its first argument.
    """

    def __init__(self, leaves: int, add: Callable[[T, T], T]) -> None:
        self.leaves, self.add, self.nodes = leaves, add, dict[Node, T]()
        self.root = Node((leaves - 1).bit_length(), 0)

    def put(self, node: Node, value: T) -> None:
        """Take in one partial sum."""
        while node.level < self.root.level:
            sibling = Node(node.level, node.place ^ 1)
            if sibling in self.nodes:
                other = self.nodes.pop(sibling)
                value = self.add(value, other) if node.place < sibling.place else self.add(other, value)
            elif sibling.place << sibling.level < self.leaves:
                break  # the other half exists and is not here yet
            node = Node(node.level + 1, node.place >> 1)
        self.nodes[node] = value

    def put_leaf(self, leaf: int, value: T) -> None:
        self.put(Node(0, leaf), value)

    @property
    def complete(self) -> bool:
        return self.root in self.nodes

    def take(self) -> T:
        """The sum over all leaves."""
        assert self.complete, f"the sum over {self.leaves} leaves lacks some: here are only {sorted(self.nodes)}"
        return self.nodes.pop(self.root)


Assignment = tuple[tuple[int, ...], ...]
"""Per rank the numbers of its leaves in the order it computes them."""


def assign(leaves: int, copies: int, ranks_per_copy: int, *, every_leaf: bool, twig: int = 1) -> Assignment:
    """Who computes what: even in number, and with as few waiting sums as can be.

    Args:
        leaves: L, the leaves of one step.
        copies, ranks_per_copy: the grid of ranks; rank = copy * ranks_per_copy + place in the copy.
        every_leaf: are gradients reduced inside a copy after every leaf (ZeRO-2, ZeRO-3) or once a step?
        twig: so many neighbouring leaves stay together.
    """
    twigs = -(-leaves // twig)
    candidates = [_grid(twigs, copies, ranks_per_copy, inner) for inner in (_blocks, _strides)]
    chosen = min(candidates, key=lambda a: pending(twigs, a, ranks_per_copy, every_leaf=every_leaf))
    return tuple(tuple(leaf for t in mine for leaf in range(t * twig, min((t + 1) * twig, leaves))) for mine in chosen)


def pending(leaves: int, assignment: Assignment, ranks_per_copy: int, *, every_leaf: bool) -> int:
    """The most partial sums that wait anywhere at any moment: whole gradients, or shards if `every_leaf`."""
    most = 0
    for first in range(0, len(assignment), ranks_per_copy):
        ranks = assignment[first : first + ranks_per_copy]
        for group in [ranks] if every_leaf else [[r] for r in ranks]:
            tree: Tree[None] = Tree(leaves, lambda _a, _b: None)
            for turn in range(max(len(r) for r in group)):
                for leaf in (r[turn] for r in group if turn < len(r)):
                    tree.put_leaf(leaf, None)
                most = max(most, len(tree.nodes))
    return most


def _grid(
    leaves: int, copies: int, ranks_per_copy: int, inner: Callable[[Sequence[int], int], list[tuple[int, ...]]]
) -> Assignment:
    runs = _blocks(range(leaves), copies)
    return tuple(mine for run in runs for mine in inner(run, ranks_per_copy))


def _blocks(run: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Neighbours stay together: 0 1 | 2 3."""
    size, extra = divmod(len(run), parts)
    bounds = [0]
    for i in range(parts):
        bounds.append(bounds[-1] + size + (i < extra))
    return [tuple(run[a:b]) for a, b in pairwise(bounds)]


def _strides(run: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Neighbours are computed at the same time: 0 2 | 1 3."""
    return [tuple(run[i::parts]) for i in range(parts)]


@dataclass(frozen=True, slots=True)
class Weighed(Generic[T]):
    """A partial sum and the weight it still has to be multiplied with.

    A leaf keeps its gradient as it is until it meets another: a leaf alone is plain PyTorch's gradient. `value` None
    is a leaf of weight 0: left out, never multiplied.
    """

    value: T | None
    weight: float | None = None  # None: nothing left to multiply

    @property
    def alone(self) -> bool:
        """Has only one leaf gone into it?"""
        return self.value is not None and self.weight is not None


def weigh(scale: Callable[[T, float], T], add: Callable[[T, T], T]) -> Callable[[Weighed[T], Weighed[T]], Weighed[T]]:
    """The `add` of a tree of weighed sums, from how to scale one value and how to add two."""

    def settle(x: Weighed[T]) -> T:
        assert x.value is not None
        return x.value if x.weight is None or x.weight == 1.0 else scale(x.value, x.weight)

    def join(left: Weighed[T], right: Weighed[T]) -> Weighed[T]:
        if left.value is None or right.value is None:
            return right if left.value is None else left
        return Weighed(add(settle(left), settle(right)))

    return join
