"""Dynamic loss scaling for float16, whose smallest numbers are too large for many gradients.

The scale enters by an identity on every output of the model and leaves by one on every input, so that losses and
gradients that the user sees are never scaled. It is a power of two: scaling changes no digit.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from shoal.errors import ModelError

START = 2.0**16
GROW_AFTER = 2000
"""Steps without an overflow until the scale doubles."""
LEAST = 2.0**-24
"""Below, it is not the scale that makes gradients infinite."""


class Overflow(NamedTuple):
    """The first gradient of a leaf that is not finite: `parameter` counts in the model's order."""

    leaf: int
    parameter: int


class LossScale:
    """The scale of one model's losses, equal on all ranks."""

    def __init__(self) -> None:
        self.scale, self.good = START, 0

    def update(self, *, overflowed: bool, name: str = "") -> None:
        """A step is over; `name`: of the parameter whose gradient overflowed.

        Raises:
            ModelError: gradients are infinite at any scale.
        """
        self.good = 0 if overflowed else self.good + 1
        if overflowed:
            self.scale /= 2
        elif self.good == GROW_AFTER:
            self.scale, self.good = self.scale * 2, 0
        if self.scale < LEAST:
            raise ModelError(
                f"the gradient of '{name}' is not finite at any loss scale",
                cause="the loss is infinite or NaN, or the model leaves the range of float16 in its forward",
                remedy='precision="bfloat16", or prepare(..., float32=[...]) for the layers that overflow',
            )

    def state(self) -> dict[str, float | int]:
        """For a checkpoint."""
        return {"scale": self.scale, "good": self.good}

    def load(self, state: dict[str, float | int]) -> None:
        self.scale, self.good = float(state["scale"]), int(state["good"])


class _Scaled(torch.autograd.Function):
    """An identity whose backward multiplies with the scale, or divides by it."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, scale: LossScale, out: bool) -> Tensor:
        ctx.scale, ctx.out = scale, out  # type: ignore[attr-defined]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        scale = cast(LossScale, ctx.scale).scale  # type: ignore[attr-defined]
        return grads[0] * (scale if cast(bool, ctx.out) else 1 / scale), None, None  # type: ignore[attr-defined]


def leaving(tensor: Tensor, scale: LossScale) -> Tensor:
    """An output of the model: gradients that come in are scaled."""
    return cast(Tensor, _Scaled.apply(tensor, scale, True)) if tensor.requires_grad else tensor


def entering(tensor: Tensor, scale: LossScale) -> Tensor:
    """An input of the model: gradients that go out are as without a scale."""
    return cast(Tensor, _Scaled.apply(tensor, scale, False)) if tensor.requires_grad else tensor
