"""What an optimizer inherits that needs the norms of whole parameters and must work on pieces of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from shoal.squares import add_up, squares

Norms = Callable[[Mapping[Tensor, Sequence[Tensor]]], dict[Tensor, list[float]]]


class NeedsNorms(Optimizer):
    """Calls `self.norms` exactly once per step, on every rank, also on one that holds no piece.

    `norms` takes, per parameter of the optimizer, some tensors of its shape, and returns their 2-norms. A job puts its
    own in place, which adds up over all ranks.
    """

    norms: Norms

    def __init__(self, params: object, defaults: dict[str, object]) -> None:
        super().__init__(params, defaults)  # type: ignore[arg-type]
        self.norms = whole_norms


def whole_norms(values: Mapping[Tensor, Sequence[Tensor]]) -> dict[Tensor, list[float]]:
    """Of tensors that are whole here, with the bits that any cut gives."""
    return {
        param: [math.sqrt(add_up(squares(t.reshape(-1), 0), t.numel())) for t in tensors]
        for param, tensors in values.items()
    }
