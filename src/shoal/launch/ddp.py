"""torch's DistributedDataParallel around a model that stays the user's own: `shoal verify --plain` compares with it."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def join() -> int:
    """Form torch's process group with the other ranks that `launch` has started. Returns this rank."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
    dist.init_process_group("gloo")
    return dist.get_rank()


def total(value: float) -> float:
    """The sum over all ranks."""
    whole = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(whole)
    return whole.item()


def wrap(model: nn.Module, factor: Callable[[], float]) -> None:
    """Let calls of `model` go through DDP.

    Args:
        model: its hooks stay on it; a twin without hooks, which has the same parameters, is what DDP calls.
        factor: what this rank's gradients count in DDP's plain mean, read as they are made.
    """

    def counted(grad: Tensor) -> Tensor:
        by = factor()
        return grad if by == 1.0 else grad * by

    twin = copy.copy(model)
    for name, value in list(twin.__dict__.items()):
        if name.endswith(("_hooks", "_with_kwargs", "_always_called")) and isinstance(value, dict):
            twin.__dict__[name] = type(cast("dict[object, object]", value))()
    for param in model.parameters():
        if param.requires_grad:
            param.register_hook(counted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `broadcast_buffers` gets another name, which older ones lack
        wrapped = DistributedDataParallel(twin, broadcast_buffers=False, find_unused_parameters=True)

    def forward(*args: object, **kwargs: object) -> object:
        twin.training = model.training
        wrapped.training = model.training
        return cast(object, wrapped.forward(*args, **kwargs))

    model.forward = forward
