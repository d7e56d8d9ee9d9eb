"""Gradients on their way: each unit's goes from wait to wait; here is decided which one goes on. No tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.comm.group import Done, Pending
from shoal.engine.sums import Flow

_GLANCE = 0.0005
"""Seconds between two looks at what has come."""
_STILL = 1.0
"""Seconds without anything that comes, after which somebody else has to find out why."""


@dataclass(slots=True, eq=False)
class Journey:
    """A unit's gradients on their way. `nbytes`: of the whole unit; `through`: past its gate."""

    flow: Flow
    pending: Pending
    nbytes: int
    through: bool = False


class Gate(Done):
    """What lies behind it must not go before others: on a long way, what is needed first goes first."""

    def ready(self) -> bool:
        return False


class Journeys:
    """Those of one model, by unit.

    Args:
        ordered: see `Carrier.ordered`.
        limit: bytes under way at the same time.
        far: is much under way at once on a long way? Who waits for one then goes on with others meanwhile.
    """

    def __init__(self, *, ordered: bool, limit: int, far: bool = False) -> None:
        self.ordered, self.limit, self.far = ordered, limit, far and not ordered
        self.under_way: dict[int, Journey] = {}  # the oldest first
        self.moved = 0  # stages so far
        self.gated = False  # do results stop on their way until those that are needed earlier have come as far?
        self.arrived: Callable[[int], None] = lambda _unit: None
        self._order: Sequence[int] = ()

    def start(self, unit: int, flow: Flow, nbytes: int) -> None:
        """Send one on its way; wait for older ones while there are too many."""
        first = next(flow, None)
        if first is not None:
            self.under_way[unit] = Journey(flow, first, nbytes)
        while sum(j.nbytes for j in self.under_way.values()) > self.limit and self._moving() not in (None, unit):
            self._continue(self._moving())

    def all_started(self, order: Sequence[int]) -> None:
        """No more will come in this step: what is behind gates may go on in this order, when all have come there."""
        self._order = order

    def progress(self) -> None:
        """Bring everything as far as it gets without waiting; nothing, where what is ready first must not go first."""
        for unit in list(self.under_way) if not self.ordered else ():
            while unit in self.under_way and self.under_way[unit].pending.ready():
                self._continue(unit)
        if self._order and self._moving() is None:
            for unit in self._order:
                if unit in self.under_way and not self.under_way[unit].through:
                    self.under_way[unit].through = True
                    self._continue(unit)
            self._order = ()

    def go_on(self, until: Callable[[], bool]) -> None:
        """Bring everything as far as it gets until that is so, all is there, or nothing has come for a second."""
        moved, ends = self.moved, time.monotonic() + _STILL
        while self.under_way and not until() and time.monotonic() < ends:
            self.progress()
            if self.moved > moved:
                moved, ends = self.moved, time.monotonic() + _STILL
            else:
                time.sleep(_GLANCE)

    def wait_for(self, unit: int) -> None:
        """Until a unit's gradients are where they have to be."""
        while unit in self.under_way:
            self.progress()
            if unit in self.under_way:
                self._continue(unit if self.under_way[unit].through else self._moving())

    def finish(self) -> None:
        """Wait for all that is under way."""
        self._order = list(self.under_way)
        while self.under_way:
            self.wait()

    def wait(self) -> None:
        """Bring everything as far as it gets without waiting, then the oldest one stage further."""
        self.progress()
        first = next(iter(self.under_way), None)
        through = first is not None and self.under_way[first].through
        self._continue(first if through else self._moving())

    def passed(self, pending: Pending) -> None:
        """It is over: all that wait for it go on, in the order in which they have started."""
        self.moved += 1
        for unit, journey in [(u, j) for u, j in self.under_way.items() if j.pending is pending]:
            following = next(journey.flow, None)
            if following is None:
                del self.under_way[unit]
                self.arrived(unit)
            else:
                journey.pending = following

    def _moving(self) -> int | None:
        """The oldest on its way to a gate, or to its end where there are none.

        Waiting for it, not for any other, is what no ranks can do in a circle: all have started them in one order, and
        who waits for a later one has brought this one as far as others need it.
        """
        return next((i for i, j in self.under_way.items() if not j.through and not isinstance(j.pending, Gate)), None)

    def _continue(self, unit: int | None) -> None:
        """Bring a journey one stage further."""
        if unit is None:
            return
        journey = self.under_way[unit]
        pending = journey.pending
        if self.far and not isinstance(pending, Gate) and not pending.ready():
            self.go_on(lambda: self.under_way.get(unit) is not journey or journey.pending is not pending)
        if self.under_way.get(unit) is journey and journey.pending is pending:
            pending.wait()
            self.passed(pending)
