"""From a user's model and optimizer to an engine: checks, comparison with the other ranks, units, hooks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.comm.group import Group
from shoal.comm.meet import Meeting, Want
from shoal.comm.mesh import Mesh
from shoal.comm.meter import Meter
from shoal.engine import optim
from shoal.engine.binding import Binding
from shoal.engine.budget import Budget
from shoal.engine.cells import local
from shoal.engine.compiling import check_uncompiled, compile_blocks
from shoal.engine.engine import Engine
from shoal.engine.fast import axes_of
from shoal.engine.fill import Fill, Filler
from shoal.engine.guards import Uncopied, bring_up_to_date, guard_model, guard_optimizer
from shoal.engine.habits import Names
from shoal.engine.hooks import install
from shoal.engine.precision import compute_dtype, keepers, kept
from shoal.engine.scale import LossScale
from shoal.engine.unit import Part, Unit
from shoal.engine.units import choose, parts, wish
from shoal.errors import DivergedError, ModelError
from shoal.leaves import assign
from shoal.rules import Rules, every_leaf
from shoal.strategy import Shard, Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """How to prepare. `strategy` is settled; `facts` must be equal on all ranks.

    `number`: of the model in its job; `first`: the number of its first unit; `prefix`: of its names in checkpoints.
    """

    strategy: Strategy
    rules: Rules
    mesh: Mesh
    meeting: Meeting
    overlap: bool
    pending: bool
    units: Sequence[str] | int | None
    elementwise: bool | None
    float32: Sequence[str]
    fill: Fill | None
    compile: bool | Mapping[str, object]
    device: torch.device
    facts: Mapping[str, object]
    say: Callable[[str], None]
    ended: Callable[[Engine, bool], None]
    budget: Budget
    number: int = 0
    first: int = 0
    prefix: str = ""
    layerwise: bool = False


def build(model: nn.Module, optimizers: Sequence[Optimizer], w: Wanted) -> Binding:
    """Change the user's model and optimizers in place. Collective.

    Raises:
        ModelError, OptimizerError: what cannot be trained as it is.
        DivergedError: ranks prepare different things.
    """
    if not isinstance(w.mesh.world.carrier, Meter):
        check_model(model, w.mesh.world.size, w.device)
    optim.check(optimizers, model)
    if w.layerwise:
        optim.check_layerwise(optimizers, w.strategy.precision)
    granules = optim.granules(optimizers, model, w.elementwise)
    named, size = wish(w.units)
    blocks = choose(model, named)
    keep = keepers(model, w.float32)
    cut = parts(model, blocks, w.strategy, w.mesh.shard.size, granules, keep, size=size)
    compare(describe(model, optimizers, cut, w), w.meeting)
    same_start(model, w.mesh.data, w.say)
    group_names = [optim.group_names(optimizer, model) for optimizer in optimizers]
    resident = w.strategy.shard < Shard.PARAMETERS
    alone = w.mesh.data.size == 1
    idle = alone and not w.layerwise and w.budget.limit is None  # without a plan: nobody waits, nothing is kept
    units = [
        Unit(w.first + i, part, w.mesh.shard, resident=resident, alone=alone)
        for i, part in _filled(model, optimizers, cut, w)
    ]
    names: dict[nn.Parameter, str] = {}
    for optimizer in optimizers:
        names |= optim.point_to_pieces(optimizer, units)
    s = w.strategy
    assert s.leaves is not None
    axes = axes_of(w.mesh, w.device) if s.numerics == "fast" else None
    engine = Engine(
        model, units, w.mesh, w.meeting, w.rules, leaves_of(s, w.mesh, w.rules), s.leaves, twig=s.twig,
        overlap=w.overlap and not idle, number=w.number, axes=axes, layerwise=w.layerwise,
        scale=LossScale() if s.precision == "float16" else None,
    )  # fmt: skip
    engine.say = w.say
    engine.gradients.journeys.gated = w.pending and not alone
    engine.budgeted, engine.room = w.budget.limit is not None, partial(w.budget.room, w.number)
    handles = install(engine, compute_dtype(s), kept(model, w.float32))
    binding = Binding(engine, optimizers, names, s, w.ended, w.prefix)
    binding.group_names = group_names
    binding.later = w.pending and not alone
    if w.layerwise:
        engine.updater = binding.updater
    if w.mesh.shard.size > 1:
        handles += [handle for optimizer in optimizers for handle in guard_optimizer(optimizer)]
    handles += guard_model(engine)
    if w.pending:
        handles += bring_up_to_date(engine, optimizers)
    if w.compile is not False:
        options = dict[str, object]() if w.compile is True else w.compile
        handles += compile_blocks(units, options, w.mesh.world.carrier)
    binding.handles += [*handles, Uncopied(engine, handles), Names(model)]
    return binding


def _filled(
    model: nn.Module, optimizers: Sequence[Optimizer], cut: Sequence[Part], w: Wanted
) -> Iterator[tuple[int, Part]]:  # fmt: skip
    """The units' parts, numbered. Those of a meta model get their values one block at a time."""
    filler: Filler | None = None
    meta = any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    if meta and not isinstance(w.mesh.world.carrier, Meter):
        filler = Filler(model, optimizers, w.device, cast(int, w.facts["seed"]), w.fill)
    at = 0
    for _, group in groupby(cut, key=lambda part: part.group):
        parts = list(group)
        for part in filler.block(parts) if filler is not None else parts:
            yield at, part
            at += 1
    if filler is not None:
        filler.rest()


def leaves_of(s: Strategy, mesh: Mesh, rules: Rules) -> tuple[tuple[int, ...], ...]:
    """Who computes which leaf."""
    assert s.leaves is not None
    return assign(s.leaves, mesh.copies.size, mesh.shard.size, every_leaf=every_leaf(rules), twig=s.twig)


def check_model(model: nn.Module, world: int, device: torch.device) -> None:
    """Raises `ModelError` for what shoal cannot spread over ranks. Meta parameters will be on `device`."""
    one_device({n: str(device if p.is_meta else p.device) for n, p in model.named_parameters()}, world)
    check_uncompiled(model)
    modules = dict(cast(Iterable[tuple[str, nn.Module]], model.named_modules()))
    for name, module in modules.items():
        if isinstance(module, nn.SyncBatchNorm):
            raise ModelError(
                f"'{name}' is a SyncBatchNorm, which mixes samples of several ranks",
                cause="a leaf is the batch: its statistics may not depend on how many ranks there are",
                remedy="torch.nn.BatchNorm2d (or GroupNorm)",
            )
    if not any(True for _ in model.parameters()):
        raise ModelError("the model has no parameters", remedy="prepare the module that holds them")
    sparse = [n for n, m in modules.items() if getattr(m, "sparse", False) is True]
    if sparse:
        raise ModelError(f"'{sparse[0]}' makes sparse gradients", remedy="sparse=False")


def one_device(devices: Mapping[str, str], world: int) -> None:
    """A pure check over device names.

    Args:
        devices: of every parameter, by its name.
        world: number of ranks.
    """
    kinds: dict[str, str] = {}
    for name, device in devices.items():
        kinds.setdefault(device, name)
    if len(kinds) > 1:
        first = ", ".join(f"'{n}' on {d}" for d, n in list(kinds.items())[:3])
        raise ModelError(
            f"the model lies on {len(kinds)} devices: {first}",
            cause="a model that is cut over devices by hand is a pipeline of one process",
            remedy="model.to(job.device); if it is too large for one: zero3, or torch.distributed.pipelining",
        )
    device = next(iter(kinds), "cpu")
    if device.startswith("meta"):
        raise ModelError("the model's parameters are on the meta device", remedy="give them values before prepare")
    if world > 1 and not device.startswith("cpu"):
        raise ModelError(
            f"the model is on {device}, and ranks exchange through host memory only",
            remedy="model.to('cpu'), or a world of one",
        )


def describe(model: nn.Module, optimizers: Sequence[Optimizer], cut: Sequence[Part], w: Wanted) -> dict[str, str]:
    """What must be equal on all ranks before anything travels, by a name to show."""
    found = {f"setting {k}": str(v) for k, v in w.facts.items()}
    found |= {f"strategy {k}": str(v) for k, v in asdict(w.strategy).items()}
    for name, p in model.named_parameters():
        trained = "" if p.requires_grad else ", frozen"
        found[f"parameter '{name}'"] = f"{tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}{trained}"
    for name, b in model.named_buffers():
        found[f"buffer '{name}'"] = f"{tuple(b.shape)} {str(b.dtype).removeprefix('torch.')}"
    for part in cut:
        unit = f"unit '{part.name}' {part.dtypes.compute} {part.trainable}"
        orders = f" {dict(part.orders)}" if part.orders else ""
        found[unit] = f"{list(part.params)} {part.layout.bounds}{orders}"
    for n, optimizer in enumerate(optimizers):
        which = "optimizer" if len(optimizers) == 1 else f"optimizer {n}"
        found[which] = type(optimizer).__name__
        for i, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key != "params" and isinstance(value, (int, float, str, bool, tuple, type(None))):
                    found[f"{which} group {i} {key}"] = str(value)  # pyright: ignore[reportUnknownArgumentType]
    return found


def compare(mine: Mapping[str, str], meeting: Meeting) -> None:
    """Raises `DivergedError` naming the first thing in which ranks differ. Collective."""
    text = json.dumps(mine).encode()
    digests = meeting.meet(Want.PREPARE, 0, hashlib.sha256(text).digest())
    if len(set(digests)) == 1:
        return
    told = [cast(dict[str, str], json.loads(b)) for b in meeting.world.share_any("describe", text)]
    for rank, other in enumerate(told):
        for key in [*told[0], *other]:
            a, b = told[0].get(key, "nothing"), other.get(key, "nothing")
            if a != b:
                raise DivergedError(
                    f"ranks prepare different things: {key} is {a} on rank 0 and {b} on rank {rank}",
                    cause="the ranks run different programs, settings or versions, "
                    "or made a model under `if job.rank == 0`",
                    remedy="start the same program with the same settings on all ranks",
                )


def same_start(model: nn.Module, data: Group, say: Callable[[str], None]) -> None:
    """All cells start from the first one's values. Collective."""
    if data.size == 1 or isinstance(data.carrier, Meter):
        return
    tensors = [(n, t) for n, t in [*model.named_parameters(), *model.named_buffers()] if not t.is_meta]
    mine = hashlib.sha256()
    for _, tensor in tensors:
        mine.update(_bytes(tensor).numpy().tobytes())
    digests = data.share("start", mine.digest())
    if len(set(digests)) == 1:
        return
    others = [str(r) for r, d in zip(data.ranks, digests, strict=True) if d != digests[0]]
    say(f"initial values of rank {', '.join(others)} differ from rank 0's: taking rank 0's (make the model after init)")
    with torch.no_grad():
        for _, tensor in tensors:
            raw = _bytes(tensor)
            data.gather("start", raw, [0] + [raw.numel()] * data.size).wait()
            local(tensor).copy_(raw.view(tensor.dtype).view(local(tensor).shape))


def _bytes(tensor: Tensor) -> Tensor:
    return local(tensor).detach().cpu().contiguous().clone().reshape(-1).view(torch.uint8)


def plan_line(binding: Binding, world: int) -> str:
    """One line of what was made of the user's words, with the dtype of every state."""
    units, s = binding.engine.units, binding.strategy
    total = sum(u.layout.used for u in units)
    trained = sum(u.layout.used for u in units if u.trainable)

    def kinds(pick: Callable[[Unit], torch.dtype]) -> str:
        return "/".join(sorted({str(pick(u)).removeprefix("torch.") for u in units}))

    per_copy = s.ranks_per_copy if isinstance(s.ranks_per_copy, int) else 1
    return (
        f"{s.name}, {_ranks(world, per_copy)}, {s.leaves} leaves a step; "
        f"{len(units)} units, {total:,} parameters ({trained:,} trained); "
        f"parameters {kinds(lambda u: u.dtypes.compute)}, "
        f"masters and optimizer state {kinds(lambda u: u.dtypes.master)}, "
        f"gradients {kinds(lambda u: u.dtypes.reduce)}; cut {s.cut.value}, "
        f"numerics {_numerics(binding)}{_levels(binding)}{_rounds(binding)}"
    )


def _ranks(world: int, per_copy: int) -> str:
    if world == 1:
        return "1 rank"
    if per_copy == 1:
        return f"{world} ranks with a copy of the state each"
    return f"{world} ranks, {'one copy' if per_copy == world else f'{world // per_copy} copies'} of the state in all"


def _levels(binding: Binding) -> str:
    mesh = binding.engine.mesh
    two = mesh.shard.hosts.two_levels or mesh.copies.hosts.two_levels
    return f"; exchange in two levels, {mesh.world.hosts}" if two else ""


def _rounds(binding: Binding) -> str:
    return "; gradients in one round, as they are small" if binding.engine.gradients.at_once else ""


def _numerics(binding: Binding) -> str:
    if binding.strategy.numerics == "fast" and binding.engine.gradients.fast is None:
        return "fast (exact here: nothing adds up faster)"
    return binding.strategy.numerics
