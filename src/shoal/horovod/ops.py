"""Horovod's collectives: allreduce, allgather, broadcast, each at once or by handle; join."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from shoal.dropin.mean import Flow, mean_of, spread
from shoal.errors import DivergedError, OrderError, SettingError
from shoal.horovod.compression import Compression, Compressor
from shoal.horovod.session import JOIN, Session, Words, session

Average, Sum, Min, Max, Product = "Average", "Sum", "Min", "Max", "Product"
Adasum = "Adasum"
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    Sum: torch.add, Average: torch.add, Min: torch.minimum, Max: torch.maximum, Product: torch.mul,
}  # fmt: skip


class Handle:
    """A collective under way. `synchronize` gives its result.

    Args:
        flow: from where it waits for the first time; its result.
        after: makes the caller's tensor of it.
    """

    def __init__(self, flow: Flow, after: Callable[[Tensor], Tensor]) -> None:
        self.flow, self.after = flow, after
        self.pending = next(flow)
        self.result: Tensor | None = None

    def advance(self, *, wait: bool) -> bool:
        """Go on as far as possible; `wait`: to the end. Is it over?"""
        while self.result is None and (wait or self.pending is None or self.pending.ready()):
            if self.pending is not None:
                self.pending.wait()
            try:
                self.pending = next(self.flow)
            except StopIteration as done:
                self.result = self.after(cast(Tensor, done.value))
        return self.result is not None


def synchronize(handle: Handle) -> Tensor:
    """Wait for a collective. Returns its result."""
    handle.advance(wait=True)
    assert handle.result is not None
    return handle.result


def poll(handle: Handle) -> bool:
    """Would `synchronize` return at once? Never waits."""
    return handle.advance(wait=False)


def _done(value: Tensor) -> Flow:
    yield None
    return value


# ---------------------------------------------------------------- allreduce


def allreduce_async(
    tensor: Tensor, average: bool | None = None, name: str | None = None, op: str | None = None,
    prescale_factor: float = 1.0, postscale_factor: float = 1.0, process_set: object = None,
) -> Handle:  # fmt: skip
    """Start to combine a tensor over all ranks; shape and dtype are the same on all of them.

    Args:
        tensor: of any shape; not changed.
        average: older spelling of `op`: True: Average, False: Sum.
        name: of the call; None: by its number.
        op: Average (the default), Sum, Min, Max or Product. Whole numbers are averaged rounding down.
        prescale_factor, postscale_factor: multiply before and after.
        process_set: None; others are refused.

    Raises:
        SettingError: Adasum, or a process set.
        DivergedError: ranks call different things.
    """
    here = session()
    op = _op(op, average, process_set)
    words: Words = {
        "op": "allreduce", "name": here.name(name, "allreduce"), "shape": list(tensor.shape),
        "dtype": str(tensor.dtype), "by": op,
    }  # fmt: skip
    mine = tensor.detach().clone()
    if prescale_factor != 1:
        mine.mul_(prescale_factor)
    flow = _combined(here, mine.reshape(-1), op, here.tell(words))
    shape = tensor.shape
    return Handle(flow, lambda flat: _scaled(flat.view(shape).clone(), postscale_factor))


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor.mul_(factor)


def _op(op: str | None, average: bool | None, process_set: object) -> str:
    if process_set is not None:
        raise SettingError(
            "process_set= is not among shoal's", remedy="shoal.DistributedDataParallel(model, process_group=...)"
        )
    if op is None:
        return Sum if average is False else Average
    if op not in OPS:
        raise SettingError(f"op={op!r}: shoal.horovod combines by {', '.join(OPS)}", remedy="op=hvd.Average")
    return op


def _combined(here: Session, flat: Tensor, op: str, told: Sequence[Words]) -> Flow:
    """Ranks that have joined bring nothing, and Average divides by all ranks."""
    active = [w["op"] != JOIN for w in told]
    if flat.is_floating_point() and op in (Sum, Average):
        return mean_of(here.group, flat, active, here.group.size if op == Average else 1, here.pool)
    return _by_hand(here, flat, op, active)


def _by_hand(here: Session, flat: Tensor, op: str, active: Sequence[bool]) -> Flow:
    """Everybody gets everybody's, and combines them in the order of ranks."""
    size, count = here.group.size, flat.numel()
    every = flat.new_empty(size * count)
    every[here.group.rank * count : (here.group.rank + 1) * count] = flat
    pending = here.group.gather("hvd", every, [r * count for r in range(size + 1)])
    yield None
    yield pending
    parts = [part for part, counts in zip(every.view(size, count), active, strict=True) if counts]
    total = parts[0].clone()
    for part in parts[1:]:
        total = OPS[op](total, part)
    if op == Average:
        total = total / size if total.is_floating_point() else torch.div(total, size, rounding_mode="floor")
    return total


def allreduce(
    tensor: Tensor, average: bool | None = None, name: str | None = None,
    compression: type[Compressor] = Compression.none, op: str | None = None, prescale_factor: float = 1.0,
    postscale_factor: float = 1.0, process_set: object = None,
) -> Tensor:  # fmt: skip
    """Combine a tensor over all ranks, in a new tensor. See `allreduce_async`; not differentiable.

    Args:
        compression: hvd.Compression.fp16 sends half-precision numbers.
    """
    small, kind = compression.compress(tensor)
    handle = allreduce_async(small, average, name, op, prescale_factor, postscale_factor, process_set)
    return compression.decompress(synchronize(handle), kind)


def _into(tensor: Tensor, handle: Handle) -> Handle:
    """The result goes into the caller's tensor."""
    after = handle.after

    @torch.no_grad()
    def put(flat: Tensor) -> Tensor:
        tensor.copy_(after(flat))
        return tensor

    handle.after = put
    return handle


def allreduce_async_(
    tensor: Tensor, average: bool | None = None, name: str | None = None, op: str | None = None,
    prescale_factor: float = 1.0, postscale_factor: float = 1.0, process_set: object = None,
) -> Handle:  # fmt: skip
    """`allreduce_async` in place."""
    return _into(
        tensor, allreduce_async(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    )  # fmt: skip


def allreduce_(
    tensor: Tensor, average: bool | None = None, name: str | None = None, op: str | None = None,
    prescale_factor: float = 1.0, postscale_factor: float = 1.0, process_set: object = None,
) -> Tensor:  # fmt: skip
    """`allreduce` in place."""
    return synchronize(
        allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    )  # fmt: skip


# ---------------------------------------------------------------- allgather


def allgather_async(tensor: Tensor, name: str | None = None, process_set: object = None) -> Handle:
    """Start to bring all ranks' tensors together along the first dimension, whose sizes may differ.

    Raises:
        DivergedError: other dimensions or dtypes differ.
        OrderError: a rank has joined.
    """
    here = session()
    _op(None, None, process_set)
    mine = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    words: Words = {
        "op": "allgather", "name": here.name(name, "allgather"), "shape": list(mine.shape[1:]),
        "dtype": str(mine.dtype), "rows": mine.shape[0],
    }  # fmt: skip
    told = here.tell(words, differs="rows")
    _nobody_joined(told, "allgather")
    rows = [cast(int, w["rows"]) for w in told]
    width = mine[:0].new_empty((1, *mine.shape[1:])).numel()
    bounds = [sum(rows[:r]) * width for r in range(len(rows) + 1)]
    every = mine.new_empty(bounds[-1])
    every[bounds[here.group.rank] : bounds[here.group.rank + 1]] = mine.reshape(-1)
    pending = here.group.gather("hvd", every, bounds)

    def flow() -> Flow:
        yield pending
        return every

    return Handle(flow(), lambda flat: flat.view(-1, *mine.shape[1:]))


def allgather(tensor: Tensor, name: str | None = None, process_set: object = None) -> Tensor:
    """All ranks' tensors together, in the order of ranks. See `allgather_async`."""
    return synchronize(allgather_async(tensor, name, process_set))


def allgather_object(obj: object, name: str | None = None) -> list[object]:
    """Everybody's object, in the order of ranks. What JSON knows; see `broadcast_object`."""
    here = session()
    told = here.tell(
        {"op": "allgather_object", "name": here.name(name, "object"), "value": _json(obj)}, differs="value"
    )
    _nobody_joined(told, "allgather_object")
    return [json.loads(cast(str, w["value"])) for w in told]


# ---------------------------------------------------------------- broadcast


def broadcast_async(tensor: Tensor, root_rank: int, name: str | None = None, process_set: object = None) -> Handle:
    """Start to send one rank's tensor to all; shape and dtype are the same on all of them.

    Raises:
        OrderError: there is no such rank, or a rank has joined.
    """
    here = session()
    _op(None, None, process_set)
    _check_root(here, root_rank)
    words: Words = {
        "op": "broadcast", "name": here.name(name, "broadcast"), "shape": list(tensor.shape),
        "dtype": str(tensor.dtype), "root_rank": root_rank,
    }  # fmt: skip
    _nobody_joined(here.tell(words), "broadcast")
    flat = tensor.detach().reshape(-1).clone()
    spread(here.group, flat, root_rank)
    return Handle(_done(flat), lambda flat: flat.view(tensor.shape))


def broadcast(tensor: Tensor, root_rank: int, name: str | None = None, process_set: object = None) -> Tensor:
    """One rank's tensor, in a new one. See `broadcast_async`."""
    return synchronize(broadcast_async(tensor, root_rank, name, process_set))


def broadcast_async_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: object = None) -> Handle:
    """`broadcast_async` in place."""
    return _into(tensor, broadcast_async(tensor, root_rank, name, process_set))


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
    _nobody_joined(told, "broadcast_object")
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


def _nobody_joined(told: Sequence[Words], what: str) -> None:
    out = [str(r) for r, w in enumerate(told) if w["op"] == JOIN]
    if out and len(out) < len(told):
        raise OrderError(
            f"hvd.{what} while rank {', '.join(out)} is in hvd.join()",
            remedy="only allreduce and a DistributedOptimizer's step go on without a rank",
        )


# ---------------------------------------------------------------- join


def join(device: int = -1) -> int:
    """This rank is out of data: take part in the others' allreduces with nothing until all have joined.

    Sums lack it, and Average still divides by all ranks, as in Horovod.

    Args:
        device: as Horovod's; without effect.

    Returns:
        The rank that joined last; of several at once, the highest.
    """
    here = session()
    last = list(range(here.group.size))
    while True:
        told = here.tell({"op": JOIN})
        busy = [(r, w) for r, w in enumerate(told) if w["op"] != JOIN]
        if not busy:
            return last[-1]
        last = [r for r, _ in busy]
        _take_part(here, busy[0][1], told)


def _take_part(here: Session, words: Words, told: Sequence[Words]) -> None:
    op = cast(str, words["op"])
    if op == "allreduce":
        dtype = cast(torch.dtype, getattr(torch, cast(str, words["dtype"]).removeprefix("torch.")))
        zeros = torch.zeros(torch.Size(cast(list[int], words["shape"])).numel(), dtype=dtype)
        Handle(_combined(here, zeros, cast(str, words["by"]), told), lambda flat: flat).advance(wait=True)
    elif op == "step":
        average(here, cast(int, words["optimizer"]), told, cast(str, words["by"]))
    elif op == "end of the program":
        raise DivergedError(
            "a rank came to the end of its program while others are in hvd.join()",
            remedy="hvd.join() on all ranks, after the loop",
        )
    else:
        _nobody_joined(told, op)


def average(here: Session, number: int, told: Sequence[Words], op: str) -> None:
    """The step of an optimizer that all ranks know by this number: replace gradients by their mean. Collective."""
    averager = here.optimizers[number]
    bits = 0
    for words in told:
        bits |= int(cast(str, words.get("touched", "0")), 16)
    touched = [bool(bits >> i & 1) for i in range(len(averager.params))]
    active = [w["op"] != JOIN for w in told]
    averager.average(touched, active, here.group.size if op == Average else 1)
