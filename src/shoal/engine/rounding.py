"""Stochastic rounding: what a bfloat16 parameter cannot hold of an update is kept on average.

Without it, an update of less than 1/512 of a weight is lost each time. The noise of an element depends on the seed and
on its place in its parameter alone, so it is the same under every cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Elements that are rounded at a time."""

_MIX = (-0x61C8864680B583EB, -0x4B47D0C5A1A6E5C3 | 1)  # odd constants that spread the bits of a count


def round_into(out: Tensor, values: Tensor, seed: int, start: int) -> None:
    """Fill `out` (bfloat16) with `values` (float32, as long), rounded up or down by chance.

    Args:
        out, values: one-dimensional.
        seed: of this parameter and step.
        start: the place of the first element in its parameter.
    """
    for at in range(0, values.numel(), CHUNK):
        part = values[at : at + CHUNK]
        bits = part.view(torch.int32) + noise(seed, start + at, part.numel(), part.device)
        cut = (bits & -0x10000).view(torch.float32)
        out[at : at + CHUNK].copy_(torch.where(part.isfinite(), cut, part))


def noise(seed: int, start: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of `count` elements from `start` on, as int32."""
    x = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x = (x + (seed & 0x3FFFFFFFFFFFFFFF)) * _MIX[0]
    x = (x ^ (x >> 29)) * _MIX[1]
    return (((x ^ (x >> 32)) >> 20) & 0xFFFF).to(torch.int32)
