"""Which units' parameters are whole on this rank, in the leaf under way, and which collective comes next."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoal.comm.meet import Meeting, Want
from shoal.engine.away import AwayGrad
from shoal.engine.gradients import Gradients
from shoal.engine.leaf import Leaf
from shoal.engine.residence import Course, Residence
from shoal.engine.schedule import Act
from shoal.engine.unit import Unit
from shoal.engine.updates import Updates
from shoal.errors import AwayError, PlanError


class Presence:
    """Brings parameters and lets them go, one by one while a leaf follows no plan, else in the plan's order.

    Args:
        units: of the model.
        meeting: where ranks agree on what no plan says.
        number: of the model in its job.
        gradients: which the plan's order of collectives includes.
        updates: without which parameters are not current.
    """

    def __init__(
        self, units: Sequence[Unit], meeting: Meeting, number: int, gradients: Gradients, updates: Updates
    ) -> None:  # fmt: skip
        self.updates = updates
        self.units, self.by_index = units, {u.index: u for u in units}
        self.meeting, self.number, self.gradients = meeting, number, gradients
        self.leaf: Leaf | None = None
        self.leased = False  # the user has all of them for a while
        self.residence: Residence | None = None  # once there is a plan
        self.ahead: list[Unit] = []  # gathered, and not used yet, in the order of the plan
        self.carried: frozenset[int] = frozenset()  # units that are kept between two leaves
        self._wanted: int | None = None
        meeting.granters.append(self.grant)

    def keep(self, unit: Unit) -> None:
        if self.leaf is not None:
            self.leaf.keep.add(unit.index)

    def free_all(self, stay: frozenset[int] = frozenset()) -> None:
        """A leaf is over; `stay`: units that are kept for the next."""
        self.ahead.clear()
        self.carried = stay
        for unit in self.units:
            if unit.index not in stay and not unit.resident and (unit.here or unit.coming):
                unit.free()

    def begin(self, leaf: Leaf, course: Course) -> None:
        """A leaf begins, for which some units are here."""
        leaf.again.update(course.here)
        leaf.resting.update(course.here)
        leaf.stay = course.stay

    def idle(self) -> list[Unit]:
        """Units that are kept while nobody uses them."""
        kept = self.leaf.resting if self.leaf is not None else self.carried
        return [self.by_index[i] for i in sorted(kept)]

    def owner(self, tensor: Tensor) -> Unit | None:
        """The unit whose parameters this tensor is a view of, if they are freed now and then."""
        return next((u for u in self.units if not u.resident and u.here and shares(tensor, u.whole)), None)

    def check_here(self, unit: Unit) -> None:
        """Raises `AwayError` when a backward uses parameters of a unit that it has not entered."""
        if not unit.here:
            raise AwayError(
                f"backward went through {unit} while its parameters were away",
                cause="its parameters are used without calling it (.forward() runs no hooks), or something besides its "
                "outputs leads into it, such as a loss kept as an attribute",
                remedy="return it from the block, or name larger blocks with units=",
            )

    # ---------------------------------------------------------------- coming and going

    def need(self, unit: Unit) -> None:
        """Return when the unit's parameters are whole here."""
        if self.leaf is not None:
            self.leaf.resting.discard(unit.index)
        if self.leased:
            return
        if unit.here and unit.coming is None:
            self._arrives(unit)
            self._start()
            return
        cursor = self.leaf.cursor if self.leaf is not None else None
        if unit.coming is None and cursor is not None:
            if not cursor.will_gather(unit.index):
                raise PlanError(
                    f"{unit} is entered more often, or earlier, than in the first leaf",
                    cause="a block that only some leaves use, or use in another order",
                    remedy="name a larger block with units=, or shoal.init(..., overlap=False)",
                )
            while unit.coming is None and not unit.here:
                self.advance()
                self._pass_over(len(self.ahead) - 1)
        self._arrives(unit)
        while unit.coming is None and not unit.here:
            self._wanted = unit.index
            self.meeting.meet(Want.GATHER, unit.index, model=self.number)
            self._wanted = None
        unit.wait()
        if self.leaf is not None:
            self.leaf.record.add(Act.GATHER, unit.index)
        self._start()

    def _arrives(self, unit: Unit) -> None:
        """A unit that was gathered ahead is used."""
        if unit in self.ahead:
            self._pass_over(self.ahead.index(unit))
            del self.ahead[0]

    def _pass_over(self, count: int) -> None:
        """Let go of the first units that were gathered ahead: this leaf does not use them here."""
        for _ in range(count):
            unit = self.ahead.pop(0)
            unit.wait()
            self.free(unit)

    def grant(self, index: int) -> None:
        """Take part in gathering a unit that some rank needs, if it is one of this model."""
        unit = self.by_index.get(index)
        if unit is None:
            return
        before = unit.here
        self.updates.bring(unit)
        unit.gather()
        unit.wait()
        if not before and self._wanted != index:
            unit.free()

    def free(self, unit: Unit) -> None:
        leaf = self.leaf
        if self.leased or not unit.here or unit.coming is not None:  # what is coming is for a later use
            return
        if leaf is None:
            if unit.index not in self.carried:
                unit.free()
        elif unit.index in leaf.keep or unit.index in leaf.resting:
            return
        elif leaf.again[unit.index]:
            leaf.again[unit.index] -= 1
            leaf.resting.add(unit.index)
        else:
            unit.free()
            leaf.record.add(Act.FREE, unit.index)

    # ---------------------------------------------------------------- the plan

    def advance(self) -> bool:
        """Start the next collective of the plan, ready or not. False at its end."""
        leaf = self.leaf
        assert leaf is not None
        assert leaf.cursor is not None
        entry = leaf.cursor.next
        if entry is None:
            return False
        leaf.cursor.at += 1
        unit = self.by_index[entry.unit]
        if entry.act is Act.GATHER:
            leaf.again[entry.unit] = entry.keep
            self.updates.bring(unit)
            unit.gather()
            self.ahead.append(unit)
        else:
            self.gradients.take(unit, leaf)
            self.gradients.start(unit, leaf)
            self.updates.follow(unit)
        return True

    def drain(self, leaf: Leaf) -> None:
        """Take part in all that the plan still has: others need it."""
        more = True
        while more:
            more = self.advance()
            while len(self.ahead) > more:
                unit = self.ahead.pop(0)
                unit.wait()
                if unit.index not in leaf.stay:
                    unit.free()

    def pump(self) -> None:
        """Start all that needs no waiting."""
        if self.leaf is not None and self.leaf.cursor is not None:
            self._start()
            self.gradients.journeys.progress()
            self.updates.catch_up()

    def _start(self) -> None:
        """Follow the plan up to what must wait: a reduction for its gradients, a gather for memory."""
        leaf = self.leaf
        if leaf is None or leaf.cursor is None:
            return
        while entry := leaf.cursor.next:
            unit = self.by_index[entry.unit]
            if not (self._may_gather(unit) if entry.act is Act.GATHER else entry.unit in leaf.done):
                return
            self.advance()

    def _may_gather(self, unit: Unit) -> bool:
        """Is there room for it beside what is gathered ahead, and would it not wait?"""
        assert self.residence is not None
        sizes = self.residence.sizes
        ahead = sum(sizes[u.index] for u in self.ahead) + sizes[unit.index]
        gone = not unit.here and unit.coming is None
        return gone and ahead <= self.residence.ahead and self.updates.ready(unit)


def shares(tensor: Tensor, whole: Tensor) -> bool:
    if tensor.is_meta or type(tensor) is AwayGrad:
        return False
    return tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() != 0
