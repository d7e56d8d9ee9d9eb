"""An optimizer's state on its way to one rank: as JSON and raw bytes, never as code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from shoal.comm.group import Group
from shoal.errors import OptimizerError

State = dict[int, dict[str, object]]
"""By the number of the parameter."""


def collect(group: Group, mine: State, to: int) -> State:
    """All ranks' states on rank `to`, tensors on the CPU; nothing elsewhere. Collective.

    Raises:
        OptimizerError: state that is neither a tensor nor numbers, a string, a bool or None.
    """
    head, data = packed(mine)
    heads = [cast("list[list[object]]", json.loads(h)) for h in group.share_any("state", json.dumps(head).encode())]
    sizes = [int(n) for n in (h.decode() for h in group.share_any("state", str(data.numel()).encode()))]
    boxes = [torch.empty(n if group.rank == to and r != to else 0, dtype=torch.uint8) for r, n in enumerate(sizes)]
    sends = [[[data]] if r == to else [] for r in range(group.size)]
    receives = [[[box]] if group.rank == to else [] for box in boxes]
    group.swap("state", sends, receives).wait()
    if group.rank != to:
        return {}
    found: State = {}
    for rank, entries in enumerate(heads):
        found |= unpacked(entries, data if rank == to else boxes[rank])
    return dict(sorted(found.items()))


def packed(state: Mapping[int, Mapping[str, object]]) -> tuple[list[list[object]], Tensor]:
    """[number, key, dtype, shape] for every tensor, [number, key, value] for the rest; and the tensors' bytes."""
    head: list[list[object]] = []
    parts = [torch.empty(0, dtype=torch.uint8)]
    for number, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                head.append([number, key, str(value.dtype).removeprefix("torch."), list(value.shape)])
                parts.append(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
            elif value is None or isinstance(value, (bool, int, float, str)):
                head.append([number, key, value])
            elif isinstance(value, (list, tuple)) and all(
                isinstance(v, (bool, int, float)) for v in _each(cast(object, value))
            ):
                head.append([number, key, _each(cast(object, value))])
            else:
                raise OptimizerError(
                    f"state '{key}' is a {type(cast(object, value)).__name__}, which cannot be sent",
                    remedy="tensors, numbers, strings and None in the optimizer's state",
                )
    return head, torch.cat(parts)


def _each(values: object) -> list[object]:
    return list(cast("list[object]", values))


def unpacked(head: list[list[object]], data: Tensor) -> State:
    """What `packed` has packed."""
    found: State = {}
    at = 0
    for number, key, *rest in head:
        value: object = rest[0]
        if len(rest) == 2:
            dtype = cast(torch.dtype, getattr(torch, cast(str, rest[0])))
            shape = cast(list[int], rest[1])
            stop = at + dtype.itemsize * torch.Size(shape).numel()
            value, at = data[at:stop].clone().view(dtype).view(shape), stop
        found.setdefault(cast(int, number), {})[cast(str, key)] = value
    return found
