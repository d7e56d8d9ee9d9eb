"""Whole state from shards: what `job.state_dict` gives to rank 0."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.engine.binding import Binding
from shoal.engine.optim import in_blocks
from shoal.engine.unit import Unit
from shoal.engine.units import aliases


def model_state(binding: Binding, pieces: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state dict with master values on the CPU of rank 0; empty elsewhere. Collective.

    Args:
        pieces: see `whole_values`.
    """
    values = whole_values(binding, pieces)
    return {} if binding.engine.rank else named_like(binding.model, values)


def whole_values(binding: Binding, pieces: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All parameters by name, whole and on the CPU of all ranks. Collective.

    Args:
        pieces: by parameter, what to take instead of this rank's pieces; half-precision ones as float32.
    """
    values: dict[str, Tensor] = {}
    for unit in binding.engine.units:
        parts = {n: (pieces or unit.pieces)[n].detach() for n in unit.pieces}
        dtype = unit.dtypes.master
        if pieces is not None and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        values |= _views(unit, _gathered(unit, parts, dtype))
    return values


def named_like(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`values` of parameters, and the model's buffers, under all names and in the order of its state dict."""
    tied = aliases(model)
    state: dict[str, Tensor] = {}
    for prefix, module in cast(Iterable[tuple[str, nn.Module]], model.named_modules(remove_duplicate=False)):
        dot = f"{prefix}." if prefix else ""
        skipped = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            state[dot + name] = values[tied.get(dot + name, dot + name)]
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in skipped:
                state[dot + name] = buffer.detach().cpu().clone()
    return state


def optimizer_state(binding: Binding, optimizer: Optimizer) -> dict[str, object]:
    """The optimizer's state dict as torch writes it, whole, on rank 0; empty elsewhere. Collective."""
    states = whole_states(binding, optimizer)
    if binding.engine.rank:
        return {}
    group_names = binding.group_names[binding.optimizers.index(optimizer)]
    order = [n for names in group_names for n in names]
    state = {i: states[n] for i, n in enumerate(order) if n in states}
    at = 0
    groups: list[dict[str, object]] = []
    for names, group in zip(group_names, optimizer.param_groups, strict=True):
        settings: dict[str, object] = {k: v for k, v in group.items() if k != "params"}
        groups.append(settings | {"params": list(range(at, at + len(names)))})
        at += len(names)
    return {"state": state, "param_groups": groups}


def whole_states(binding: Binding, optimizer: Optimizer) -> dict[str, dict[str, object]]:
    """What an optimizer keeps for every parameter, by its name, whole and on the CPU of all ranks. Collective."""
    found: dict[str, dict[str, object]] = {}
    for unit in binding.engine.units:
        held = {n: cast(dict[str, object], optimizer.state[p]) for n, p in unit.pieces.items()
                if p in optimizer.state}  # fmt: skip
        for (key, dtype), names in sorted(_kinds(unit, held).items()):
            parts = {n: cast(Tensor, held[n][key]) for n in names if n in held}
            flat = _gathered(unit, parts, getattr(torch, dtype))
            for name, value in _views(unit, flat).items():
                if name in names:
                    found.setdefault(name, {})[key] = value
        for name, key, value in _others(unit, held, optimizer):
            found.setdefault(name, {})[key] = value
    return found


def cut_like(value: object, piece: Tensor) -> bool:
    """Is this state cut as its parameter is?"""
    return isinstance(value, Tensor) and value.shape == piece.shape and value.dim() > 0


def _kinds(unit: Unit, held: Mapping[str, dict[str, object]]) -> dict[tuple[str, str], set[str]]:
    """Which parameters have which state of their own shape, by its key and dtype. A parameter that rests has none."""
    mine: list[tuple[str, str, str]] = []
    for name, state in held.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and cut_like(value, unit.pieces[name]):
                mine.append((key, str(value.dtype).removeprefix("torch."), name))
    found: dict[tuple[str, str], set[str]] = {}
    for data in unit.shard.share_any("state", json.dumps(mine).encode()):
        for key, dtype, name in cast(list[tuple[str, str, str]], json.loads(data)):
            found.setdefault((key, dtype), set()).add(name)
    return found


def _others(
    unit: Unit, held: Mapping[str, dict[str, object]], optimizer: Optimizer
) -> list[tuple[str, str, object]]:  # fmt: skip
    """State of other shapes: numbers of blocks of all pieces in their order; step counters and the like from whoever
    holds a parameter's first element."""
    first = {p.name for p in unit.layout.pieces(unit.shard.rank) if p.start == 0}
    mine: list[list[object]] = []
    for name, state in held.items():
        for key, value in state.items():
            blocks = bool(in_blocks(value, unit.pieces[name], optimizer))
            if (blocks or name in first) and not cut_like(value, unit.pieces[name]):
                dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
                plain = cast(object, value.tolist()) if isinstance(value, Tensor) else value
                mine.append([name, key, dtype, blocks, plain])
    found: dict[tuple[str, str], object] = {}
    for data in unit.shard.share_any("state", json.dumps(mine).encode()):
        for name, key, dtype, blocks, plain in json.loads(data):
            value = torch.tensor(plain, dtype=getattr(torch, dtype)) if dtype else plain
            before = found.get((name, key))
            found[name, key] = torch.cat([before, value]) if blocks and isinstance(before, Tensor) else value
    return [(name, key, value) for (name, key), value in found.items()]


def _gathered(unit: Unit, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    flat = torch.zeros(unit.numel, dtype=dtype, device=unit.device)
    for p in unit.layout.pieces(unit.shard.rank):
        if p.name in parts:
            at = unit.mine.start + p.at
            flat[at : at + p.numel].copy_(parts[p.name].reshape(-1))
    unit.shard.gather("state", flat, unit.layout.bounds).wait()
    return flat


def _views(unit: Unit, flat: Tensor) -> dict[str, Tensor]:
    return {name: view.cpu().clone() for name, view in unit.views_of(flat).items()}
