"""Optimizers that step while nothing of shoal's sends their gradients: do their parameters stay equal on all ranks?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from shoal.comm.group import Group

_watching: ContextVar[Strays | None] = ContextVar("shoal_strays", default=None)
"""Of this rank: torch's hook on all optimizers of the process has no other way to tell whose they are."""
_hooked: list[object] = []
_ours: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def ours(*optimizers: Optimizer) -> None:
    """These update what shoal sends on."""
    _ours.update(optimizers)


@dataclass(slots=True)
class Record:
    """What is kept of an optimizer, which may be gone when ranks compare. `at`: the step of the digest."""

    name: str
    steps: int = 0
    at: int = 0
    digest: bytes = bytes(8)


class Strays:
    """Remembers which optimizers have stepped on this rank, and what their parameters were then.

    Args:
        group: the ranks to compare with.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.records: list[Record] = []
        self.of: weakref.WeakKeyDictionary[Optimizer, Record] = weakref.WeakKeyDictionary()
        if group.size > 1:
            if not _hooked:
                _hooked.append(register_optimizer_step_post_hook(_stepped))
            _watching.set(self)

    def note(self, optimizer: Optimizer) -> None:
        """It has stepped. Parameters are looked at after steps 1, 8, 64, ...: that costs a pass over them."""
        if optimizer not in self.of:
            self.of[optimizer] = Record(type(optimizer).__name__)
            self.records.append(self.of[optimizer])
        record = self.of[optimizer]
        record.steps += 1
        if power_of_eight(record.steps):
            record.at = record.steps
            record.digest = digest(p for g in optimizer.param_groups for p in g["params"])

    def tell(self, warn: Callable[[str], None]) -> None:
        """Compare over ranks, and warn where they differ. Collective."""
        if _watching.get() is self:
            _watching.set(None)
        if self.group.size == 1:
            return
        mine = b"".join(r.at.to_bytes(8, "little") + r.digest for r in self.records)
        told = self.group.share_any("strays", mine)
        if len(set(told)) == 1 or len({len(t) for t in told}) > 1:  # what only some ranks update is no replica
            return
        size = len(mine) // len(self.records)
        cuts = range(0, len(mine), size)
        record = next(r for r, a in zip(self.records, cuts, strict=True) if len({t[a : a + size] for t in told}) > 1)
        warn(
            f"replicas drifted apart: after {record.at} steps of {record.name} the ranks' parameters differ, for "
            "nothing sent their gradients; job.prepare(model, optimizer), or shoal.DistributedDataParallel(model), does"
        )


def power_of_eight(count: int) -> bool:
    """1, 8, 64, ..."""
    while count > 1 and count % 8 == 0:
        count //= 8
    return count == 1


def _stepped(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    watching = _watching.get()
    if watching is not None and optimizer not in _ours:
        watching.note(optimizer)


@torch.no_grad()
def digest(tensors: Iterable[Tensor]) -> bytes:
    """Eight bytes that differ where any bits do: sums of words, each tensor's times another number."""
    total = 0
    for number, tensor in enumerate(tensors):
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        words = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        wide = words[: words.numel() // 4 * 4].view(torch.int32).to(torch.int64)
        places = torch.arange(1, wide.numel() + 1, device=wide.device)  # so that the order counts
        total += (2 * number + 1) * (int((wide * places).sum()) + int(words.sum()))
    return (total % 2**64).to_bytes(8, "little")
