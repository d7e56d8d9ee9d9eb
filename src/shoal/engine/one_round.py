"""Gradients of small models: everybody sends all of its partial sums to everybody, and adds up all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence

from torch import Tensor

from shoal.comm.group import Group, Like, Pending, Strips, new_strips
from shoal.engine.sums import Known, Mean, Runs, Sum, mean, new_tree
from shoal.leaves import Node, Weighed

Boxes = list[list[Strips]]
"""By rank, the strips of each of its partial sums."""


def agree_at_once(
    group: Group, runs: Runs, mine: Sequence[tuple[Node, Weighed[Sum]]], theirs: Sequence[Known], weights: float,
    leaves: int, like: Tensor, boxes: Boxes, key: str = "",
) -> Generator[Pending, None, Mean]:  # fmt: skip
    """What `exchange.agree` does, with the same bits: one round instead of two, and more bytes among three and more.

    Args:
        mine, theirs: see `exchange.swap`.
        boxes: see `boxes_for`.
    """
    tree, sent = new_tree(leaves), [w.value.strips if w.value else _nothing(runs, like) for _, w in mine]
    pending = group.swap("agree", [sent] * group.size, boxes, key)
    yield pending
    pending.wait()
    for r, has in enumerate(theirs):
        for (node, weighed), strips in zip(has, sent if r == group.rank else boxes[r], strict=True):
            tree.put(node, Weighed(Sum(strips) if weighed.value else None, weighed.weight))
    return Mean(runs, mean(tree.take(), weights))


def boxes_for(group: Group, runs: Runs, theirs: Sequence[Known], like: Tensor) -> Boxes:
    """Memory for what comes from the others: something for every sum, even if no leaf of it has weight."""
    box = Like(tuple(b - a for a, b in runs), like.dtype, like.device)
    return [[] if r == group.rank else [new_strips(box) for _ in has] for r, has in enumerate(theirs)]


def _nothing(runs: Runs, like: Tensor) -> Strips:
    return [like.new_zeros(b - a) for a, b in runs]


class OneRound:
    """That of one model, whose ranks say a step ahead that they will receive.

    Args:
        copies: the ranks that agree.
    """

    def __init__(self, copies: Group) -> None:
        self.copies, self.name = copies, copies.new_key()
        self.count = Counter[int]()  # rounds so far, by unit
        self.ahead: dict[int, tuple[Boxes, object]] = {}  # by unit: of its next round

    @property
    def tensors(self) -> list[Tensor]:
        """What waits for the next step's gradients."""
        return [t for boxes, _ in self.ahead.values() for sums in boxes for strips in sums for t in strips]

    def agree(
        self, unit: int, runs: Runs, mine: Sequence[tuple[Node, Weighed[Sum]]], theirs: Sequence[Known],
        weights: float, leaves: int, like: Tensor,
    ) -> Generator[Pending, None, Mean]:  # fmt: skip
        """See `agree_at_once`."""
        boxes, held = self.ahead.pop(unit, (None, None))
        boxes = boxes or boxes_for(self.copies, runs, theirs, like)
        flow = agree_at_once(self.copies, runs, mine, theirs, weights, leaves, like, boxes, self._key(unit))
        first = next(flow)
        del held  # it has been posted
        self.count[unit] += 1
        following = boxes_for(self.copies, runs, theirs, like)
        self.ahead[unit] = following, self.copies.expect("agree", following, self._key(unit))
        yield first
        return (yield from flow)

    def _key(self, unit: int) -> str:
        return f"{self.name} unit {unit} round {self.count[unit]}"
