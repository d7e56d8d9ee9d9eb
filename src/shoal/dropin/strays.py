"""Optimizers that step while nothing of shoal's sends their gradients: do their parameters stay equal on all ranks?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from shoal.comm.group import Group

_watching: ContextVar[Strays | None] = ContextVar("shoal_strays", default=None)
"""Of this rank: torch's hook on all optimizers of the process has no other way to tell whose they are."""
_hooked: list[object] = []
_ours: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def ours(optimizer: Optimizer) -> None:
    """This one updates a part of the parameters, which shoal sends on."""
    _ours.add(optimizer)


class Strays:
    """Remembers which optimizers have stepped on this rank.

    Args:
        group: the ranks to compare with.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.seen: dict[int, tuple[weakref.ref[Optimizer], int]] = {}
        if group.size > 1:
            if not _hooked:
                _hooked.append(register_optimizer_step_post_hook(_stepped))
            _watching.set(self)

    def note(self, optimizer: Optimizer) -> None:
        _, steps = self.seen.get(id(optimizer), (None, 0))
        self.seen[id(optimizer)] = (weakref.ref(optimizer), steps + 1)

    def tell(self, warn: Callable[[str], None], known: Collection[Optimizer] = ()) -> None:
        """Compare over ranks, and warn where they differ. Collective.

        Args:
            known: optimizers whose parameters are shoal's, and not compared.
        """
        if _watching.get() is self:
            _watching.set(None)
        if self.group.size == 1:
            return
        found = [(o, steps) for ref, steps in self.seen.values() if (o := ref()) is not None and o not in known]
        mine = b"".join(digest(p for g in o.param_groups for p in g["params"]) for o, _ in found)
        told = self.group.share_any("strays", mine)
        if len(set(told)) == 1 or not all(told):
            return
        name, steps = (type(found[0][0]).__name__, found[0][1]) if found else ("an optimizer", 0)
        warn(
            f"replicas drifted apart: after {steps} steps of {name} the ranks' parameters differ, for nothing sent "
            "their gradients; job.prepare(model, optimizer), or shoal.DistributedDataParallel(model), does"
        )


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
