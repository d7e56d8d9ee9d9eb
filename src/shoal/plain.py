"""Stands in for a job while a script runs by torch alone: `shoal verify --plain` compares with what comes out.

Shared with a job are which samples make which leaf, and seeds. Everything else is the script's and torch's: gradients,
optimizers, sums, what a forward and a step do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from shoal.comm.meet import Meeting
from shoal.comm.mesh import Mesh
from shoal.comm.meter import Alone
from shoal.data.feed import LeafFeed
from shoal.data.loader import Handed, LeafBatch, Loader, Steps, steps_of_loader
from shoal.data.micro import check_count, micro_steps
from shoal.data.partition import Key, steps_of
from shoal.engine.leaf import Leaf, LeafInfo
from shoal.engine.turns import Turns
from shoal.errors import SettingError
from shoal.launch import ddp
from shoal.random import seed as set_seed
from shoal.settings import Resolved
from shoal.squares import add_up, squares
from shoal.start import strategy_of
from shoal.strategy import Strategy
from shoal.trace import By, Trace, Traced


@dataclass(eq=False)
class Model:
    """One of the script's models. A leaf is open between its forward and its step."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    on_open: Callable[[Model, Leaf], None]
    seed: int = 0
    steps: int = 0
    leaf: Leaf | None = None
    coming: LeafInfo | None = None
    resting: bool = False
    turn: int = 0
    turns: Turns = field(default_factory=lambda: Turns.one_each(1))
    waiting: list[Optimizer] = field(default_factory=list[Optimizer])

    def before_open(self) -> None: ...
    def run_all_turns(self) -> None: ...
    def set_weight(self, weight: float, /) -> None: ...

    def rest(self) -> None:
        self.resting = True

    def wake(self) -> None:
        self.resting = False

    def open(self, number: int) -> None:
        """A training forward begins."""
        if self.leaf is None and not self.resting:
            self.leaf = Leaf(number, 1.0, 0, self.steps, None)
            self.on_open(self, self.leaf)


class PlainFeed(LeafFeed):
    """Which samples, and which seeds.

    Args:
        strategy: its leaves are those of a step here.
        rank: of DDP, which computes the leaf of that number.
    """

    def __init__(self, strategy: Strategy, seed: int, rank: int) -> None:
        mesh = Mesh.of(Alone(), 1)
        meeting = Meeting(mesh.world)
        meeting.make_room(32)
        super().__init__(strategy, seed, mesh, meeting, lambda _text: None)
        self.rank = rank
        self.factor = 1.0  # of this rank's gradients in DDP's mean
        self.unlike_whole = ""  # why the leaves of a step are not to be computed as one batch
        self._drawn: Tensor | None = None

    @property
    def cell(self) -> int:
        return self.rank

    def new_turns(self, present: int) -> Turns:
        return Turns(self.leaves, present, tuple((leaf,) for leaf in range(self.leaves)), 1, every_leaf=False)

    def hand_out(self, handed: Handed) -> None:
        super().hand_out(handed)
        self.weigh_in(handed.weight, handed.turns.total / (self.leaves if handed.turns.summed else 1))
        self._drawn = None if handed.turns.summed else torch.get_rng_state()

    def weigh_in(self, weight: float, total: float) -> None:
        """In DDP's mean over ranks count as shoal's leaves do."""
        self.factor = self.leaves * weight / total if total else 0.0

    def look(self, models: Sequence[Model]) -> None:
        """Before the first step: would one forward of all leaves' samples compute the same?"""
        if self.handed is None and not self.micro:
            self.unlike_whole = "the script draws its own batches"
        elif self._drawn is not None and not torch.equal(self._drawn, torch.get_rng_state()):
            self.unlike_whole = "random numbers are drawn in every leaf"
        norms = {type(m).__name__ for model in models for m in model.model.modules() if isinstance(m, _BatchNorm)}
        if norms and not self.micro:
            self.unlike_whole = f"{norms.pop()} takes its statistics from each leaf"

    micro = False
    """Are leaves the micro-steps of a loop that accumulates by itself?"""


def merged(steps: Steps, leaves: int) -> Steps:
    """All leaves of a step as one batch."""

    def whole(epoch: int, _leaves: int) -> list[list[LeafBatch]]:
        return [[LeafBatch([i for b in step for i in b.indices], 1.0)] for step in steps(epoch, leaves)]

    return whole


class PlainJob:
    """What a script sees as its job. Made by `shoal.init`, never by users."""

    def __init__(self, trace: Trace, resolved: Resolved) -> None:
        s = resolved.settings
        if s.precision != "float32":
            raise SettingError(
                f"precision={s.precision} has no plain counterpart", remedy="shoal verify --plain without it"
            )
        self.resolved, self._trace = resolved, trace
        self.seed, self.threads, self.device = s.seed, s.threads, torch.device(s.device or "cpu")
        self.leaves = s.leaves or 1
        self.rank = ddp.join() if trace.by is By.DDP else 0
        self.world_size = self.leaves if trace.by is By.DDP else 1
        one = Strategy.named("ddp") if trace.by is By.DDP else strategy_of(resolved, None)
        self.strategy = one.settled(self.world_size, self.world_size)
        inside = Strategy(leaves=self.leaves if trace.by is By.DDP else 1)
        self._feed = PlainFeed(inside, s.seed, self.rank)
        self._feed.after_step = self._take_trace
        self._models: dict[str, Model] = {}
        self.stepped, self.run_dir = False, None
        torch.set_num_threads(s.threads)
        set_seed(self.seed, 0)

    @property
    def step(self) -> int:
        return max((m.steps for m in self._models.values()), default=0)

    @property
    def main(self) -> bool:
        return self.rank == 0

    # ---------------------------------------------------------------- model and data

    def prepare(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], /,
        *others: DataLoader[object] | LRScheduler, name: str = "", **_settings: object,
    ) -> tuple[object, ...]:  # fmt: skip
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if any(p.is_meta for p in model.parameters()):
            raise SettingError("a model on the meta device has no plain counterpart", remedy="give it values first")
        self._trace.widen(model)
        ours = self._models[name] = Model(model, optimizers, self._feed.leaf_opens, waiting=list(optimizers))
        self._feed.bind(ours)

        def forward(_module: nn.Module, _args: object) -> None:
            if model.training and torch.is_grad_enabled():
                ours.open(self.rank)

        def stepped(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
            self._after(ours, optimizer)

        model.register_forward_pre_hook(forward)
        for each in optimizers:
            each.register_step_post_hook(stepped)
        if self._trace.by is By.DDP:
            ddp.wrap(model, lambda: self._feed.factor)
        found = [x if isinstance(x, LRScheduler) else self._wrap(x) for x in others]
        set_seed(self.seed, 0)
        return (model, optimizer, *found)

    def loader(
        self, dataset: Dataset[object], *, global_batch: int, shuffle: bool = True, drop_last: bool = False,
        workers: int = 0, collate_fn: Callable[[list[object]], object] | None = None,
        partition: str = "row", key: Key | None = None, **_how: object,
    ) -> Loader[object]:  # fmt: skip
        steps = steps_of(
            dataset, self.seed, global_batch, self.leaves,
            shuffle=shuffle, drop_last=drop_last, partition=partition, key=key,
        )  # fmt: skip
        return self._loader(DataLoader(dataset, num_workers=workers, collate_fn=collate_fn), steps)

    def _wrap(self, source: DataLoader[object]) -> Loader[object]:
        return self._loader(source, steps_of_loader(source, self.seed, lambda _text: None))

    def _loader(self, source: DataLoader[object], steps: Steps) -> Loader[object]:
        made = merged(steps, self.leaves) if self._trace.by is By.WHOLE else steps
        loader = Loader(self._feed, source, made)
        loader.made = self._trace.widened
        return loader

    # ---------------------------------------------------------------- in the loop

    def _after(self, ours: Model, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        if optimizer in ours.waiting:
            ours.waiting.remove(optimizer)
        if ours.waiting:
            return
        if self.step == 0:
            self._feed.look(list(self._models.values()))
        ours.waiting, ours.leaf, self.stepped = list(ours.optimizers), None, True
        ours.steps += 1
        self._feed.ended(ours, acted=True)

    def _take_trace(self) -> None:
        facts = Traced(leaves=self.leaves, device=str(self.device), unlike_whole=self._feed.unlike_whole)
        self._trace.take(self.rank, facts, {name: self._state(m.model) for name, m in self._models.items()})

    def _state(self, model: nn.Module) -> dict[str, Tensor]:
        """Buffers count only where bits do: DDP has rank 0's, and a whole batch one value."""
        if self._trace.by is By.ALONE:
            return cast("dict[str, Tensor]", model.state_dict())
        return {name: p.detach() for name, p in model.named_parameters()}

    def micro_steps(self, count: int) -> Iterator[int]:
        check_count(count, self.leaves)
        self._feed.micro = True
        return micro_steps(self._feed, count, lambda: None)

    def weight(self, samples: float, *, full: float) -> None:
        for model in self._models.values():
            model.open(self.rank)  # as in a job: what is drawn from here on is the leaf's
        if self._trace.by is By.DDP:
            self._feed.weigh_in(samples / full, ddp.total(samples / full))

    def clip_grad_norm(self, max_norm: float, *, model: nn.Module | None = None) -> float:
        """In float64 torch's own; else by the norm that a job takes, whose bits are not those of torch's."""
        of = model or next(iter(self._models.values())).model
        if self._trace.by is not By.ALONE:
            return float(nn.utils.clip_grad_norm_(of.parameters(), max_norm))
        grads = [p.grad for p in of.parameters() if p.grad is not None]
        total = 0.0
        for grad in grads:
            total += add_up(squares(grad.reshape(-1), 0), grad.numel())
        norm = math.sqrt(total)
        scale = min(max_norm / (norm + 1e-6), 1.0)
        for grad in grads if scale != 1.0 else ():
            grad.mul_(scale)
        return norm

    def loss_scale(self, _model: nn.Module | None = None) -> float:
        return 1.0

    def mean(self, value: float | Tensor) -> float | None:
        return self._feed.mean(value)

    # ---------------------------------------------------------------- state

    def whole(self, _model: nn.Module, *, write: bool = False) -> AbstractContextManager[None]:
        del write
        return nullcontext()

    def state_dict(self, what: nn.Module | Optimizer) -> dict[str, object]:
        return dict(what.state_dict()) if self.rank == 0 else {}

    def save(self, path: str | Path, *, keep: int | None = None) -> Path:
        """Nothing is written: what is saved under comparison is thrown away."""
        del keep
        return self._trace.saved(Path(path)) / f"step-{self.step}"

    def event(self, _kind: str, **_fields: object) -> None: ...

    def print(self, *values: object, **options: object) -> None:
        if self.main:
            print(*values, file=cast("None", options.get("file")), flush=True)

    def close(self) -> None: ...

    def __enter__(self) -> PlainJob:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise SettingError(
            f"job.{name} has no plain counterpart",
            remedy="shoal verify without --plain holds this script against one process under shoal",
        )
