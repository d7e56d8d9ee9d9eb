"""What a claim is, and what was found out about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

EXACT = ("byte", "element", "sample")
"""Units of numbers that are the same on every machine and with `--quick`; times and losses are not."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One number. `case`: of what."""

    case: str
    metric: str
    value: float
    unit: str

    def __str__(self) -> str:
        value = f"{self.value:,.0f}" if self.unit in EXACT else f"{self.value:.4g}"
        return f"{self.case:<40} {self.metric:<24} {value:>12} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Does the claim hold in all that was measured? `because`: one sentence that says why (not)."""

    holds: bool
    because: str
    seen: Sequence[Seen]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`words` as people say it; `measure(quick)` looks whether it is so."""

    name: str
    words: str
    measure: Callable[[bool], Finding]
