"""The micro-steps of a loop that accumulates gradients by itself, divided among the ranks as leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch.optim import Optimizer

from shoal.data.feed import LeafFeed
from shoal.data.loader import Handed
from shoal.errors import BatchError
from shoal.random import seed as set_seed


def check_count(count: int, leaves: int) -> None:
    """Raises `BatchError` unless `leaves` equal leaves make `count` micro-steps."""
    if count < 1 or count % leaves:
        low, high = max(count // leaves, 1) * leaves, (count // leaves + 1) * leaves
        raise BatchError(
            f"job.micro_steps({count}) does not divide into leaves={leaves} equal leaves",
            cause=f"leaves={leaves} is the strategy's, or the world at first start",
            remedy=f"job.micro_steps({low}) or ({high}), or shoal.init(leaves={max(count, 1)})",
        )


def micro_steps(feed: LeafFeed, count: int, end_leaf: Callable[[], None]) -> Iterator[int]:
    """See `Job.micro_steps`. `end_leaf` is called between two leaves of this rank."""
    each = count // feed.leaves
    turns = feed.new_turns(feed.leaves)
    turns.learn(dict.fromkeys(range(feed.leaves), 1.0))
    turns.summed = True
    loop = feed.begin()
    try:
        for turn in range(turns.run_by(feed.cell)):
            if turn:
                end_leaf()
            leaf = turns.leaf(feed.cell, turn)
            feed.hand_out(Handed(leaf, 0.0 if leaf is None else 1.0, turn, turns))
            for number in range((leaf or 0) * each, (leaf or 0) * each + each):
                set_seed(feed.seed, feed.step, number)
                yield number
    finally:
        feed.end(loop)


def end_leaf(optimizers: Sequence[Optimizer]) -> None:
    """What a script with `leaves=` calls after every batch: on a leaf that is not the step's last it only ends it."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
