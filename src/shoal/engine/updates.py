"""Units whose update is decided: brought up to date one by one, as their gradients come.

Note: who may wait for what. Whether a step updates is decided by all ranks together before any of its updates runs, so
none ever has to be taken back. What is decided may be done later, until somebody needs the unit: until then its
parameters are placeholders. A unit is never behind by more than one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.engine.gradients import Gradients
from shoal.engine.unit import Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """What all ranks have decided about a step.

    Args:
        step: its number.
        touched: parameters that some leaf touched; none of them, if the step updates nothing.
        apart: see `Gradients.hand_out`.
        update: the user's optimizer on the pieces of some units; None: it does all at once itself.
    """

    step: int
    touched: frozenset[str]
    apart: bool
    update: Callable[[Sequence[Unit]], None] | None = None


class Updates:
    """The updates of one model that are decided and not done.

    Args:
        gradients: of the model.
        renew: after a unit's update, make its parameters whole where they rest, in this step.
    """

    def __init__(self, gradients: Gradients, renew: Callable[[Unit, Decided], None]) -> None:
        self.gradients, self.renew = gradients, renew
        self.waiting: dict[int, Unit] = {}  # for their gradients
        self.updated: dict[int, Unit] = {}  # and not brought together again
        self.coming: dict[int, Unit] = {}
        self.order: Sequence[int] = ()
        self.decided: Decided | None = None
        self.later = False

    def decide(self, units: Sequence[Unit], decided: Decided, *, later: bool) -> None:
        """All these units are behind now. `later`: they may stay so when the step returns."""
        self.flush()
        self.decided, self.later = decided, later
        places = {unit: at for at, unit in enumerate(self.order)}
        for unit in sorted(units, key=lambda u: places.get(u.index, len(places) + u.index)):
            self.waiting[unit.index] = unit
            if later:
                unit.hide()
        self.gradients.all_started([u.index for u in self.waiting.values()])
        if not later:
            self.flush()

    def advance(self) -> None:
        """Do what can be done without waiting."""
        if self.gradients.ordered or not (self.waiting or self.updated):
            return
        self.gradients.progress()
        self._update([u for u in self.waiting.values() if not self.gradients.under_way(u)])
        self._renew_in_order()

    def bring(self, unit: Unit) -> None:
        """Return when the unit is up to date."""
        if unit.index in self.waiting:
            self.gradients.wait_for(unit)
            self._update([unit])
        if unit.index in self.updated:
            self._renew(unit)
        if self.coming.pop(unit.index, None) is not None:
            unit.wait()

    def ready(self, unit: Unit) -> bool:
        """Would `bring` return at once?"""
        return unit.index not in self.waiting or not self.gradients.under_way(unit)

    def flush(self) -> None:
        """Bring all units up to date."""
        while self.waiting:
            self.advance()
            if self.waiting:
                first = next(iter(self.waiting.values()))
                self.gradients.wait_for(first)
                self._update([first])
        for unit in list(self.updated.values()):
            self._renew(unit)
        for unit in list(self.coming.values()):
            self.bring(unit)

    def _update(self, units: Sequence[Unit]) -> None:
        """All whose gradients are there, at once: calls of an optimizer are not for nothing."""
        decided = self.decided
        assert decided is not None
        assert decided.update is not None
        for unit in units:
            del self.waiting[unit.index]
            self.gradients.hand_out(unit, decided.touched, apart=decided.apart)
        if decided.touched and units:
            decided.update(units)
        self.updated |= {unit.index: unit for unit in units}

    def _renew_in_order(self) -> None:
        """What the next forward needs first goes first, where the way may be long; elsewhere as it comes."""
        for unit in list(self.updated.values()):
            earlier = [i for i in self.order[: self._place(unit)] if i in self.waiting] if self.later else []
            if not earlier:
                self._renew(unit)

    def _place(self, unit: Unit) -> int:
        return self.order.index(unit.index) if unit.index in self.order else len(self.order)

    def _renew(self, unit: Unit) -> None:
        assert self.decided is not None
        del self.updated[unit.index]
        self.renew(unit, self.decided)
        self.gradients.forget(unit)
        self.coming[unit.index] = unit
