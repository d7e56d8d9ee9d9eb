"""What tensor parallelism leaves on this rank of a cell: a parameter may be a DTensor, of which each rank has a box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def local(tensor: Tensor) -> Tensor:
    """The part of it that lies here: of a DTensor its local tensor, else all."""
    if type(tensor) in _PLAIN:  # to ask one for an attribute that it has not is slow
        return tensor
    return cast(Tensor, getattr(tensor, "_local_tensor", tensor))


def spread(param: Tensor) -> bool:
    """Do the ranks of a cell hold different boxes of it?"""
    places = cast(Sequence[object], getattr(param, "placements", ()))
    return any(cast(Callable[[], bool], getattr(p, "is_shard", bool))() for p in places)


def local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """This rank's part of a gradient, summed over the cell where it came in parts. A collective of the cell."""
    if type(grad) in _PLAIN:
        return grad
    redistribute = getattr(grad, "redistribute", None)
    if redistribute is None:
        return grad
    return local(cast(Tensor, redistribute(placements=getattr(param, "placements", None))))
