"""Where what one transfer brings arrives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from shoal.comm.group import Box, Like, Parcel, Strips
from shoal.comm.pool import Pool


class Boxes:
    """The strips to receive into, from each rank; those of the carrier's choice are lent from a pool."""

    def __init__(self, receives: Sequence[Box], spare: Pool) -> None:
        self.asked, self.spare, self.lent = receives, spare, list[Tensor]()
        self.filled: list[tuple[int, Strips]] = [(peer, self._strips(box)) for peer, box in receives]

    def _strips(self, box: Strips | Like) -> Strips:
        if not isinstance(box, Like):
            return box
        flat = self.spare.take(sum(box.sizes), box.dtype, box.device)
        self.lent.append(flat)
        return torch.split(flat, list(box.sizes))

    def are(self, receives: Sequence[Box]) -> bool:
        """Do these name the same memory?"""
        pairs = zip(self.asked, receives, strict=True)
        return all(isinstance(a, Like) or all(map(is_, a, b)) for (_, a), (_, b) in pairs)

    def received(self) -> Sequence[Strips]:
        """What `Pending.wait` returns."""
        return [strips for _, strips in self.filled]

    def release(self) -> None:
        """What was lent may be used again."""
        while self.lent:
            self.spare.give(self.lent.pop())


Numbered = tuple[int, int, Tensor]
"""A strip that travels: its number among those of its peer, the peer, and itself."""


def numbered(parcels: Sequence[Parcel]) -> list[Numbered]:
    """Every strip that travels."""
    seen = Counter[int]()
    out: list[Numbered] = []
    for peer, strips in parcels:
        for tensor in strips:
            if tensor.numel():
                out.append((seen[peer], peer, tensor))
                seen[peer] += 1
    return out
