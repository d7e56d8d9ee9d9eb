"""What happens to units when blocks of the model run forward and backward: the hooks call, the rules say what.

In the first leaf this is also recorded, and makes the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from shoal.engine.autograd import at_end_of_backward, graph_task
from shoal.engine.gradients import Gradients
from shoal.engine.leaf import Leaf
from shoal.engine.presence import Presence, shares
from shoal.engine.schedule import Act
from shoal.engine.unit import Unit
from shoal.engine.updates import Updates
from shoal.engine.visits import Visits
from shoal.errors import OrderError, PlanError
from shoal.rules import Moment, Op, Rules


class Moments:
    """Those of one model.

    Args:
        units: of the model, in definition order.
        rules: what happens at each moment.
        presence: of parameters.
        gradients: of the leaf under way.
        updates: without which parameters are not current.
        last: is this rank in the step's last turn?
    """

    def __init__(
        self, units: Sequence[Unit], rules: Rules, presence: Presence, gradients: Gradients, updates: Updates,
        last: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.units = units
        self.rules = {m: [r for r in rules if r.moment is m] for m in Moment}
        self.presence, self.gradients, self.updates, self.last = presence, gradients, updates, last
        self.visits = Visits(self._let_go)
        self.expected = Counter[int]()  # once there is a plan: how often each end of a unit is complete in a leaf
        self.begun_most = 0  # bytes of gradients of units whose backward was under way at the same time

    def at(self, moment: Moment, unit: Unit, *ops: Op) -> None:
        """Do what the rules say; `ops`: only these."""
        for rule in self.rules[moment]:
            if (not ops or rule.op in ops) and (not rule.last or self.last()):
                self._do(rule.op, unit)

    def _do(self, op: Op, unit: Unit) -> None:
        match op:
            case Op.GATHER if self.presence.leaf is None and unit.resident:
                unit.gather()
            case Op.GATHER:
                self.presence.need(unit)
            case Op.FREE:
                self.presence.free(unit)
            case Op.REDUCE | Op.AGREE:
                raise AssertionError(f"{op} travels: see Gradients.start")

    def before_forward(self, units: Iterable[Unit], block: nn.Module) -> None:
        leaf = self.presence.leaf
        self.visits.enter(units, block)
        for unit in units:
            self.updates.bring(unit)
            if leaf is not None and leaf.cursor is None:
                leaf.entered.append(unit.index)
            self.at(Moment.BEFORE_FORWARD, unit)
        self.updates.advance()

    def after_forward(
        self, units: Iterable[Unit], block: nn.Module, outputs: Sequence[Tensor], *, recomputing: bool
    ) -> None:  # fmt: skip
        """Free the units of a block, unless its backward is near or would go unnoticed."""
        for unit in units:
            if recomputing or unit.resident or self.presence.leased:
                continue
            if any(shares(t, unit.whole) for t in outputs) or (
                torch.is_grad_enabled() and not any(t.requires_grad for t in outputs)
            ):
                self.presence.keep(unit)
            elif self.visits.leave(unit, block):
                self.at(Moment.AFTER_FORWARD, unit)

    def forward_ends(self) -> None:
        """The model's output is there. What follows may be its backward, if a leaf is under way."""
        if self.presence.leaf is None:
            self.visits.end()

    def _let_go(self, unit: Unit) -> None:
        """Nobody is inside a unit of several blocks any more, and something else is entered."""
        self.at(Moment.AFTER_FORWARD, unit, Op.FREE)

    def before_backward(self, units: Iterable[Unit], block: nn.Module) -> None:
        """The gradient of a block's output is there."""
        if self.presence.leaf is None:
            raise self._no_leaf()
        entered = self._call(self.presence.leaf)
        self.visits.enter(units, block)
        for unit in units:
            entered.add(unit.index)
            self.at(Moment.BEFORE_BACKWARD, unit)
            if torch.is_grad_enabled():  # create_graph=True: there will be a backward through this backward
                self.presence.keep(unit)

    def backward_begins(self) -> None:
        """The gradient of one of the model's outputs is there."""
        if self.presence.leaf is not None:
            self._call(self.presence.leaf)

    def _call(self, leaf: Leaf) -> set[int]:
        """At the first sign of a backward call, ask for a sign at its end. Returns the units that it has entered."""
        call = graph_task()
        if call not in leaf.backwards:
            self.updates.flush()  # of units that the forward did not enter
            leaf.backwards[call] = set()
            at_end_of_backward(lambda: self.backward_done(call))
        return leaf.backwards[call]

    def after_backward(self, units: Iterable[Unit], block: nn.Module, ends: Iterable[tuple[Unit, int]]) -> None:
        """The gradient of a block's input is there: all that came after it is done."""
        if self.presence.leaf is not None:
            if not units:  # of the blocks around: plans put what they lack before that
                self.visits.end()
            for unit, end in ends:
                self._complete(unit, end)
            for unit in units:
                if self.visits.leave(unit, block):
                    self.at(Moment.AFTER_BACKWARD, unit, Op.FREE)
            self.presence.pump()

    def _complete(self, unit: Unit, end: int) -> None:
        """The backward of one of a unit's ends is over for now; the first leaf has shown whether for good."""
        leaf = self.presence.leaf
        assert leaf is not None
        if end in leaf.fresh:
            leaf.fresh.discard(end)
            leaf.record.add(Act.REDUCE, unit.index, end)
            if leaf.cursor is not None and leaf.record.times[end] == self.expected[end]:
                leaf.complete[unit.index] += 1
                if leaf.complete[unit.index] == len(unit.ends):  # an end without gradients is waited for in vain
                    self.gradients.take(unit, leaf)

    def after_gradient(self, unit: Unit, name: str, param: Tensor) -> None:
        """One gradient has been added. Called once per parameter: it does no more than it must."""
        leaf = self.presence.leaf
        if leaf is None:
            raise self._no_leaf()
        if graph_task() not in leaf.backwards:
            self._call(leaf)
        if self.gradients.added or self.gradients.stale:
            self.gradients.show(name, param)
        if not unit.here:
            self.presence.check_here(unit)
        leaf.fresh.add(unit.end_of[name])
        leaf.touched.add(name)
        self._count(unit, leaf)
        if unit.index in leaf.done:
            raise PlanError(
                f"'{name}' got a gradient after those of {unit} had been handed on",
                cause="more backward calls, or other uses of a block, than in the first leaf",
                remedy="shoal.init(..., overlap=False) reduces at optimizer.step(), after any number",
            )

    def _count(self, unit: Unit, leaf: Leaf) -> None:
        if self.gradients.layerwise and unit.index not in leaf.begun:
            leaf.begun.add(unit.index)
            under_way = [u for u in self.units if u.index in leaf.begun and not _over(u, leaf)]
            self.begun_most = max(self.begun_most, sum(u.layout.used * u.dtypes.compute.itemsize for u in under_way))

    def _no_leaf(self) -> OrderError:
        return OrderError(
            "backward without a training forward of the prepared model since optimizer.step()",
            cause="the model is in eval() mode, or backward runs inside job.whole, or after step()",
            remedy="model.train(); then forward, backward and optimizer.step() in this order",
        )

    def backward_done(self, call: int) -> None:
        """A backward call is over. It may have run inside another, as some checkpointing does."""
        leaf = self.presence.leaf
        if leaf is None:
            return
        entered = leaf.backwards.pop(call, set())
        over = [u for u in reversed(self.units) if not leaf.backwards or u.index in entered]
        self.visits.leave_all(over, for_good=not leaf.backwards)
        for unit in over:
            for end in unit.ends if leaf.fresh else ():
                self._complete(unit, end)
            if not unit.merged:
                self.at(Moment.AFTER_BACKWARD, unit, Op.FREE)
        if not leaf.backwards:
            self.gradients.hide()
        self.presence.pump()


def _over(unit: Unit, leaf: Leaf) -> bool:
    """Are all of its gradients there, as far as anybody knows in this leaf?"""
    if leaf.cursor is not None:
        return unit.index in leaf.done
    return all(leaf.record.times[end] and end not in leaf.fresh for end in unit.ends)
