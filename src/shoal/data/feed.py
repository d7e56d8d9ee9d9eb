"""What loaders and averages need of a job: leaves, seeds, and who is handed what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from shoal.comm.meet import Meeting, Want
from shoal.comm.mesh import Mesh
from shoal.data.loader import Handed
from shoal.data.mean import Means
from shoal.engine import setup
from shoal.engine.leaf import Leaf, LeafInfo
from shoal.engine.turns import Turns
from shoal.random import everything, get_states, mix, set_states
from shoal.random import seed as set_seed
from shoal.rules import rules
from shoal.strategy import Strategy


class Trained(Protocol):
    """What a feed asks of a model in training. An engine is one."""

    seed: int
    coming: LeafInfo | None

    @property
    def steps(self) -> int:
        """Steps that have acted."""
        ...

    @property
    def leaf(self) -> Leaf | None:
        """The one under way."""
        ...

    @property
    def turn(self) -> int:
        """Of this step."""
        ...

    @property
    def turns(self) -> Turns:
        """Of this step."""
        ...

    @property
    def resting(self) -> bool:
        """Has this model stepped, and others have not?"""
        ...

    def rest(self) -> None: ...
    def wake(self) -> None: ...
    def before_open(self) -> None: ...
    def run_all_turns(self) -> None: ...
    def set_weight(self, weight: float, /) -> None: ...


class Loop:
    """A loop over batches: what the one around it was doing when it began."""

    def __init__(self, feed: LeafFeed) -> None:
        self.outer, self.handed, self.more, self.means = feed.loop, feed.handed, feed.more, feed.means
        self.coming = [engine.coming for engine in feed.engines]
        self.states = get_states()


class LeafFeed:
    """Keeps track of which leaf this rank's user code works on, and sets the generators for it.

    Args:
        strategy: settled.
        seed: the job's.
        say: called once, after the first step, with what a leaf turned out to be.
    """

    def __init__(self, strategy: Strategy, seed: int, mesh: Mesh, meeting: Meeting, say: Callable[[str], None]) -> None:
        self.strategy, self.seed, self.mesh = strategy, seed, mesh
        self.say: Callable[[str], None] | None = say
        self.means = Means(meeting)
        self.engines: list[Trained] = []
        self.stepped: list[Trained] = []  # models whose optimizers have stepped in the leaf under way
        self.acted, self.opened = False, False
        self.handed: Handed | None = None
        self.more = 0  # batches of the leaf under way after its first
        self.batches = 0  # handed out in this loop since a leaf ended: before its forward too
        self.loop: Loop | None = None
        self.samples = 0.0  # that were handed out to this rank, those of streams left out
        self.after_step: Callable[[], None] = lambda: None  # called between steps, on all ranks
        self.averaged: Callable[[float], None] = lambda _: None  # called with every mean that is known
        self.measured: Callable[[Mapping[str, object]], None] = lambda _: None  # called after an evaluation

    def bind(self, engine: Trained, instead_of: Trained | None = None) -> None:
        """A model is prepared. Whenever it opens a leaf, it calls `leaf_opens`."""
        if instead_of is not None:
            self.engines[self.engines.index(instead_of)] = engine
        else:
            self.engines.append(engine)
        engine.seed = self.seed
        if len(self.engines) > 1:
            for each in self.engines:
                each.run_all_turns()

    def unbind(self, engine: Trained) -> None:
        """A model is the user's own again."""
        self.engines.remove(engine)

    def set_seed(self, seed: int) -> None:
        """Another seed for the job."""
        self.seed = seed
        for engine in self.engines:
            engine.seed = seed

    @property
    def cell(self) -> int:
        return self.mesh.cell

    @property
    def leaves(self) -> int:
        assert self.strategy.leaves is not None
        return self.strategy.leaves

    @property
    def step(self) -> int:
        """Steps that have acted."""
        return max((engine.steps for engine in self.engines), default=0)

    def leaf_now(self) -> int | None:
        """The leaf that this rank works on, or comes to next; None: none in this turn."""
        if self.handed is not None or not self.engines:
            return None if self.handed is None else self.handed.leaf
        engine = self.engines[0]
        return engine.turns.leaf(self.cell, engine.turn)

    def new_turns(self, present: int) -> Turns:
        """The leaves of a step of which the first `present` have data."""
        assignment = setup.leaves_of(self.strategy, self.mesh, rules(self.strategy))
        several = len(self.engines) > 1
        return Turns(self.leaves, present, assignment, self.mesh.shard.size, every_leaf=False, all_turns=several)

    def hand_out(self, handed: Handed) -> None:
        """A batch is about to reach the user."""
        for engine in self.engines:
            engine.before_open()
        self._advance()
        self.handed = handed
        self.samples += handed.samples * handed.weight if handed.leaf is not None else 0
        self.batches += 1
        self.means.begin(handed)
        for engine in self.engines:
            engine.coming = LeafInfo(handed.leaf, handed.weight, handed.turns.present, handed.turns.summed)
        if any(engine.leaf is not None for engine in self.engines):  # one more batch of the same leaf
            self.more += 1
            everything(mix("more", self.seed, self.step, str(handed.leaf), self.more))  # random numbers of its own
            return
        self.more = 0
        set_seed(self.seed, self.step, handed.leaf)

    def ended(self, engine: Trained, acted: bool) -> None:
        """A model's optimizers have ended its leaf. The job's leaf ends with the last model's."""
        self.stepped.append(engine)
        self.acted |= acted
        if len(self.stepped) == len(self.engines):
            self._advance()
            self.batches = 0
        else:
            engine.rest()

    def _advance(self) -> None:
        for engine in self.stepped:
            if engine.resting:
                engine.wake()
        self.stepped.clear()
        self.opened = False
        if self.acted:
            self.acted = False
            self.between_steps()
            self.after_step()

    def begin(self) -> Loop:
        """A loop over batches begins, perhaps inside another."""
        self.loop, self.batches = Loop(self), 0
        self.means = Means(self.means.meeting)
        return self.loop

    def end(self, loop: object) -> None:
        """Go on as before the loop. An evaluation in the middle of a leaf changes nothing for the leaf."""
        if not isinstance(loop, Loop) or self.loop is not loop:  # another one has begun since
            return
        self.loop, self.handed, self.more, self.means = loop.outer, loop.handed, loop.more, loop.means
        for engine, coming in zip(self.engines, loop.coming, strict=False):
            engine.coming = coming
        if self.handed is None:
            set_seed(self.seed, self.step)
        else:
            set_states(loop.states)

    def compare(self, epoch: int, mark: bytes, data: bytes, error: Callable[[], Exception]) -> list[bytes]:
        """See `Feed.compare`."""
        meeting = self.means.meeting
        marks = meeting.meet(Want.REPORT, epoch, mark)
        if len(set(marks)) > 1:
            raise error()
        parts = meeting.world.share("report", data)
        return parts[:: self.mesh.tensor.size]  # ranks of one cell are handed the same

    def between_steps(self) -> None:
        """What is drawn now is drawn alike on all ranks."""
        self.mesh.world.carrier.note(f"has done step {self.step - 1}")
        set_seed(self.seed, self.step)
        if self.say is not None and self.handed is not None:
            self.say(self._what_a_leaf_is(max(self.batches, self.more + 1), self.handed.samples))
            self.say = None

    def _what_a_leaf_is(self, batches: int, samples: int) -> str:
        """Which meaning holds, with the arithmetic of a step's batch."""
        several = f"{batches} x " if batches > 1 else ""
        sum_ = f": {self.leaves} x {several}{samples} samples" if samples else ""
        bits = "bits" if self.strategy.numerics == "exact" else "numbers but for rounding"
        if batches == 1:
            return f"a leaf is one batch of the loader, {self.leaves} a step{sum_}; the same {bits} at any world size"
        return (
            f"a leaf is the {batches} batches between two calls of optimizer.step(), {self.leaves} a step{sum_}; "
            f"the same {bits} at this world size only; for any, leaves= and step() after every batch"
        )

    def leaf_opens(self, engine: Trained, leaf: Leaf) -> None:
        """Tell the others; set the generators for a leaf that no loader handed out."""
        self.mesh.world.carrier.note(f"computes leaf {leaf.number} of step {engine.steps}")
        if self.handed is None and not self.opened:
            self.means.begin(Handed(leaf.number, leaf.weight, engine.turn, engine.turns))
            set_seed(self.seed, engine.steps, leaf.number)
        self.opened = True

    def weigh(self, weight: float) -> None:
        """The user says how much the leaf under way weighs."""
        for engine in self.engines:
            engine.set_weight(weight)
        self.means.weigh(weight)

    def mean(self, value: float | Tensor) -> float | None:
        """See `Job.mean`."""
        if self.means.handed is None:  # outside of all leaves every rank counts once
            self.means.begin(Handed(self.cell, 1.0, 0, Turns.one_each(self.mesh.cells)))
        if isinstance(value, Tensor):
            value = 0.0 if value.is_meta else float(value.detach())
        found = self.means.mean(value, self.cell, self.step)
        if found is not None:
            self.averaged(found)
        return found
