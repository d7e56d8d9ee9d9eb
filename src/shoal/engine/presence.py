"""Which units' parameters are whole on this rank, in the leaf under way, and which collective comes next."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoal.comm.meet import Meeting, Want
from shoal.engine.away import AwayGrad
from shoal.engine.gradients import Gradients
from shoal.engine.leaf import Leaf
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
        self._wanted: int | None = None
        meeting.granters.append(self.grant)

    def keep(self, unit: Unit) -> None:
        if self.leaf is not None:
            self.leaf.keep.add(unit.index)

    def free_all(self) -> None:
        for unit in self.units:
            if not unit.resident and (unit.here or unit.coming):
                unit.free()

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
        if self.leased or (unit.here and unit.coming is None):
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
                passed = [u for u in self.units if u.coming]
                self.advance()
                for other in passed:  # this leaf does not use them here
                    other.wait()
                    self.free(other)
        while unit.coming is None and not unit.here:
            self._wanted = unit.index
            self.meeting.meet(Want.GATHER, unit.index, model=self.number)
            self._wanted = None
        unit.wait()
        if self.leaf is not None:
            self.leaf.record.add(Act.GATHER, unit.index)
        self._prefetch()

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
        else:
            self.gradients.take(unit, leaf)
            self.gradients.start(unit, leaf)
        return True

    def pump(self) -> None:
        """Start all that needs no waiting: reductions of units whose gradients are complete, then one gather ahead."""
        leaf = self.leaf
        if leaf is None or leaf.cursor is None:
            return
        while (entry := leaf.cursor.next) and entry.act is Act.REDUCE and entry.unit in leaf.done:
            self.advance()
        self.gradients.progress()
        self._prefetch()

    def _prefetch(self) -> None:
        leaf = self.leaf
        if leaf is None or leaf.cursor is None or any(u.coming for u in self.units):
            return
        entry = leaf.cursor.next
        if entry and entry.act is Act.GATHER and self.updates.ready(self.by_index[entry.unit]):
            self.advance()


def shares(tensor: Tensor, whole: Tensor) -> bool:
    if tensor.is_meta or type(tensor) is AwayGrad:
        return False
    return tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() != 0
