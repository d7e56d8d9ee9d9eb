"""What a job puts into a checkpoint and takes out of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from shoal import __version__, checkpoint
from shoal.checkpoint import Meta, Piece, Reader, Share
from shoal.engine.binding import Binding, Follower
from shoal.engine.optim import in_blocks
from shoal.engine.units import aliases
from shoal.errors import ResumeError
from shoal.layout import Box, Interval
from shoal.settings import Resolved
from shoal.tracked import Taken, Tracked

Bindings = Sequence[Binding]
"""All models of a job. What belongs to one is saved under its prefix: none for a model without a name."""


def pieces(bindings: Bindings) -> Iterator[Piece]:
    """What this rank writes: its shards of the units that are its copy's turn, so that all ranks write alike."""
    for binding in bindings:
        engine, prefix = binding.engine, binding.prefix
        copies = engine.mesh.copies
        for unit in engine.units:
            if unit.index % copies.size == copies.rank:
                for interval in unit.layout.pieces(unit.shard.rank):
                    piece = unit.pieces[interval.name]
                    place = replace(interval, name=prefix + interval.name)
                    yield Piece(kind="param", interval=place, tensor=piece.detach().reshape(-1))
                    yield from _state(binding, place, piece)
                    for average in binding.averages:
                        averaged = average.pieces[interval.name].reshape(-1)
                        yield Piece(kind=average.kind, interval=place, tensor=averaged)
        if engine.rank == 0:
            for name, buffer in engine.model.named_buffers():
                yield Piece.whole("buffer", prefix + name, buffer.detach())


def _state(binding: Binding, interval: Interval, piece: nn.Parameter) -> Iterator[Piece]:
    for key, value in binding.state(piece).items():
        if not isinstance(value, Tensor):
            continue
        if value.shape == piece.shape and value.dim():
            yield Piece(kind=f"state:{key}", interval=interval, tensor=value.detach().reshape(-1))
        elif granule := in_blocks(value, piece, binding.holder[piece]):
            yield Piece(kind=f"state:{key}", interval=_blocks(interval, granule), tensor=value.detach())
        elif interval.start == 0:
            yield Piece.whole(f"extra:{key}", interval.name, value.detach())


def _blocks(interval: Interval, granule: int) -> Interval:
    """The same part of a state that has one number for every `granule` elements."""
    count = -(-interval.box.numel // granule)
    start, stop = interval.start // granule, -(-interval.stop // granule)
    return replace(interval, shape=(count,), box=Box.whole((count,)), start=start, stop=stop)


def plain_values(bindings: Bindings) -> dict[str, dict[str, object]]:
    """Optimizer state of this rank that is no tensor, by parameter."""
    made: dict[str, dict[str, object]] = {}
    for binding in bindings:
        for piece, name in binding.names.items():
            plain = {k: v for k, v in binding.state(piece).items() if not isinstance(v, Tensor)}
            if plain:
                made[binding.prefix + name] = plain
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a job knows besides its model and optimizer. `path`: of the checkpoint they were read from."""

    leaves: int
    twig: int
    seed: int
    threads: int
    precision: str
    masters: bool
    path: Path
    positions: Sequence[Mapping[str, int]]
    tracked: Tracked


def save(bindings: Bindings, root: Path, facts: Facts, share: Share) -> Path:
    """Write `root/step-N`. Collective. Raises `SaveError` on all ranks."""
    told = share(json.dumps(plain_values(bindings)).encode())
    values = {k: v for data in told for k, v in cast(dict[str, object], json.loads(data)).items()}
    steps, rank = max(b.engine.steps for b in bindings), bindings[0].engine.rank
    taken = facts.tracked.take(share)
    meta = _meta(bindings, facts, values, taken)
    return checkpoint.save(root, steps, chain(pieces(bindings), taken.pieces(rank)), meta, rank=rank, share=share)


def _meta(bindings: Bindings, facts: Facts, values: Mapping[str, object], taken: Taken) -> Meta:
    s = bindings[0].strategy
    groups = [
        {"settings": {k: v for k, v in group.items() if k != "params"}, "params": names}
        for names, group in _groups(bindings)
    ]
    return Meta(
        strategy=asdict(s) | {"shard": s.shard.name, "cut": s.cut.value, "name": s.name},
        leaves=facts.leaves,
        seed=facts.seed,
        world=bindings[0].engine.mesh.world.size,
        epoch=facts.positions[0]["epoch"] if facts.positions else 0,
        position={"loaders": [dict(p) for p in facts.positions]},
        groups=groups,
        schedulers=[s.state_dict() for b in bindings for s in b.schedulers],
        versions={"torch": str(torch.__version__), "shoal": __version__},
        aliases={b.prefix + a: b.prefix + n for b in bindings for a, n in aliases(b.model).items()},
        extra={
            "threads": facts.threads, "values": values, "tracked": taken.plain, "optimizers": _optimizers(bindings),
            "steps": {b.prefix: b.engine.steps for b in bindings}, "orders": _orders(bindings),
            "transient": [b.prefix + n for b in bindings for n in _transient(b.model)],
            "scales": {b.prefix: b.engine.scale.state() for b in bindings if b.engine.scale is not None},
        },
    )  # fmt: skip


def _transient(model: nn.Module) -> list[str]:
    """Buffers that are not part of the model's state dict."""
    modules = cast(Iterable[tuple[str, nn.Module]], model.named_modules())
    skipped = ((m, sorted(module._non_persistent_buffers_set)) for m, module in modules)  # pyright: ignore[reportPrivateUsage]
    return [f"{module}.{name}" if module else name for module, names in skipped for name in names]


def _groups(bindings: Bindings) -> list[tuple[list[str], dict[str, object]]]:
    """Every group of every optimizer, with the names of its parameters."""
    return [
        ([binding.prefix + n for n in names], cast(dict[str, object], group))
        for binding in bindings
        for optimizer, groups in zip(binding.optimizers, binding.group_names, strict=True)
        for names, group in zip(groups, optimizer.param_groups, strict=True)
    ]


def _orders(bindings: Bindings) -> dict[str, list[int]]:
    """How parameters lie that do not lie row by row; their pieces and state are saved as they lie."""
    return {b.prefix + n: list(o) for b in bindings for u in b.engine.units for n, o in u.orders.items()}


def _optimizers(bindings: Bindings) -> list[str]:
    return [type(o).__name__ for b in bindings for o in b.optimizers]


def load(
    bindings: Bindings, path: Path, here: Facts, resolved: Resolved, share: Share,
    rebuild: Callable[[str, bool], Bindings],
) -> Facts:  # fmt: skip
    """Take over a checkpoint of any strategy and world size. Collective.

    Args:
        path: a `step-N`, or the directory that holds several.
        here: of this job; the checkpoint's win over those that nobody asked for.
        resolved: who asked for what.
        rebuild: prepares the same models and optimizers again for another precision.

    Raises:
        ResumeError: another model or optimizer, or explicit settings that contradict; nothing has been changed then.
        DamagedError: it is not whole.
    """
    reader = Reader.together(path, rank=bindings[0].engine.rank, share=share)
    meta = reader.manifest.meta
    positions = cast(Sequence[Mapping[str, int]], meta.position.get("loaders", ()))
    found = Facts(
        leaves=meta.leaves,
        seed=meta.seed,
        threads=cast(int, meta.extra.get("threads", 1)),
        precision=str(meta.strategy.get("precision")),
        twig=cast(int, meta.strategy.get("twig", 1)),
        masters=cast(bool, meta.strategy.get("masters", True)),
        path=reader.manifest.path,
        positions=positions,
        tracked=here.tracked,
    )
    for name in ("leaves", "twig", "seed", "threads", "precision", "masters"):
        _agree(name, getattr(found, name), getattr(here, name), resolved)
    if (found.precision, found.masters) != (here.precision, here.masters):
        bindings = rebuild(found.precision, found.masters)
    _compare(bindings, reader)
    with torch.no_grad():
        for binding in bindings:
            binding.set_leaves(found.leaves, found.twig)
            _fill(binding, reader)
    facts = reader.manifest.meta
    for (_, group), saved in zip(_groups(bindings), facts.groups, strict=True):
        group.update(cast(Mapping[str, object], saved["settings"]))
    schedulers = [s for b in bindings for s in b.schedulers]
    for scheduler, saved in zip(schedulers, facts.schedulers, strict=False):
        scheduler.load_state_dict(dict(saved))
    here.tracked.restore(cast("Mapping[str, object]", facts.extra.get("tracked", {})), reader)
    return found


def _agree(name: str, saved: object, here: object, resolved: Resolved) -> None:
    """Leaves, twig, seed, threads and precision are part of the numbers."""
    if saved != here and resolved.explicit(name):
        raise ResumeError(
            f"the checkpoint was made with {name}={saved}, this job has {name}={here} ({resolved.origins[name]})",
            cause="leaves, seed, threads and precision are part of the numbers",
            remedy=f"{name}={saved}, or leave {name} out",
        )


def _fill(binding: Binding, reader: Reader) -> None:
    engine, prefix = binding.engine, binding.prefix
    for unit in engine.units:
        places = [(p, unit.pieces[p.name]) for p in unit.layout.pieces(unit.shard.rank)]
        wants = [(replace(p, name=prefix + p.name), piece) for p, piece in places]
        reader.read_into("param", [(p, piece.detach().view(-1)) for p, piece in wants])
        for interval, piece in wants:
            _load_state(binding, reader, interval, piece)
        unit.after_load()
    for average in binding.averages:
        _load_average(binding, average, reader)
    for name, buffer in engine.model.named_buffers():
        buffer.copy_(reader.buffer(prefix + name))
    steps = cast(Mapping[str, int], reader.manifest.meta.extra.get("steps", {}))
    engine.steps = steps.get(prefix, reader.manifest.step)
    scales = cast(Mapping[str, dict[str, float | int]], reader.manifest.meta.extra.get("scales", {}))
    if engine.scale is not None and prefix in scales:
        engine.scale.load(scales[prefix])


def _load_average(binding: Binding, average: Follower, reader: Reader) -> None:
    """A checkpoint that has none: it begins with the checkpoint's weights."""
    if not reader.shapes(average.kind):
        average.restart()
        return
    for unit in binding.engine.units:
        wants = [
            (replace(p, name=binding.prefix + p.name), average.pieces[p.name].view(-1))
            for p in unit.layout.pieces(unit.shard.rank)
        ]
        reader.read_into(average.kind, wants)


def _compare(bindings: Bindings, reader: Reader) -> None:
    facts = reader.manifest.meta
    reader.compare({b.prefix + n: tuple(p.shape) for b in bindings for n, p in b.model.named_parameters()})
    buffers = {b.prefix + n: tuple(v.shape) for b in bindings for n, v in b.model.named_buffers()}
    reader.compare(buffers, "buffer")
    wanted, there = _optimizers(bindings), facts.extra.get("optimizers")
    if wanted != there:
        raise ResumeError(
            f"the checkpoint was saved with {_listed(there)}, this job has {_listed(wanted)}",
            remedy=f"use {_listed(there)}",
        )
    orders, lay = _orders(bindings), cast(Mapping[str, object], facts.extra.get("orders", {}))
    for name in [*orders, *lay]:
        if orders.get(name) != lay.get(name):
            raise ResumeError(
                f"'{name}' lies in another order of dimensions in the checkpoint ({lay.get(name, 'row by row')}) than "
                f"here ({orders.get(name, 'row by row')})",
                cause="a model in channels_last, or transposed weights",
                remedy="model.to(memory_format=torch.channels_last) before prepare, as when it was saved",
            )
    saved = [list(cast(Sequence[str], g["params"])) for g in facts.groups]
    here = [names for names, _ in _groups(bindings)]
    if saved != here:
        raise ResumeError(
            f"the optimizer has groups of {[len(n) for n in here]} parameters, the checkpoint "
            f"{[len(n) for n in saved]} or others",
            remedy="make the optimizer's groups as they were when the checkpoint was saved",
        )


def _listed(names: object) -> str:
    return " and ".join(map(str, cast(Sequence[object], names))) if isinstance(names, list) else str(names)


def _load_state(binding: Binding, reader: Reader, interval: Interval, piece: nn.Parameter) -> None:
    holder = binding.holder.get(piece)
    if holder is None:
        return
    name = interval.name
    state: dict[str, object] = {}
    for kind in (k for k in reader.state_kinds(name) if not k.startswith("state:average-")):
        alike = reader.shapes(kind)[name] == interval.shape
        place = interval if alike else _blocks(interval, cast(int, getattr(holder, "granule", 1)))
        part = torch.empty(place.numel, dtype=reader.dtype(kind, name), device=piece.device)
        reader.read_into(kind, [(place, part)])
        state[kind.removeprefix("state:")] = part.view(piece.shape) if alike else part
    for kind in reader.extra_kinds(name):
        value = reader.extra(kind, name)
        assert value is not None
        state[kind.removeprefix("extra:")] = value
    values = cast(Mapping[str, Mapping[str, object]], reader.manifest.meta.extra.get("values", {}))
    state.update(values.get(name, {}))
    if state:
        holder.state[piece] = state
    else:
        holder.state.pop(piece, None)
