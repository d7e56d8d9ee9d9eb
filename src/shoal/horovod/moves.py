"""Horovod's collectives that move things as they are: allgather and broadcast, of tensors and of objects."""

from __future__ import annotations

import json
from typing import cast

from torch import Tensor

from shoal.comm.group import Done
from shoal.dropin.mean import spread
from shoal.errors import OrderError, SettingError
from shoal.horovod.handles import Handle, into, synchronize, when
from shoal.horovod.session import Session, Words, check_process_set, nobody_joined, session


def allgather_async(tensor: Tensor, name: str | None = None, process_set: object = None) -> Handle:
    """Start to bring all ranks' tensors together along the first dimension, whose sizes may differ.

    Raises:
        DivergedError: other dimensions or dtypes differ.
        OrderError: a rank has joined.
    """
    here = session()
    check_process_set(process_set)
    mine = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    words: Words = {
        "op": "allgather", "name": here.name(name, "allgather"), "shape": list(mine.shape[1:]),
        "dtype": str(mine.dtype), "rows": mine.shape[0],
    }  # fmt: skip
    told = here.tell(words, differs="rows")
    nobody_joined(told, "allgather")
    rows = [cast(int, w["rows"]) for w in told]
    width = mine[:0].new_empty((1, *mine.shape[1:])).numel()
    bounds = [sum(rows[:r]) * width for r in range(len(rows) + 1)]
    every = mine.new_empty(bounds[-1])
    every[bounds[here.group.rank] : bounds[here.group.rank + 1]] = mine.reshape(-1)
    flow = when(here.group.gather("hvd", every, bounds), every)
    return Handle(flow, lambda flat: flat.view(-1, *mine.shape[1:]))


def allgather(tensor: Tensor, name: str | None = None, process_set: object = None) -> Tensor:
    """All ranks' tensors together, in the order of ranks. See `allgather_async`."""
    return synchronize(allgather_async(tensor, name, process_set))


def allgather_object(obj: object, name: str | None = None) -> list[object]:
    """Everybody's object, in the order of ranks. What JSON knows; see `broadcast_object`."""
    here = session()
    told = here.tell(
        {"op": "allgather_object", "name": here.name(name, "object"), "value": _json(obj)}, differs="value"
    )
    nobody_joined(told, "allgather_object")
    return [json.loads(cast(str, w["value"])) for w in told]


# ---------------------------------------------------------------- broadcast


def broadcast_async(tensor: Tensor, root_rank: int, name: str | None = None, process_set: object = None) -> Handle:
    """Start to send one rank's tensor to all; shape and dtype are the same on all of them.

    Raises:
        OrderError: there is no such rank, or a rank has joined.
    """
    here = session()
    check_process_set(process_set)
    _check_root(here, root_rank)
    words: Words = {
        "op": "broadcast", "name": here.name(name, "broadcast"), "shape": list(tensor.shape),
        "dtype": str(tensor.dtype), "root_rank": root_rank,
    }  # fmt: skip
    nobody_joined(here.tell(words), "broadcast")
    flat = tensor.detach().reshape(-1).clone()
    spread(here.group, flat, root_rank)
    return Handle(when(Done(), flat), lambda flat: flat.view(tensor.shape))


def broadcast(tensor: Tensor, root_rank: int, name: str | None = None, process_set: object = None) -> Tensor:
    """One rank's tensor, in a new one. See `broadcast_async`."""
    return synchronize(broadcast_async(tensor, root_rank, name, process_set))


def broadcast_async_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: object = None) -> Handle:
    """`broadcast_async` in place."""
    return into(tensor, broadcast_async(tensor, root_rank, name, process_set))


def broadcast_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: object = None) -> Tensor:
    """`broadcast` in place."""
    return synchronize(broadcast_async_(tensor, root_rank, name, process_set))


def broadcast_object(obj: object, root_rank: int = 0, name: str | None = None) -> object:
    """One rank's object on all ranks. It travels as JSON, never as code: None, numbers, strings, lists, dicts.

    Raises:
        SettingError: something else.
    """
    here = session()
    _check_root(here, root_rank)
    value = _json(obj) if here.group.rank == root_rank else ""
    words: Words = {"op": "broadcast_object", "name": here.name(name, "object"), "root_rank": root_rank, "value": value}
    told = here.tell(words, differs="value")
    nobody_joined(told, "broadcast_object")
    return json.loads(cast(str, told[root_rank]["value"]))


def _json(obj: object) -> str:
    try:
        return json.dumps(obj)
    except (TypeError, ValueError):
        raise SettingError(
            f"a {type(obj).__name__} is sent between ranks, which are sent no code",
            remedy="hvd.broadcast or hvd.allgather for tensors; numbers, strings, lists and dicts of them as objects",
        ) from None


def _check_root(here: Session, root_rank: int) -> None:
    if not 0 <= root_rank < here.group.size:
        raise OrderError(
            f"root_rank={root_rank} in a world of {here.group.size}", remedy="a rank of it, such as root_rank=0"
        )
