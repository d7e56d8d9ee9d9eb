"""torch.compile on the blocks' own forward, with shoal's hooks outside: its boundaries are part of the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from shoal.comm.group import Carrier
from shoal.engine.unit import Unit
from shoal.errors import ModelError

FIRST_CALLS = 4
"""So many calls of a block may compile something: forward and backward, with gradients and without."""

Forward = Callable[..., object]


class Compiled:
    """One block's forward, compiled at its first call. While it may compile, other ranks' time-out stands still."""

    def __init__(self, block: nn.Module, options: Mapping[str, object], carrier: Carrier) -> None:
        self.block, self.carrier, self.calls = block, carrier, 0
        self.forward = cast(Forward, torch.compile(block.forward, **options))  # pyright: ignore
        block.forward = self

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self.calls >= FIRST_CALLS:
            return self.forward(*args, **kwargs)
        self.calls += 1
        self.carrier.hold("torch.compile")
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.carrier.hold("")

    def remove(self) -> None:
        """Give the block its own forward back."""
        del self.block.forward


def compile_blocks(units: Sequence[Unit], options: Mapping[str, object], carrier: Carrier) -> list[Compiled]:
    """Compile every block that has no other one inside."""
    blocks = dict.fromkeys(module for unit in units for module in unit.modules.values())
    outer = {b for b in blocks for other in blocks if other is not b and other in set(b.modules())}
    return [Compiled(block, options, carrier) for block in blocks if block not in outer]


def check_uncompiled(model: nn.Module) -> None:
    """Raises `ModelError` for a model that is compiled as a whole."""
    whole = type(model).__name__ == "OptimizedModule"
    if whole or any(m._compiled_call_impl is not None for m in model.modules()):  # pyright: ignore
        raise ModelError(
            "the model is compiled already, hooks and all" if whole else "a module of the model is compiled already",
            cause="what is compiled together is part of the numbers, so it must be the same under every strategy",
            remedy="give prepare the plain model, with compile=True: it compiles every block",
        )
