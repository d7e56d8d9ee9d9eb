"""Horovod's collectives that combine: allreduce, at once or by handle, and join."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import cast

import torch
from torch import Tensor

from shoal.comm.group import Pending
from shoal.dropin.mean import Flow, mean_of, together
from shoal.errors import DivergedError, SettingError
from shoal.horovod.compression import Compression, Compressor
from shoal.horovod.handles import Handle, into, synchronize
from shoal.horovod.session import JOIN, Session, Words, check_process_set, nobody_joined, session

Average, Sum, Min, Max, Product = "Average", "Sum", "Min", "Max", "Product"
Adasum = "Adasum"
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    Sum: torch.add, Average: torch.add, Min: torch.minimum, Max: torch.maximum, Product: torch.mul,
}  # fmt: skip


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
    check_process_set(process_set)
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
    return Flow(_by_hand(here, flat, op, active))


def _by_hand(
    here: Session, flat: Tensor, op: str, active: Sequence[bool]
) -> Generator[Pending, None, Tensor]:  # fmt: skip
    """Everybody gets everybody's, and combines them in the order of ranks."""
    size, count = here.group.size, flat.numel()
    every = flat.new_empty(size * count)
    every[here.group.rank * count : (here.group.rank + 1) * count] = flat
    yield here.group.gather("hvd", every, [r * count for r in range(size + 1)])
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


def allreduce_async_(
    tensor: Tensor, average: bool | None = None, name: str | None = None, op: str | None = None,
    prescale_factor: float = 1.0, postscale_factor: float = 1.0, process_set: object = None,
) -> Handle:  # fmt: skip
    """`allreduce_async` in place."""
    return into(
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
        Handle(_combined(here, zeros, cast(str, words["by"]), told), lambda flat: flat).result()
    elif op == "step":
        average(here, cast(int, words["optimizer"]), told, cast(str, words["by"]))
    elif op == "end of the program":
        raise DivergedError(
            "a rank came to the end of its program while others are in hvd.join()",
            remedy="hvd.join() on all ranks, after the loop",
        )
    else:
        nobody_joined(told, op)


def average(here: Session, number: int, told: Sequence[Words], op: str) -> None:
    """The step of an optimizer that all ranks know by this number: replace gradients by their mean. Collective."""
    touched = together(int(cast(str, words.get("touched", "0")), 16) for words in told)
    active = [w["op"] != JOIN for w in told]
    here.optimizers[number].average(touched, active, here.group.size if op == Average else 1)
