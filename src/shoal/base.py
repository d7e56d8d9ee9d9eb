"""What all parts of a job know: its ranks, its models, and whether it is between two steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from shoal.collectives import Collectives
from shoal.comm.group import Carrier
from shoal.comm.meet import Meeting
from shoal.comm.mesh import Mesh
from shoal.comm.meter import Meter
from shoal.data.feed import LeafFeed
from shoal.data.loader import Loader
from shoal.engine import setup
from shoal.engine.binding import Binding
from shoal.engine.budget import Budget
from shoal.errors import OrderError
from shoal.launch.rundir import RunDir, open_run_dir
from shoal.logs import say, warn
from shoal.settings import Resolved
from shoal.start import Seat
from shoal.strategy import Strategy
from shoal.trace import Trace
from shoal.tracked import Tracked
from shoal.tracking import Tracking


class Base:
    """A job's state. `Looping`, `Saving` and `Verbs` add methods; `Job` is all of them."""

    device: torch.device
    """Where this rank's model and batches belong."""

    def __init__(self, strategy: Strategy, carrier: Carrier, resolved: Resolved, place: Seat) -> None:
        s = resolved.settings
        self.resolved = resolved
        self._carrier = carrier
        copy = strategy.ranks_per_copy if isinstance(strategy.ranks_per_copy, int) else 1
        self._mesh = Mesh.of(carrier, copy, strategy.tensor)
        self._meeting = Meeting(self._mesh.world)
        self._meeting.make_room(32)
        self._bindings: dict[str, Binding] = {}
        self._budget = Budget(s.memory, self._bindings, pending=s.pending, world=self._mesh.world, say=self._say)
        self._wanted: dict[str, setup.Wanted] = {}
        self._latest: Binding | None = None  # the model that stepped last
        self._loaders: list[Loader[object]] = []
        self._feed = LeafFeed(strategy, s.seed, self._mesh, self._meeting, self._say)
        self._resumed: Path | None = None
        self._saved: Path | None = None  # the latest checkpoint that this job wrote or read
        self._trace = Trace.asked(os.environ if place.own_process else {})
        self.device = torch.device(s.device or _default_device(carrier))
        self._together = Collectives(self._meeting, self.device)
        self.threads = s.threads
        self.run_dir: RunDir | None = open_run_dir(resolved) if carrier.rank == 0 and place.own_process else None
        self._tracked = Tracked(self._say)
        self._tracking = Tracking(self.event, resolved.settings.model_dump())

    # ---------------------------------------------------------------- place

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self._mesh.world.rank

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self._mesh.world.size

    @property
    def leaves(self) -> int:
        """Leaves of one step."""
        return self._feed.leaves

    @property
    def strategy(self) -> Strategy:
        """The strategy with nothing left open."""
        return self._feed.strategy

    @property
    def seed(self) -> int:
        """The job's seed."""
        return self._feed.seed

    @property
    def step(self) -> int:
        """Steps that have acted, those before a resumed checkpoint included."""
        return self._feed.step

    # ---------------------------------------------------------------- telling

    def event(self, kind: str, **fields: object) -> None:
        """Append a line to the run directory's events.jsonl (rank 0)."""
        if self.run_dir is not None:
            self.run_dir.event(kind, **fields)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            say(text)

    def _warn(self, text: str) -> None:
        if self.rank == 0:
            warn(text)

    def _share(self, data: bytes) -> list[bytes]:
        return self._mesh.world.share_any("file", data)

    # ---------------------------------------------------------------- models

    def _bind(self, binding: Binding, instead_of: Binding | None = None) -> None:
        """Feed a model, and know when it steps."""
        binding.on_step, binding.engine.on_open = self._steps, self._feed.leaf_opens
        self._feed.bind(binding.engine, None if instead_of is None else instead_of.engine)

    def _next_unit(self) -> int:
        """A number that no unit of the job has."""
        return 1 + max((unit.index for b in self._bindings.values() for unit in b.engine.units), default=-1)

    def _build_again(self, name: str, old: Binding, wanted: setup.Wanted) -> None:
        """Prepare a model again that has been undone. Its schedulers follow."""
        self._wanted[name] = wanted
        binding = self._bindings[name] = setup.build(old.model, old.optimizers, wanted)
        binding.engine.follow(old.engine)
        self._bind(binding, instead_of=old)
        for scheduler in old.schedulers:
            binding.add_scheduler(scheduler)

    def _steps(self, binding: Binding) -> None:
        self._latest = binding

    def _all_bound(self) -> Sequence[Binding]:
        if not self._bindings:
            raise OrderError("the job has no model yet", remedy="model, optimizer = job.prepare(model, optimizer)")
        return list(self._bindings.values())

    def _find(self, model: nn.Module | None) -> Binding:
        """The binding of a prepared model; None: of the only one."""
        bindings = self._all_bound()
        if model is None and len(bindings) > 1:
            raise OrderError(f"the job trains {len(bindings)} models", remedy="say which with model=")
        found = next((b for b in bindings if model is None or b.model is model), None)
        if found is None:
            raise OrderError(
                f"this {type(model).__name__} was not prepared by this job", remedy="pass the prepared model"
            )
        return found

    def _find_optimizer(self, optimizer: Optimizer) -> Binding:
        found = next((b for b in self._all_bound() if optimizer in b.optimizers), None)
        if found is None:
            raise OrderError(
                f"this {type(optimizer).__name__} was not prepared by this job", remedy="pass a prepared optimizer"
            )
        return found

    def _between_steps(self, what: str) -> None:
        """Raises `OrderError` in the middle of a step."""
        engines = [b.engine for b in self._bindings.values()]
        for engine in engines:
            engine.updates.flush()
        if any(e.leaf is not None or e.turn or e.settled or e.resting for e in engines):
            raise OrderError(f"{what} in the middle of a step", remedy="call it when job.stepped is True")

    def _state_between_steps(self, what: str) -> None:
        """The same, for what reads or writes state: it needs whole parameters."""
        if self.strategy.tensor > 1:
            raise OrderError(
                f"{what} with tensor={self.strategy.tensor}: it would take boxes of DTensors as if they were all",
                remedy="p.full_tensor() for every parameter of the model, or torch.distributed.checkpoint",
            )
        self._between_steps(what)


def _default_device(carrier: Carrier) -> str:
    if isinstance(carrier, Meter) and carrier.size > 1:
        return "meta"
    if carrier.size > 1:
        return "cpu"
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(found) if found is not None else "cpu"
