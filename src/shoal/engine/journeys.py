"""Gradients on their way: each unit's goes from wait to wait; here is decided which one goes on. No tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.comm.group import Done, Pending
from shoal.comm.levels import Levels
from shoal.engine.sums import Flow


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
    """Those of one model, by unit. Whatever this rank waits for, they go on: others wait for its sums.

    Args:
        levels: see `Carrier.levels`.
        ordered: see `Carrier.ordered`.
        limit: bytes under way at the same time.
    """

    def __init__(self, levels: Levels, *, ordered: bool, limit: int) -> None:
        self.levels, self.ordered, self.limit = levels, ordered, limit
        self.under_way: dict[int, Journey] = {}  # the oldest first
        self.awaited: Pending | None = None
        self._moves = False  # is one of them moving now? It may wait itself, and nobody else moves any then
        self.gated = False  # do results stop on their way until those that are needed earlier have come as far?
        self.arrived: Callable[[int], None] = lambda _unit: None
        self._order: Sequence[int] = ()

    def start(self, unit: int, flow: Flow, nbytes: int) -> None:
        """Send one on its way; wait for older ones while there are too many."""
        first = next(flow, None)
        if first is not None:
            self.under_way[unit] = Journey(flow, first, nbytes)
            if not self.ordered and self not in self.levels.errands:
                self.levels.errands.append(self)
        while sum(j.nbytes for j in self.under_way.values()) > self.limit and self._moving() not in (None, unit):
            self._continue(self._moving())

    def all_started(self, order: Sequence[int]) -> None:
        """No more will come in this step: what is behind gates may go on in this order, when all have come there."""
        self._order = order

    def progress(self) -> None:
        """Bring everything as far as it gets without waiting; nothing, where what is ready first must not go first."""
        if self._moves:
            return
        self._moves = True
        try:
            for unit in list(self.under_way) if not self.ordered else ():
                while unit in self.under_way and self._ready(self.under_way[unit]):
                    self._continue(unit)
            if self._order and self._moving() is None:
                self._open_gates()
        finally:
            self._moves = False

    go_on = progress

    def _ready(self, journey: Journey) -> bool:
        return journey.pending is not self.awaited and journey.pending.ready()

    def _open_gates(self) -> None:
        for unit in self._order:
            if unit in self.under_way and not self.under_way[unit].through:
                self.under_way[unit].through = True
                self._continue(unit)
        self._order = ()

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
        before, self._moves = self._moves, True
        try:
            for unit, journey in [(u, j) for u, j in self.under_way.items() if j.pending is pending]:
                following = next(journey.flow, None)
                if following is None:
                    self._end(unit)
                else:
                    journey.pending = following
        finally:
            self._moves = before

    def _end(self, unit: int) -> None:
        del self.under_way[unit]
        if not self.under_way and not self.ordered:
            self.levels.errands.remove(self)
        self.arrived(unit)

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
        pending = self.under_way[unit].pending
        before, self.awaited = self.awaited, pending
        try:
            pending.wait()
        finally:
            self.awaited = before
        self.passed(pending)
