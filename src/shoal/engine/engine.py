"""Runs a strategy's rules on a model. Knows moments, not algorithms."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from torch import nn

from shoal.comm.meet import Meeting, Want
from shoal.comm.mesh import Mesh
from shoal.engine.buffers import Buffers
from shoal.engine.fast import Axes
from shoal.engine.gradients import Gradients
from shoal.engine.leaf import Leaf, LeafInfo
from shoal.engine.moments import Moments
from shoal.engine.presence import Presence
from shoal.engine.residence import Residence, Room
from shoal.engine.scale import LossScale, Overflow
from shoal.engine.schedule import Act, Cursor, Record, fullest, in_order
from shoal.engine.turns import Turns
from shoal.engine.unit import Unit
from shoal.engine.units import around, together
from shoal.engine.updates import Decided, Updates
from shoal.engine.votes import Vote, counted, size_of
from shoal.errors import OrderError
from shoal.leaves import Assignment
from shoal.random import mix
from shoal.rules import Moment, Op, Rules, every_leaf


class Engine:
    """One model under one strategy.

    Args:
        model: the user's own; `engine.hooks.install` puts the hooks on it.
        units: all its units, in definition order.
        mesh: the grid of ranks.
        meeting: where ranks compare what they want.
        rules: what happens to a unit, and when.
        assignment: which rank computes which leaf.
        leaves: L, of one step.
        twig: see `Strategy`.
        overlap: follow a plan from the second leaf on; False: any number of backward calls, nothing at the same time.
        number: of the model in its job.
        scale: of losses; None: they are not scaled.
        axes: who adds up gradients, where numerics are fast.
        layerwise: update units while backward runs, in leaves that follow a plan.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], mesh: Mesh, meeting: Meeting, rules: Rules,
        assignment: Assignment, leaves: int, *, twig: int = 1, overlap: bool = True, number: int = 0,
        scale: LossScale | None = None, axes: Axes | None = None,
        layerwise: bool = False,
    ) -> None:  # fmt: skip
        self.number, self.scale = number, scale
        self.all_turns = False
        self.model, self.units, self.mesh, self.meeting, self.overlap = model, list(units), mesh, meeting, overlap
        self.gradients = Gradients(units, mesh, meeting, rules, number, scale, axes, layerwise=layerwise)
        self.updates = Updates(self.gradients, self._renew)
        self.presence = Presence(self.units, meeting, number, self.gradients, self.updates)
        self.moments = Moments(self.units, rules, self.presence, self.gradients, self.updates, lambda: self.last)
        self.set_leaves(assignment, leaves, twig)
        self.plan: Residence | None = None
        self.budgeted = False
        self.room: Callable[[], Room | None] = lambda: None  # for wholes, where there is a budget
        self.coming: LeafInfo | None = None
        self.steps, self.turn, self.turns_done = 0, 0, 0
        self.settled = False
        self.decided: Decided | None = None  # about this step, once all ranks have voted
        self.later = False  # may updates be pending when a step returns?
        self.resting = False  # this model has stepped, and others of the job have not
        self.overflow: tuple[Overflow, int] | None = None  # of this step, and the rank
        self.seed = 0
        self.say: Callable[[str], None] = lambda _text: None
        self.before_open: Callable[[], None] = lambda: None
        self.updater: Callable[[], Callable[[Sequence[Unit]], None]] | None = None  # of layerwise updates
        self.grads_written: Callable[[], bool] = lambda: True  # may whoever updates write to gradients?
        self.buffers = Buffers(model, mesh.data)
        self.on_open: Callable[[Engine, Leaf], None] = lambda _engine, _leaf: None

    # ---------------------------------------------------------------- steps and leaves

    def set_leaves(self, assignment: Assignment, leaves: int, twig: int) -> None:
        """Fix the leaves of a step. Only between steps."""
        self.assignment, self.leaves, self.twig = assignment, leaves, twig
        self.every_leaf = every_leaf(self.moments.rules[Moment.AFTER_BACKWARD])
        away = any(not u.resident for u in self.units)
        self.gathers = away and any(r.op is Op.GATHER for r in self.moments.rules[Moment.BEFORE_FORWARD])
        self.meeting.make_room(8 * leaves + size_of(self.gradients.names))
        self._new_step(leaves)

    def _new_step(self, present: int) -> None:
        self.turns = Turns(
            self.leaves, present, self.assignment, self.mesh.shard.size, every_leaf=self.every_leaf,
            all_turns=self.all_turns, twig=self.twig,
        )  # fmt: skip
        self.turn, self.settled, self.decided = 0, False, None
        self.gradients.begin(self.turns)
        self.touched: set[str] = set()

    def follow(self, before: Engine) -> None:
        """Go on counting where another engine of the same model has stopped. Between steps."""
        self.steps, self.turns_done, self.seed = before.steps, before.turns_done, before.seed
        if self.scale is not None and before.scale is not None:
            self.scale.load(before.scale.state())

    @property
    def rank(self) -> int:
        return self.mesh.world.rank

    @property
    def leaf(self) -> Leaf | None:
        """The leaf under way."""
        return self.presence.leaf

    @leaf.setter
    def leaf(self, leaf: Leaf | None) -> None:
        self.presence.leaf = leaf

    @property
    def leased(self) -> bool:
        """Does the user have all parameters for a while?"""
        return self.presence.leased

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes that every unit takes while it is whole, beyond what rests."""
        return {u.index: 0 if u.resident or u.common else u.numel * u.dtypes.compute.itemsize for u in self.units}

    @property
    def last(self) -> bool:
        """Is this rank in the step's last turn?"""
        return self.turn >= self.turns.count - 1

    @property
    def recording(self) -> bool:
        """Is a leaf under way that follows no plan?"""
        return self.leaf is not None and self.leaf.cursor is None

    @property
    def own_turns(self) -> int:
        """How many turns of this step run user code on this rank: at least one, so that all ranks run it."""
        return self.turns.run_by(self.mesh.cell)

    def open(self) -> None:
        """Begin a leaf, unless one is under way."""
        if self.leaf is not None or self.leased:
            return
        self.before_open()
        if self.resting:
            self._open_aside()
            return
        if self.settled or self.decided is not None:
            raise OrderError(
                "forward between clip_grad_norm() and optimizer.step()", remedy="call them one after the other"
            )
        self._check_parameters()
        if self.turn == 0 and self.coming is not None:
            self._new_step(self.coming.present)
            self.turns.summed = self.coming.summed
        number = self.turns.leaf(self.mesh.cell, self.turn)
        info, self.coming = self.coming or LeafInfo(number, 1.0, self.leaves), None
        if info.leaf != number:
            raise OrderError(
                f"the loader handed out leaf {info.leaf}, but leaf {number} is next",
                cause="optimizer.step() was not called once for every batch",
                remedy="with leaves= set, call optimizer.step() after every batch; it acts on a step's last one",
            )
        self._open(number, info.weight)
        assert self.leaf is not None
        self.buffers.begin(first=self.turn == 0)
        self.on_open(self, self.leaf)

    def _open(self, number: int | None, weight: float) -> None:
        if self.gathers:
            self._meet(Want.LEAF, self.turns_done)
        self.leaf = Leaf(number, weight, self.turn, self.turns_done, None)
        if self.plan is not None:
            after = not self.last
            course = self.plan.course(before=bool(self.presence.carried), after=after)
            reduces = self.turns.reduces(self.turn)
            self.leaf.cursor = Cursor(tuple(e for e in course.entries if reduces or e.act is Act.GATHER))
            self.presence.begin(self.leaf, course)
            if self.updater is not None and not after:
                self.updates.early = Decided(
                    step=self.steps, touched=self.gradients.told, apart=self.grads_written(), update=self.updater()
                )  # fmt: skip

    def _meet(self, want: Want, number: int, payload: bytes = b"") -> list[bytes]:
        return self.meeting.meet(want, number, payload, model=self.number)

    # ---------------------------------------------------------------- beside other models

    def run_all_turns(self) -> None:
        """User code runs on all ranks in all turns: models take turns in it, and nobody may be ahead."""
        self.all_turns = True
        self._new_step(self.leaves)

    def rest(self) -> None:
        """This model has stepped, and others of the job have not: what runs through it now is theirs."""
        self.resting = True

    def _open_aside(self) -> None:
        """A forward for the sake of another model: a generator's loss is the discriminator's output."""
        self.leaf = Leaf(None, 0.0, self.turn, self.turns_done, None)
        self.buffers.begin(first=True)

    def wake(self) -> None:
        """All models have stepped, or the loader hands out the next batch. Collective."""
        self.resting = False
        leaf, self.leaf = self.leaf, None
        acted = self.turn == 0
        if leaf is not None:
            self.gradients.drop_held(leaf)
            self.moments.visits.forget()
            self.presence.free_all()
            self.buffers.end(self.mesh.cell if acted else None, 1.0)
        changed = self._meet(Want.ASIDE, self.steps, bytes([self.buffers.changed])) if acted else []
        if any(map(any, changed)):  # else equal values would be averaged, and a third of three is not always the same
            self.buffers.settle(Turns.one_each(self.mesh.cells))

    def _check_parameters(self) -> None:
        """What the user may have done to them between two leaves, and nobody was told."""
        for unit in self.units:
            if unit.resident:
                unit.check_shown()
                unit.check_written()
        thawed = [n for u in self.units if not u.trainable for n, p in u.params.items() if p.requires_grad]
        if thawed:
            raise OrderError(
                f"'{thawed[0]}' was frozen in prepare and is trained now",
                remedy="call requires_grad_() before job.prepare, or inside `with job.change(model):`",
            )

    def set_weight(self, weight: float) -> None:
        """The weight of the leaf under way, or of the next."""
        if self.resting:
            return
        if self.leaf is None:
            self.open()
        assert self.leaf is not None
        if self.leaf.touched:
            raise OrderError(
                f"job.weight({weight:g}) came after backward", remedy="call job.weight before loss.backward()"
            )
        self.leaf.weight = weight

    def end_leaf(self) -> None:
        """The leaf's last backward has run: take what is left, take part in what others still need."""
        if self.leaf is None or self.resting:
            if self.resting:
                raise OrderError(
                    f"the optimizer of model {self.number} stepped again before those of the job's other models",
                    remedy="take a batch from a loader for every step, or step all models once per batch",
                )
            self.open()
        leaf = self.leaf
        assert leaf is not None
        if leaf.cursor is None and self.gathers:
            self._meet(Want.LEAF_END, self.turns_done)
        self.buffers.end(leaf.number, leaf.weight)
        trainable = [u for u in reversed(self.units) if u.trainable]
        for unit in trainable:
            self.gradients.check_kept(unit, leaf)
            self.gradients.take(unit, leaf)
        if leaf.cursor is not None:
            self.presence.drain(leaf)
        elif self.turns.reduces(self.turn):
            for unit in trainable:
                self.gradients.start(unit, leaf)
        self.moments.visits.forget()
        self.presence.free_all(leaf.stay)
        if self.plan is None and self.overlap:
            self._make_plan(leaf)
        if leaf.number is not None:
            self.turns.weights[leaf.number] = leaf.weight
        self.touched |= leaf.touched if leaf.number is not None and leaf.weight else set()
        self.leaf = None
        self.turn += 1
        self.turns_done += 1

    def _make_plan(self, leaf: Leaf) -> None:
        self.updates.order = list(dict.fromkeys(leaf.entered))
        told = self.mesh.world.share_any("plan", leaf.record.to_json())
        record = fullest([Record.from_json(data) for data in told])
        if not +record.times:  # nobody has run a backward: the next leaf will tell
            return
        reduced = {u.index for u in self.units if u.trainable}
        events = in_order(record, around(self.units), reduced, together(self.units))
        sizes, room = self._agreed()
        self.plan = Residence(events=events, sizes=sizes, room=room, carry=self.turns.count > 1 and not self.all_turns)
        self.presence.residence, self.moments.expected = self.plan, record.times
        if room is not None:
            self.say(str(self.plan))

    def _agreed(self) -> tuple[dict[int, int], Room | None]:
        """What units take while they are whole, and the room for that, as seen by the rank that has least."""
        sizes, room = self.sizes, self.room()
        if not self.gathers:
            return sizes, None
        mine = [*sizes.values(), *(-n for n in room or ())]
        form = struct.Struct(f"<{len(mine)}q")
        told = [form.unpack(data) for data in self.mesh.world.share("plan", form.pack(*mine))]
        worst = [max(seen) for seen in zip(*told, strict=True)]
        agreed = dict(zip(sizes, worst[: len(sizes)], strict=True))
        return agreed, Room(*(-n for n in worst[len(sizes) :])) if room else None

    def vote(self) -> None:
        """End the step: all leaves of all ranks are in, and ranks know what to update. Done once a step."""
        if self.decided is not None:
            return
        self.updates.flush()
        self.end_leaf()
        while self.turn < self.turns.count:  # serve ranks that have more leaves
            self._open(None, 0.0)
            self.end_leaf()
        weights, names = self.gradients.weights, self.gradients.names
        weights.hear()
        self.updates.catch_up(wait=True)
        vote = Vote(self.touched, self.buffers.changed, self.gradients.overflow).packed(names)
        result = counted(weights.from_votes(self._meet(Want.STEP, self.steps, weights.with_vote(vote))), names)
        self.overflow = result.overflow
        touched = result.touched if self.overflow is None else frozenset[str]()
        self.decided = Decided(step=self.steps, touched=touched, apart=self.grads_written())
        if result.changed:
            self.buffers.settle(self.turns)

    def settle(self) -> None:
        """Give all pieces their gradients."""
        self.vote()
        if self.settled or self.decided is None:
            return
        self.updates.flush()
        self.gradients.journeys.finish()
        for unit in self.gradients.units:
            self.gradients.hand_out(unit, self.decided.touched, apart=self.decided.apart)
        self.settled = True

    def update(self, update: Callable[[Sequence[Unit]], None]) -> None:
        """Bring units up to date, one by one. With `later` set they may stay behind until somebody needs them."""
        assert self.decided is not None
        self.updates.decide(self.gradients.units, replace(self.decided, update=update), later=self.later)

    def after_update(self) -> None:
        """The optimizer has stepped: make what rests here whole and current, forget gradients, begin the next step."""
        if self.settled and self.decided is not None:
            for unit in self.gradients.units:
                self._renew(unit, self.decided)
                self.gradients.forget(unit)
            for unit in self.units:
                unit.wait()
        self._rescale()
        self.updates.begin()
        self.steps += 1
        self._new_step(self.leaves)

    def _renew(self, unit: Unit, decided: Decided) -> None:
        """A unit's update is over: its parameters become whole again where they rest."""
        unit.narrow(lambda name: mix("round", self.seed, decided.step, name))
        unit.updated()
        for rule in self.moments.rules[Moment.AFTER_UPDATE]:
            if rule.op is Op.GATHER:
                unit.gather(f"unit {unit.index} step {decided.step}")

    def _rescale(self) -> None:
        if self.scale is None:
            return
        before, name = self.scale.scale, ""
        if self.overflow is not None:
            (leaf, parameter), rank = self.overflow
            name = self.gradients.names[parameter]
            where = f"in leaf {leaf} of step {self.steps} (rank {rank})"
            self.say(f"the gradient of '{name}' overflowed {where}: no update, loss scale {before:g} -> {before / 2:g}")
        self.scale.update(overflowed=self.overflow is not None, name=name)
        self.overflow = None

    def discard(self, names: Collection[str]) -> None:
        """`zero_grad()` for some parameters: in mid-leaf it forgets what this leaf has gathered for them."""
        self.gradients.discard(names, self.leaf)
