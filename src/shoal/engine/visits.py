"""Units of several blocks stay while blocks of theirs run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from shoal.engine.unit import Unit


class Visits:
    """Which blocks of such units are being run.

    Note: when a unit of several blocks may go. Not when a block of its is left, as the next one may be of the same
    unit, but as soon as something else is entered while nobody is inside. So a plan does not know how many of its
    blocks a leaf uses, and a later leaf may use others. A block that runs another unit's blocks inside its own stays.

    Args:
        let_go: what to do with a unit that may go.
    """

    def __init__(self, let_go: Callable[[Unit], None]) -> None:
        self.let_go = let_go
        self.inside: dict[int, set[nn.Module]] = {}  # by unit
        self.left: dict[int, Unit] = {}  # nobody is inside

    def enter(self, units: Iterable[Unit], block: nn.Module) -> None:
        """A block is about to run, forward or backward. What was left, and is not of these units, may go."""
        for unit in units:
            if unit.merged:
                self.left.pop(unit.index, None)
                self.inside.setdefault(unit.index, set()).add(block)
        if self.left:
            self.end()

    def leave(self, unit: Unit, block: nn.Module) -> bool:
        """A block has run. May the unit go now?"""
        if unit.merged:
            inside = self.inside.get(unit.index, set())
            inside.discard(block)
            if not inside:
                self.left[unit.index] = unit
        return not unit.merged

    def leave_all(self, units: Iterable[Unit], *, for_good: bool) -> None:
        """A backward call through these is over; `for_good`: it was not inside another one."""
        self.left |= {u.index: u for u in units if self.inside.pop(u.index, None) is not None}
        if for_good:
            self.end()

    def end(self) -> None:
        """Nothing of what was left is needed soon."""
        left = list(self.left.values())
        self.left.clear()
        for unit in left:
            self.let_go(unit)

    def forget(self) -> None:
        """Everything goes at the end of a leaf."""
        self.inside.clear()
        self.left.clear()
