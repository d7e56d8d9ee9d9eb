"""What loaders and averages need of a job: leaves, seeds, and who is handed what."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from shoal.comm.meet import Meeting
from shoal.comm.mesh import Mesh
from shoal.data.loader import Handed
from shoal.data.mean import Means
from shoal.engine import setup
from shoal.engine.engine import Engine
from shoal.engine.leaf import Leaf, LeafInfo
from shoal.engine.turns import Turns
from shoal.random import everything, get_states, mix, set_states
from shoal.random import seed as set_seed
from shoal.rules import rules
from shoal.strategy import Strategy


class Loop:
    """A loop over batches: what the one around it was doing when it began."""

    def __init__(self, feed: LeafFeed) -> None:
        self.outer, self.handed, self.more, self.means = feed.loop, feed.handed, feed.more, feed.means
        self.coming = feed.engine.coming if feed.engine is not None else None
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
        self.engine: Engine | None = None
        self.handed: Handed | None = None
        self.more = 0  # batches of the leaf under way after its first
        self.loop: Loop | None = None

    def bind(self, engine: Engine) -> None:
        """The model is prepared."""
        self.engine = engine
        engine.on_open = self._leaf_opens

    @property
    def rank(self) -> int:
        return self.mesh.world.rank

    @property
    def leaves(self) -> int:
        assert self.strategy.leaves is not None
        return self.strategy.leaves

    @property
    def step(self) -> int:
        """Steps that have acted."""
        return self.engine.steps if self.engine is not None else 0

    def new_turns(self, present: int) -> Turns:
        """The leaves of a step of which the first `present` have data."""
        assignment = setup.leaves_of(self.strategy, self.mesh, rules(self.strategy))
        return Turns(self.leaves, present, assignment, self.mesh.shard.size, every_leaf=False)

    def hand_out(self, handed: Handed) -> None:
        """A batch is about to reach the user."""
        self.handed = handed
        self.means.begin(handed)
        if self.engine is not None:
            self.engine.coming = LeafInfo(handed.leaf, handed.weight, handed.turns.present)
            if self.engine.leaf is not None:  # one more batch of the same leaf: random numbers of its own
                self.more += 1
                everything(mix("more", self.seed, self.step, str(handed.leaf), self.more))
                return
        self.more = 0
        set_seed(self.seed, self.step, handed.leaf)

    def begin(self) -> Loop:
        """A loop over batches begins, perhaps inside another."""
        self.loop = Loop(self)
        self.means = Means(self.means.meeting)
        return self.loop

    def end(self, loop: object) -> None:
        """Go on as before the loop. An evaluation in the middle of a leaf changes nothing for the leaf."""
        if not isinstance(loop, Loop) or self.loop is not loop:  # another one has begun since
            return
        self.loop, self.handed, self.more, self.means = loop.outer, loop.handed, loop.more, loop.means
        if self.engine is not None:
            self.engine.coming = loop.coming
        if self.handed is None:
            set_seed(self.seed, self.step)
        else:
            set_states(loop.states)

    def between_steps(self) -> None:
        """What is drawn now is drawn alike on all ranks."""
        self.mesh.world.carrier.note(f"has done step {self.step - 1}")
        set_seed(self.seed, self.step)
        if self.say is not None and self.handed is not None:
            self.say(self._what_a_leaf_is(self.more + 1))
            self.say = None

    def _what_a_leaf_is(self, batches: int) -> str:
        if batches == 1:
            return f"a leaf is one batch of the loader, {self.leaves} a step: the same bits at any world size"
        return (
            f"a leaf is the {batches} batches between two calls of optimizer.step(), {self.leaves} a step: the same "
            "bits at this world size only; for any, leaves= and step() after every batch"
        )

    def _leaf_opens(self, leaf: Leaf) -> None:
        """Tell the others; set the generators for a leaf that no loader handed out."""
        self.mesh.world.carrier.note(f"computes leaf {leaf.number} of step {self.step}")
        if self.handed is None and self.engine is not None:
            self.means.begin(Handed(leaf.number, leaf.weight, self.engine.turn, self.engine.turns))
            set_seed(self.seed, self.step, leaf.number)

    def weigh(self, weight: float) -> None:
        """The user says how much the leaf under way weighs."""
        assert self.engine is not None
        self.engine.set_weight(weight)
        self.means.weigh(weight)

    def mean(self, value: float | Tensor) -> float | None:
        """See `Job.mean`."""
        if self.means.handed is None:  # outside of all leaves every rank counts once
            ranks = self.mesh.world.size
            one_each = Turns(ranks, ranks, tuple((r,) for r in range(ranks)), 1, every_leaf=False)
            self.means.begin(Handed(self.rank, 1.0, 0, one_each))
        if isinstance(value, Tensor):
            value = 0.0 if value.is_meta else float(value.detach())
        return self.means.mean(value, self.rank, self.step)
