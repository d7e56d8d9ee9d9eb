"""What is known of one leaf, while it is under way on a rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.engine.schedule import Cursor, Record


class LeafInfo(NamedTuple):
    """What a loader says of the batch that it hands out. `leaf` None: nobody needs its gradient.

    `summed`: the step's gradient is the sum over its leaves, not their mean.
    """

    leaf: int | None
    weight: float
    present: int
    summed: bool = False


@dataclass(slots=True)
class Leaf:
    """One leaf under way on this rank.

    Args:
        number: None: a real batch whose gradients are dropped, or none at all.
        weight: relative to a full leaf.
        turn: of this step.
        serial: the turns of the whole job before this one.
        cursor: how far it has come in the plan; None: it follows none.
    """

    number: int | None
    weight: float
    turn: int
    serial: int
    cursor: Cursor | None
    stay: frozenset[int] = frozenset()  # units that are kept for the next leaf
    record: Record = field(default_factory=Record)
    entered: list[int] = field(default_factory=list[int])  # units in the order of the forward, in a leaf without a plan
    fresh: set[int] = field(default_factory=set[int])  # ends that got gradients since they were last complete
    complete: Counter[int] = field(default_factory=Counter[int])  # per unit, ends that have been so as often as planned
    begun: set[int] = field(default_factory=set[int])  # units that got gradients, where somebody counts them
    done: set[int] = field(default_factory=set[int])  # units whose gradients are taken
    touched: set[str] = field(default_factory=set[str])
    keep: set[int] = field(default_factory=set[int])  # units that must stay until the leaf ends
    again: Counter[int] = field(default_factory=Counter[int])  # how often the plan uses what is gathered again
    resting: set[int] = field(default_factory=set[int])  # units that stay for that, and that nobody uses now
    backwards: dict[int, set[int]] = field(default_factory=dict[int, set[int]])  # calls under way -> units entered
