"""The whole difference between plain data parallelism and ZeRO-3: one short pure function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

from shoal.strategy import Shard, Strategy


class Moment(Enum):
    """When something can happen to a unit."""

    BEFORE_FORWARD = "before forward"
    AFTER_FORWARD = "after forward"
    BEFORE_BACKWARD = "before backward"
    AFTER_BACKWARD = "after backward"
    AFTER_UPDATE = "after update"


class Op(Enum):
    """What can happen to a unit."""

    GATHER = "gather"  # parameters: shard -> whole, inside a copy
    FREE = "free"  # parameters: drop the whole, keep the shard
    REDUCE = "reduce"  # gradients: each owner gets its shard of the copy's sums
    AGREE = "agree"  # gradients: the sum over copies, divided by the weights


class Rule(NamedTuple):
    """Do `op` at `moment`; `last`: on a step's last leaf only."""

    moment: Moment
    op: Op
    last: bool = False


Rules = tuple[Rule, ...]


def rules(s: Strategy) -> Rules:
    """What happens to a unit, and when."""
    return tuple(_rules(s))


def _rules(s: Strategy) -> Iterator[Rule]:
    if s.shard is Shard.PARAMETERS:
        yield Rule(Moment.BEFORE_FORWARD, Op.GATHER)
        yield Rule(Moment.AFTER_FORWARD, Op.FREE)
        yield Rule(Moment.BEFORE_BACKWARD, Op.GATHER)
        yield Rule(Moment.AFTER_BACKWARD, Op.FREE)
    yield Rule(Moment.AFTER_BACKWARD, Op.REDUCE, last=s.shard < Shard.GRADIENTS)
    yield Rule(Moment.AFTER_BACKWARD, Op.AGREE, last=True)
    if s.shard < Shard.PARAMETERS:
        yield Rule(Moment.AFTER_UPDATE, Op.GATHER)


def every_leaf(rules: Iterable[Rule]) -> bool:
    """Do gradients travel after every leaf, or once a step?"""
    return any(r.op in (Op.REDUCE, Op.AGREE) and not r.last for r in rules)


_MEANING = {
    Op.GATHER: "parameters: shards -> whole, inside a copy",
    Op.FREE: "parameters: drop the whole, keep the shard",
    Op.REDUCE: "gradients: each owner gets its shard of the copy's sums",
    Op.AGREE: "gradients: sum over copies, divided by the weights",
}


def explain(s: Strategy) -> str:
    """The rules as a table to read."""
    copy = {None: "the world" if s.shard else "1 rank", "host": "the ranks of one host", 1: "1 rank"}.get(
        s.ranks_per_copy, f"{s.ranks_per_copy} ranks"
    )
    numbers = f"precision={s.precision}, numerics={s.numerics}"
    lines = [f"{s.name}: shard={s.shard.name}, a copy is {copy}, cut={s.cut.value}, {numbers}"]
    for rule in rules(s):
        when = "last leaf " if rule.last else "every leaf"
        if rule.moment is Moment.AFTER_UPDATE:
            when = "every step"
        lines.append(f"  {rule.moment.value:15}  {when}  {rule.op.value:6}  {_MEANING[rule.op]}")
    return "\n".join(lines)
