"""Horovod's `Compression`: in which dtype numbers travel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class Compressor:
    """Sends numbers as they are. `wire`: the dtype in which floating numbers travel; None: their own."""

    wire: ClassVar[torch.dtype | None] = None

    @classmethod
    def compress(cls, tensor: Tensor) -> tuple[Tensor, torch.dtype]:
        """What travels, and what `decompress` needs."""
        return (tensor if cls.wire is None or not tensor.is_floating_point() else tensor.to(cls.wire)), tensor.dtype

    @classmethod
    def decompress(cls, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(dtype)


class Half(Compressor):
    """Sends and sums in float16: half the bytes, lossy."""

    wire = torch.float16


class Compression:
    """`Compression.none` and `Compression.fp16`."""

    none = Compressor
    fp16 = Half
