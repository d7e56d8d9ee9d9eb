"""What torch calls differently from version to version (2.11 to 2.15), in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions

Backend = Any
"""A process group of one backend (gloo, NCCL), not torch's front of several."""


def all_reduce(group: Backend, tensor: Tensor) -> dist.Work:
    """Sum `tensor` over all ranks, in place, in an order of the backend's own."""
    return cast(dist.Work, group.allreduce([tensor]))


def reduce_scatter(group: Backend, part: Tensor, whole: Tensor) -> dist.Work:
    """Sum `whole` over all ranks and put this rank's equal share into `part`."""
    start = _named(group, "reduce_scatter_single", "_reduce_scatter_base")
    return start(part, whole, ReduceScatterOptions())


def all_gather(group: Backend, whole: Tensor, part: Tensor) -> dist.Work:
    """Put every rank's `part` into `whole`, in the order of ranks."""
    start = _named(group, "all_gather_single", "_allgather_base")
    return start(whole, part, AllgatherOptions())


def _named(group: Backend, *names: str) -> Callable[..., dist.Work]:
    """The first of these methods that this torch has."""
    return next(found for name in names if (found := getattr(group, name, None)) is not None)
