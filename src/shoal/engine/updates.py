"""Units whose update is decided: brought up to date one by one, as their gradients come.

Note: who may wait for what. Whether a step updates is decided by all ranks together before any of its updates runs, so
none ever has to be taken back. What is decided may be done later, until somebody needs the unit: until then its
parameters are placeholders. A unit is never behind by more than one step. Layerwise updates (`early`) run before that
decision: they cannot be taken back, so whatever could decide against them is refused beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate

from shoal.engine.gradients import Gradients
from shoal.engine.unit import Unit

_AT_ONCE = 2**20
"""Elements that are updated before others' sums are looked at again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """What all ranks have decided about a step.

    Args:
        step: its number.
        touched: parameters that some leaf touched; none of them, if the step updates nothing. It may still grow by
            those of units whose gradients are on their way.
        apart: see `Gradients.hand_out`.
        update: the user's optimizer on the pieces of some units; None: it does all at once itself.
    """

    step: int
    touched: Set[str]
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
        self.journeys = gradients.journeys
        self.journeys.arrived = self._arrived
        self.waiting: dict[int, Unit] = {}  # for their gradients
        self.updated: dict[int, Unit] = {}  # and not brought together again
        self.coming: dict[int, Unit] = {}
        self.order: Sequence[int] = ()
        self.decided: Decided | None = None
        self.later = False
        self.early: Decided | None = None  # how units are updated while backward runs, in a leaf where they are
        self.following: dict[int, Unit] = {}  # those whose last gradients are on their way there
        self.done: set[int] = set()  # those that are updated

    def begin(self) -> None:
        """A step begins."""
        assert not self.following
        self.early = None
        self.done.clear()

    def follow(self, unit: Unit) -> None:
        """A unit's last gradients are on their way: where units are updated early, it is as soon as they come."""
        if self.early is not None:
            self.following[unit.index] = unit
            self.catch_up()

    def catch_up(self, *, wait: bool = False) -> None:
        """Update units whose gradients have come. `wait`: all that are followed."""
        for unit in list(self.following.values()):
            if wait:
                self.journeys.wait_for(unit.index)
            if unit.index not in self.journeys.under_way:
                self._arrived(unit.index)

    def _arrived(self, index: int) -> None:
        """At once, before this rank waits for anything else: others may wait for what it has updated."""
        unit = self.following.pop(index, None)
        if unit is not None:
            assert self.early is not None
            self.done.add(index)
            self._step([unit], self.early)
            self._finish(unit, self.early)

    def decide(self, units: Sequence[Unit], decided: Decided, *, later: bool) -> None:
        """All these units are behind now, but for those updated early. `later`: they may stay so at the step's end."""
        self.catch_up(wait=True)
        self.flush()
        units = [unit for unit in units if unit.index not in self.done]
        self.decided, self.later = decided, later
        places = {unit: at for at, unit in enumerate(self.order)}
        for unit in sorted(units, key=lambda u: places.get(u.index, len(places) + u.index)):
            self.waiting[unit.index] = unit
            if later:
                unit.hide()
        self.journeys.all_started([u.index for u in self.waiting.values()])
        if not later:
            self.flush()

    def advance(self) -> None:
        """Do what can be done without waiting."""
        if self.journeys.ordered or not (self.waiting or self.updated):
            return
        self.journeys.progress()
        while some := self._some():
            self._update(some)
            self._renew_in_order()
            self.journeys.progress()
        self._renew_in_order()

    def _some(self) -> list[Unit]:
        """Of those whose gradients are there: enough for a call of an optimizer, too few to keep others waiting."""
        arrived = [u for u in self.waiting.values() if u.index not in self.journeys.under_way]
        sizes = accumulate(u.mine.stop - u.mine.start for u in arrived)
        return arrived[: 1 + sum(size < _AT_ONCE for size in sizes)]

    def bring(self, unit: Unit) -> None:
        """Return when the unit is up to date."""
        if unit.index in self.waiting:
            self.journeys.wait_for(unit.index)
            self._update([unit])
        if unit.index in self.updated:
            self._renew(unit)
        if self.coming.pop(unit.index, None) is not None:
            unit.wait()

    def ready(self, unit: Unit) -> bool:
        """Would `bring` return at once?"""
        return unit.index not in self.waiting or unit.index not in self.journeys.under_way

    def flush(self) -> None:
        """Bring all units up to date, each as soon as its gradients have come."""
        while self.waiting:
            self.advance()
            arrived = [u for u in self.waiting.values() if u.index not in self.journeys.under_way]
            if arrived:
                self._update(arrived)
            elif self.waiting:
                self.journeys.wait()
        for unit in list(self.updated.values()):
            self._renew(unit)
        for unit in list(self.coming.values()):
            self.bring(unit)

    def _update(self, units: Sequence[Unit]) -> None:
        """All whose gradients are there, at once: calls of an optimizer are not for nothing."""
        decided = self.decided
        assert decided is not None
        for unit in units:
            del self.waiting[unit.index]
        self._step(units, decided)
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
        self._finish(unit, self.decided)

    def _step(self, units: Sequence[Unit], decided: Decided) -> None:
        assert decided.update is not None
        for unit in units:
            self.gradients.hand_out(unit, decided.touched, apart=decided.apart)
        if decided.touched and units:
            decided.update(units)

    def _finish(self, unit: Unit, decided: Decided) -> None:
        self.renew(unit, decided)
        self.gradients.forget(unit)
        self.coming[unit.index] = unit
