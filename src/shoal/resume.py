"""What a job puts into a checkpoint and takes out of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from shoal import checkpoint
from shoal.checkpoint import Meta, Piece, Reader, Share
from shoal.engine.binding import Binding
from shoal.engine.units import aliases
from shoal.errors import ResumeError
from shoal.layout import Interval
from shoal.settings import Resolved


def pieces(binding: Binding) -> Iterator[Piece]:
    """What this rank writes: its shards of the units that are its copy's turn, so that all ranks write alike."""
    engine = binding.engine
    copies = engine.mesh.copies
    for unit in engine.units:
        if unit.index % copies.size == copies.rank:
            for interval in unit.layout.pieces(unit.shard.rank):
                piece = unit.pieces[interval.name]
                yield Piece(kind="param", interval=interval, tensor=piece.detach().reshape(-1))
                yield from _state(binding, interval, piece)
    if engine.rank == 0:
        for name, buffer in engine.model.named_buffers():
            yield Piece.whole("buffer", name, buffer.detach())


def _state(binding: Binding, interval: Interval, piece: Tensor) -> Iterator[Piece]:
    state = cast(Mapping[str, object], binding.optimizer.state.get(piece, {}))
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape == piece.shape and value.dim():
            yield Piece(kind=f"state:{key}", interval=interval, tensor=value.detach().reshape(-1))
        elif interval.start == 0:
            yield Piece.whole(f"extra:{key}", interval.name, value.detach())


def plain_values(binding: Binding) -> dict[str, dict[str, object]]:
    """Optimizer state of this rank that is no tensor, by parameter."""
    made: dict[str, dict[str, object]] = {}
    for piece, name in binding.names.items():
        state = cast(Mapping[str, object], binding.optimizer.state.get(piece, {}))
        plain = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        if plain:
            made[name] = plain
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a job knows besides its model and optimizer. `path`: of the checkpoint they were read from."""

    leaves: int
    seed: int
    threads: int
    precision: str
    path: Path
    positions: Sequence[Mapping[str, int]]


def save(binding: Binding, root: Path, facts: Facts, share: Share) -> Path:
    """Write `root/step-N`. Collective. Raises `SaveError` on all ranks."""
    told = share(json.dumps(plain_values(binding)).encode())
    values = {k: v for data in told for k, v in cast(dict[str, object], json.loads(data)).items()}
    engine = binding.engine
    return checkpoint.save(
        root, engine.steps, pieces(binding), _meta(binding, facts, values), rank=engine.rank, share=share
    )


def _meta(binding: Binding, facts: Facts, values: Mapping[str, object]) -> Meta:
    s, engine = binding.strategy, binding.engine
    groups = [
        {"settings": {k: v for k, v in group.items() if k != "params"}, "params": names}
        for names, group in zip(binding.group_names, binding.optimizer.param_groups, strict=True)
    ]
    return Meta(
        strategy=asdict(s) | {"shard": s.shard.name, "cut": s.cut.value, "name": s.name},
        leaves=facts.leaves,
        seed=facts.seed,
        world=engine.mesh.world.size,
        epoch=facts.positions[0]["epoch"] if facts.positions else 0,
        position={"loaders": [dict(p) for p in facts.positions]},
        groups=groups,
        schedulers=[s.state_dict() for s in binding.schedulers],
        versions={"torch": str(torch.__version__), "shoal": _version()},
        aliases=aliases(binding.model),
        extra={"threads": facts.threads, "values": values, "optimizer": type(binding.optimizer).__name__},
    )


def _version() -> str:
    from shoal import __version__

    return __version__


def load(
    binding: Binding, path: Path, here: Facts, resolved: Resolved, share: Share, rebuild: Callable[[str], Binding]
) -> Facts:  # fmt: skip
    """Take over a checkpoint of any strategy and world size. Collective.

    Args:
        path: a `step-N`, or the directory that holds several.
        here: of this job; the checkpoint's win over those that nobody asked for.
        resolved: who asked for what.
        rebuild: prepares the same model and optimizer again for another precision.

    Raises:
        ResumeError: another model or optimizer, or explicit settings that contradict; nothing has been changed then.
        DamagedError: it is not whole.
    """
    reader = Reader.together(path, rank=binding.engine.rank, share=share)
    meta = reader.manifest.meta
    positions = cast(Sequence[Mapping[str, int]], meta.position.get("loaders", ()))
    found = Facts(
        leaves=meta.leaves,
        seed=meta.seed,
        threads=cast(int, meta.extra.get("threads", 1)),
        precision=str(meta.strategy.get("precision")),
        path=reader.manifest.path,
        positions=positions,
    )
    for name in ("leaves", "seed", "threads", "precision"):
        _agree(name, getattr(found, name), getattr(here, name), resolved)
    if found.precision != here.precision:
        binding = rebuild(found.precision)
    _compare(binding, reader)
    binding.set_leaves(found.leaves)
    with torch.no_grad():
        _fill(binding, reader)
    return found


def _agree(name: str, saved: object, here: object, resolved: Resolved) -> None:
    """Leaves, seed, threads and precision are part of the numbers."""
    if saved != here and resolved.explicit(name):
        raise ResumeError(
            f"the checkpoint was made with {name}={saved}, this job has {name}={here} ({resolved.origins[name]})",
            cause="leaves, seed, threads and precision are part of the numbers",
            remedy=f"{name}={saved}, or leave {name} out",
        )


def _fill(binding: Binding, reader: Reader) -> None:
    facts = reader.manifest.meta
    engine, optimizer = binding.engine, binding.optimizer
    for unit in engine.units:
        wants = [(p, unit.pieces[p.name].detach().view(-1)) for p in unit.layout.pieces(unit.shard.rank)]
        reader.read_into("param", wants)
        for interval, _ in wants:
            _load_state(binding, reader, interval, unit.pieces[interval.name])
        unit.after_load()
    for name, buffer in engine.model.named_buffers():
        buffer.copy_(reader.buffer(name))
    for group, saved in zip(optimizer.param_groups, facts.groups, strict=True):
        group.update(cast(Mapping[str, object], saved["settings"]))
    for scheduler, saved in zip(binding.schedulers, facts.schedulers, strict=False):
        scheduler.load_state_dict(dict(saved))
    engine.steps = reader.manifest.step


def _compare(binding: Binding, reader: Reader) -> None:
    model, facts = binding.model, reader.manifest.meta
    reader.compare({n: tuple(p.shape) for n, p in model.named_parameters()})
    reader.compare({n: tuple(b.shape) for n, b in model.named_buffers()}, "buffer")
    saved = [cast(Sequence[str], g["params"]) for g in facts.groups]
    if [list(names) for names in saved] != binding.group_names:
        raise ResumeError(
            f"the optimizer has groups of {[len(n) for n in binding.group_names]} parameters, the checkpoint "
            f"{[len(n) for n in saved]} or others",
            remedy="make the optimizer's groups as they were when the checkpoint was saved",
        )
    wanted, name = type(binding.optimizer).__name__, facts.extra.get("optimizer")
    if wanted != name:
        raise ResumeError(f"the checkpoint was saved with {name}, this job has {wanted}", remedy=f"use {name}")


def _load_state(binding: Binding, reader: Reader, interval: Interval, piece: Tensor) -> None:
    name = interval.name
    state: dict[str, object] = {}
    for kind in reader.state_kinds(name):
        part = torch.empty(interval.numel, dtype=reader.dtype(kind, name), device=piece.device)
        reader.read_into(kind, [(interval, part)])
        state[kind.removeprefix("state:")] = part.view(piece.shape)
    for kind in reader.extra_kinds(name):
        value = reader.extra(kind, name)
        assert value is not None
        state[kind.removeprefix("extra:")] = value
    values = cast(Mapping[str, Mapping[str, object]], reader.manifest.meta.extra.get("values", {}))
    state.update(values.get(name, {}))
    if state:
        binding.optimizer.state[piece] = state
    else:
        binding.optimizer.state.pop(piece, None)
