"""The user's model and optimizer, bound to an engine: what `step`, `zero_grad`, `state_dict` mean now."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Protocol, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shoal.comm.meet import Want
from shoal.engine import optim
from shoal.engine.engine import Engine
from shoal.engine.hooks import Handle
from shoal.engine.norm import global_norm, norms
from shoal.engine.unit import Unit
from shoal.errors import OptimizerError, OrderError, SettingError
from shoal.leaves import assign
from shoal.optim import NeedsNorms
from shoal.strategy import Strategy


class Follower(Protocol):
    """What wants to know of every update."""

    @property
    def kind(self) -> str: ...

    pieces: dict[str, Tensor]

    def update(self) -> None: ...

    def follow(self, binding: Binding, wholes: Mapping[nn.Parameter, Tensor]) -> None: ...
    def restart(self) -> None: ...


class Binding:
    """One model and its optimizers under one engine.

    Args:
        engine: of the model.
        optimizers: the user's, over different parameters of the model.
        names: of every piece, its parameter.
        s: the strategy.
        prefix: of this model's names in checkpoints.
        ended: called when every optimizer has ended the leaf under way, with whether that updated the model.
    """

    def __init__(
        self, engine: Engine, optimizers: Sequence[Optimizer], names: dict[nn.Parameter, str], s: Strategy,
        ended: Callable[[Engine, bool], None], prefix: str = "",
    ) -> None:  # fmt: skip
        self.prefix = prefix
        self.engine, self.model, self.optimizers = engine, engine.model, list(optimizers)
        self.names, self.strategy, self.ended = names, s, ended
        self.holder = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        self.stepped = False
        self.norm: float | None = None  # of the gradients, when they were last clipped
        self.on_step: Callable[[Binding], None] = lambda _binding: None
        self.schedulers: list[LRScheduler] = []
        self.order = {n: i for i, (n, _) in enumerate(self.model.named_parameters())}
        self.handles: list[Handle] = []
        self.averages: list[Follower] = []
        self.group_names: list[list[list[str]]] = []  # of every optimizer, of every group
        self.look_for_schedulers = True
        self.later = False  # may updates be pending when `step()` returns?
        self._pieces: dict[int, list[list[nn.Parameter]]] = {}  # of every unit, in every group of the only optimizer
        self._zeroed: dict[Optimizer, dict[str, nn.Parameter]] = {}  # what `zero_grad` of each is about
        self._waiting = list(self.optimizers)  # those that have not stepped in this leaf
        self._steps = [o.step for o in self.optimizers]
        for optimizer in self.optimizers:
            self._bind(optimizer)
        engine.before_open = self.finish
        engine.grads_written = lambda: any(optim.writes_gradients(o) for o in self.optimizers)
        for optimizer in self.optimizers:
            if isinstance(optimizer, NeedsNorms):
                optimizer.norms = self._norms

    def _bind(self, optimizer: Optimizer) -> None:
        binding = self

        def zero_grad(optimizer: Optimizer, set_to_none: bool = True) -> None:
            binding.zero_grad(optimizer)

        optimizer.step = _Step(self, optimizer)  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.zero_grad = MethodType(zero_grad, optimizer)

    def zero_grad(self, optimizer: Optimizer) -> None:
        """What `optimizer.zero_grad()` does now."""
        if optimizer not in self._zeroed:
            names = {n for group in self.group_names[self.optimizers.index(optimizer)] for n in group}
            if len(self.optimizers) == 1:
                names |= self.order.keys()
            self._zeroed[optimizer] = {n: p for n, p in self.model.named_parameters() if n in names}
        self.engine.discard(self._zeroed[optimizer].keys())
        for param in self._zeroed[optimizer].values():
            param.grad = None

    def step(self, optimizer: Optimizer) -> None:
        """What `optimizer.step()` does now: the first one of a leaf ends it; with the step's last leaf, update."""
        engine = self.engine
        if self.look_for_schedulers and engine.own_turns > 1:
            self._find_schedulers()
        if optimizer not in self._waiting:  # it steps again, and the others have not: they leave this leaf out
            self.finish()
        if len(self._waiting) == len(self.optimizers):
            self.stepped = engine.turn >= engine.own_turns - 1
            if self.stepped:
                engine.vote()
            else:
                engine.end_leaf()
        self.on_step(self)
        if self.stepped and engine.gradients.layerwise:
            self.updater()  # hooks may have come
        if self.stepped and not engine.settled and self._by_units(optimizer):
            engine.later = self.later and not self.averages
            engine.update(self._updater(optimizer))
        elif self.stepped:
            engine.settle()
            if engine.overflow is None:
                self._steps[self.optimizers.index(optimizer)]()
        self._waiting.remove(optimizer)
        if not self._waiting:
            self.finish()

    def _by_units(self, optimizer: Optimizer) -> bool:
        """May units be updated one by one? What the groups hold besides pieces is refused by a step of all."""
        alone = len(self.optimizers) == 1 and optim.by_units(optimizer)
        return alone and all(p in self.holder for group in optimizer.param_groups for p in group["params"])

    def _updater(self, optimizer: Optimizer) -> Callable[[Sequence[Unit]], None]:
        """The optimizer's step as it is set now, on the pieces of some units."""
        step = self._steps[self.optimizers.index(optimizer)]
        settings = [_settings(group) for group in optimizer.param_groups] if self.later else None

        everything = len(self.engine.gradients.units)

        def update(units: Sequence[Unit]) -> None:
            if len(units) == everything and settings is None:
                step()
                return
            groups = optimizer.param_groups
            before = [dict(group) for group in groups]
            for i, group in enumerate(groups):
                params = [piece for unit in units for piece in self._of_unit(unit, i)]
                group.update(settings[i] if settings is not None else {}, params=params)
            optimizer.param_groups = [group for group in groups if group["params"]]
            try:
                if optimizer.param_groups:
                    step()
            finally:
                optimizer.param_groups = groups
                for group, values in zip(groups, before, strict=True):
                    group.update(values)

        return update

    def updater(self) -> Callable[[Sequence[Unit]], None]:
        """The only optimizer's step on some units, while others' gradients are not there yet."""
        optimizer = self.optimizers[0]
        if not self._by_units(optimizer):
            optim.check_layerwise(self.optimizers, self.strategy.precision)
        return self._updater(optimizer)

    def _of_unit(self, unit: Unit, group: int) -> list[nn.Parameter]:
        """The pieces of a unit in one of the optimizer's groups."""
        if unit.index not in self._pieces:
            mine = set(unit.pieces.values())
            groups = self.optimizers[0].param_groups
            self._pieces[unit.index] = [[p for p in g["params"] if p in mine] for g in groups]
        return self._pieces[unit.index][group]

    def finish(self) -> None:
        """The leaf under way is over for all optimizers, if it was for one."""
        if len(self._waiting) < len(self.optimizers):
            self._waiting = list(self.optimizers)
            if self.stepped:
                updated = self.engine.overflow is None
                self.engine.after_update()
                self.engine.mesh.world.carrier.rest()
                for average in self.averages if updated else ():
                    average.update()
            self.ended(self.engine, self.stepped)

    def clip_grad_norm(self, max_norm: float) -> float | None:
        """See `Job.clip_grad_norm`."""
        engine = self.engine
        if engine.gradients.layerwise:
            raise SettingError(
                "clip_grad_norm with layerwise=True",
                cause="units are updated while backward runs; the norm is known when all gradients are there",
                remedy="layerwise=False, or do not clip",
            )
        if engine.turn < engine.own_turns - 1:
            return None
        engine.settle()
        engine.meeting.meet(Want.CLIP, engine.steps, model=engine.number)
        if engine.overflow is not None:
            self.norm = math.inf
            return math.inf
        norm = self.norm = global_norm([u for u in engine.units if u.trainable], self.order, engine.mesh)
        scale = min(max_norm / (norm + 1e-6), 1.0)  # in this order NaN stays NaN, as in torch
        if scale != 1.0:
            engine.gradients.change(lambda part: part.mul_(scale))
        return norm

    def _norms(self, values: Mapping[Tensor, Sequence[Tensor]]) -> dict[Tensor, list[float]]:
        units = [u for u in self.engine.units if u.trainable]
        return norms(units, self.order, self.engine.mesh.shard, values)

    def state(self, piece: nn.Parameter) -> dict[str, object]:
        """What its optimizer keeps for a piece; empty if it keeps nothing."""
        holder = self.holder.get(piece)
        return cast(dict[str, object], holder.state.get(piece, {})) if holder is not None else {}

    # ---------------------------------------------------------------- schedulers

    def add_scheduler(self, scheduler: LRScheduler) -> None:
        """Let a scheduler wait for steps that act."""
        if scheduler in self.schedulers:
            return
        self.schedulers.append(scheduler)
        binding, kind = self, type(scheduler)

        def step(scheduler: LRScheduler, *args: object, **kwargs: object) -> None:
            if binding.stepped:
                kind.step(scheduler, *args, **kwargs)  # type: ignore[arg-type]

        # a class of its own rather than an attribute: state_dict() would hold an attribute
        scheduler.__class__ = type(kind.__name__, (kind,), {"step": step})

    def _find_schedulers(self) -> None:
        """Schedulers that were not given to `prepare`: they must wait too where some leaves do not act."""
        self.look_for_schedulers = False
        for optimizer in self.optimizers:
            holders = cast(list[object], gc.get_referrers(optimizer))
            dicts: list[object] = []  # a scheduler's attributes, where Python keeps them apart from it
            for holder in holders:
                if isinstance(holder, dict) and cast(dict[str, object], holder).get("optimizer") is optimizer:
                    dicts.append(cast(object, holder))
            for holder in holders + (cast(list[object], gc.get_referrers(*dicts)) if dicts else []):
                if isinstance(holder, LRScheduler) and holder.optimizer is optimizer:
                    self.add_scheduler(holder)

    # ---------------------------------------------------------------- state

    @contextmanager
    def whole(self, *, write: bool) -> Generator[None]:
        """See `Job.whole`."""
        engine = self.engine
        if engine.leaf is not None or engine.leased:
            raise OrderError(
                "job.whole in the middle of a leaf" if not engine.leased else "job.whole inside job.whole",
                remedy="call it before forward or after optimizer.step()",
            )
        engine.updates.flush()
        engine.meeting.meet(Want.WHOLE, int(write), model=engine.number)
        carrier = engine.mesh.world.carrier
        engine.presence.free_all()  # what stays between two leaves: the next one gathers it again
        for unit in engine.units:
            unit.lend()
        engine.presence.leased = True
        carrier.hold("job.whole")
        try:
            yield
            if write:
                engine.meeting.meet(Want.WHOLE, 3, model=engine.number)  # all have got what they were lent
                for unit in engine.units:
                    unit.keep_written()
        finally:
            engine.presence.leased = False
            carrier.hold("")
            for unit in engine.units:
                unit.take_back()
        engine.meeting.meet(Want.WHOLE, 2, model=engine.number)
        if write:  # what rests whole may have been written differently on each rank: shards decide
            for unit in engine.units:
                if unit.resident:
                    unit.gather()
                    unit.wait()

    def set_leaves(self, leaves: int, twig: int) -> None:
        """Another number of leaves, before the first step."""
        if (leaves, twig) != (self.strategy.leaves, self.strategy.twig):
            self.strategy = replace(self.strategy, leaves=leaves, twig=twig)
            mesh, every = self.engine.mesh, self.engine.every_leaf
            assignment = assign(leaves, mesh.copies.size, mesh.shard.size, every_leaf=every, twig=twig)
            self.engine.set_leaves(assignment, leaves, twig)

    def release(self) -> None:
        """The job is over: take the hooks off. Tensors hold theirs where the garbage collector does not look."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if any(not unit.resident for unit in self.engine.units):
            self.model.register_forward_pre_hook(_closed)

    def undo(self, states: Sequence[Mapping[str, Mapping[str, object]]] = ()) -> None:
        """Give the user whole parameters and ordinary optimizers back. Collective.

        Args:
            states: of every optimizer, by parameter, whole; none before the first step.
        """
        for handle in self.handles:
            handle.remove()
        params: dict[str, nn.Parameter] = {}
        for unit in self.engine.units:
            flat = unit.masters()
            for name, view in unit.views_of(flat).items():
                params[name] = unit.params[name]
                params[name].data, params[name].grad = view.clone(), None
        for number, (optimizer, step, groups) in enumerate(
            zip(self.optimizers, self._steps, self.group_names, strict=True)
        ):
            for names, group in zip(groups, optimizer.param_groups, strict=True):
                group["params"] = [params[n] for n in names]
            optimizer.state.clear()
            for name, state in states[number].items() if states else ():
                optimizer.state[params[name]] = {k: _beside(v, params[name]) for k, v in state.items()}
            optimizer.step = step  # pyright: ignore[reportAttributeAccessIssue]
            del optimizer.zero_grad
        for scheduler in self.schedulers:
            scheduler.__class__ = type(scheduler).__bases__[0]


def _closed(_module: nn.Module, _args: object) -> None:
    raise OrderError(
        "the job is closed, and its model's parameters have stayed in shards",
        remedy="use the model before job.close(), or job.state_dict(model)",
    )


def _settings(group: Mapping[str, object]) -> dict[str, object]:
    """Learning rate and the like, as they are now."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}


def _beside(value: object, param: nn.Parameter) -> object:
    """Where the optimizer keeps it: what is as large as the parameter, on its device."""
    return value.to(param.device) if isinstance(value, Tensor) and value.dim() else value


class _Step:
    """What `optimizer.step` is now. A scheduler looks for torch's mark on it when it is made: so we know of it."""

    def __init__(self, binding: Binding, optimizer: Optimizer) -> None:
        self.binding, self.optimizer = binding, optimizer

    @property
    def _wrapped_by_lr_sched(self) -> bool:
        self.binding.look_for_schedulers = True
        return True

    def __call__(self, closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise OptimizerError(
                "optimizer.step(closure) runs forward and backward inside the step",
                remedy="loss.backward() first, then optimizer.step()",
            )
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or a scheduler warns
        self.binding.step(self.optimizer)
