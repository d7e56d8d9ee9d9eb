"""Buffers that are used again: filling fresh pages costs three times as much.

Note: smaller blocks need no pool. The C library keeps the pages of what is freed below 32 MiB, and makes whatever is
asked for next of them; larger ones it gives back to the system.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

KEPT = 2
"""Buffers of one kind that wait to be used again."""
LEAST = 2**25
"""Bytes of a buffer of the host whose pages malloc would give back."""

Make = Callable[[int, torch.dtype, torch.device], Tensor]


def least(device: torch.device) -> int:
    """Bytes of a buffer on this device that is worth keeping."""
    return LEAST if device.type == "cpu" else 0


class Pool:
    """One-dimensional buffers by size.

    Args:
        make: where new ones come from.
        idle: may a buffer that was given back be overwritten? Others may still read it.
        kept: buffers of one kind that wait to be used again at most.
        least: bytes of a buffer that waits, at least; None: as `least` says.
    """

    def __init__(
        self, make: Make | None = None, idle: Callable[[Tensor], bool] = lambda _buffer: True, *, kept: int = KEPT,
        least: int | None = None,
    ) -> None:  # fmt: skip
        self.kept, self.least = kept, least
        self.make: Make = make or (lambda numel, dtype, device: torch.empty(numel, dtype=dtype, device=device))
        self.idle = idle
        self.free: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
        self.out = 0  # bytes that were taken and not given back

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.out += numel * dtype.itemsize
        waiting = self.free.get((numel, dtype, device), [])
        for at, buffer in enumerate(waiting):
            if self.idle(buffer):
                return waiting.pop(at)
        return self.make(numel, dtype, device)

    def give(self, buffer: Tensor) -> None:
        self.out -= buffer.nbytes
        waiting = self.free.setdefault((buffer.numel(), buffer.dtype, buffer.device), [])
        if len(waiting) < self.kept and buffer.nbytes >= (least(buffer.device) if self.least is None else self.least):
            waiting.append(buffer)

    @property
    def nbytes(self) -> int:
        """Bytes that wait to be used again."""
        return sum(b.nbytes for waiting in self.free.values() for b in waiting)
