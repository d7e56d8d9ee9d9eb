"""What the backends' collectives send: a ring's bytes, less than which nothing can."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

REDUCE_SCATTER, ALL_GATHER, ALL_REDUCE = 1, 1, 2
"""How often the whole goes around: everything but this rank's own part each time."""


def count(sent: Counter[str], label: str, rounds: int, size: int, whole: Tensor) -> None:
    """Add the bytes of one rank among `size` to what it has sent under the label's first word."""
    sent[label.split(" ")[0]] += rounds * (size - 1) * whole.nbytes // size
