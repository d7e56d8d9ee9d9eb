"""What a strategy must send and keep, by ZeRO's formulas, and the time below which no step can be."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

ADAM = 2
"""Numbers of state per parameter."""


class Function(Enum):
    """What a contender cuts: contenders of one function do the same for the user."""

    NOTHING_SENT = "alone"
    DDP = "ddp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`copies` of the model, each held by `ranks` ranks."""

    copies: int
    ranks: int

    @classmethod
    def of(cls, function: Function, world: int, per_copy: int = 0) -> Grid:
        """Where nothing is cut every rank holds a copy; otherwise all hold one, or `per_copy` of them do."""
        ranks = 1 if function in (Function.NOTHING_SENT, Function.DDP) else per_copy or world
        return cls(copies=world // ranks, ranks=ranks)


def payload(function: Function, grid: Grid, parameter_bytes: float) -> float:
    """Bytes that a rank must send in a step, each rank with one batch (ZeRO, Rajbhandari et al. 2020, section 7).

    An all-reduce is a reduce-scatter and an all-gather; ZeRO-3 gathers twice; copies all-reduce what each rank owns.
    """
    if function is Function.NOTHING_SENT:
        return 0.0
    times = 3 if function is Function.ZERO3 else 2
    inside = times * (grid.ranks - 1) / grid.ranks
    between = 2 * (grid.copies - 1) / grid.copies / grid.ranks
    return (inside + between) * parameter_bytes


def at_rest(function: Function, grid: Grid, parameter_bytes: float) -> float:
    """Bytes that a rank keeps between steps, when gradients are gone: parameters and Adam's state."""
    parameters = parameter_bytes / (grid.ranks if function is Function.ZERO3 else 1)
    return parameters + ADAM * parameter_bytes / grid.ranks


def bound(compute: float, sent: float, goodput: float) -> float:
    """Seconds that a step takes at least: it computes, and what it sends must go through.

    Args:
        compute: seconds of the same step in a process alone.
        sent: bytes of a rank.
        goodput: bytes a second of one plain TCP stream.
    """
    return max(compute, sent / goodput)
