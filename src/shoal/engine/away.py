"""What stands in for values that are not on this rank, so that nobody touches them by accident."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, cast

import torch
from torch import Tensor

from shoal.engine.autograd import in_backward
from shoal.errors import AwayError


def hole(dtype: torch.dtype, count: int, device: torch.device) -> Tensor:
    """`count` values that mean "not here": NaN, or the smallest value of an integer dtype."""
    if dtype == torch.bool:
        return torch.zeros(count, dtype=dtype, device=device)
    nothing = float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min
    return torch.full((count,), nothing, dtype=dtype, device=device)


def untouched(holes: Tensor) -> Tensor:
    """Per value, whether it still says "not here"."""
    if holes.dtype.is_floating_point or holes.dtype.is_complex:
        return holes.isnan()
    return holes == hole(holes.dtype, 1, holes.device)


_ADDS = (torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor)  # the latter with create_graph=True

Accumulate = Callable[[str, Tensor], Tensor]
"""Adds to what a parameter of this name has got so far, and returns all of it."""


class AwayGrad(Tensor):
    """A gradient that is not whole on this rank. Every operation on it raises `AwayError`.

    Only autograd itself may add to it, in a backward call: `accumulate` gets what it adds. So nobody has to look at
    every parameter before every backward call.
    """

    param_name: str
    accumulate: Accumulate | None
    layerwise: bool  # will it have been used before the step?

    @staticmethod
    def __new__(
        cls: type[AwayGrad], like: Tensor, name: str, accumulate: Accumulate | None = None, *, layerwise: bool = False
    ) -> AwayGrad:
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
            cls, like.shape, dtype=like.dtype, device=like.device
        )
        made.param_name, made.accumulate, made.layerwise = name, accumulate, layerwise
        return made  # pyright: ignore[reportUnknownVariableType]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> NoReturn:
        _refuse(args)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        guard = args[0] if args else None
        if func in _ADDS and isinstance(guard, AwayGrad) and guard.accumulate is not None and in_backward():
            total = guard.accumulate(guard.param_name, cast(Tensor, args[1]))
            return guard if func is _ADDS[0] else total
        _refuse(args)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"<gradient of '{self.param_name}': held by shoal until the step; see job.gradients>"


_READ = "with job.gradients(): ... shows every p.grad whole, to read; job.clip_grad_norm(max_norm) returns their norm"
_CLIP = "torch.nn.utils.clip_grad"
_INSTEAD = {
    (_CLIP, "clip_grad_value_"): "job.clip_grad_value(limit) in its place",
    (_CLIP, ""): "job.clip_grad_norm(max_norm) in its place clips and returns the true global norm",
    ("torch.nn.modules.module", "zero_grad"): "optimizer.zero_grad(), or model.zero_grad() as it is by default",
}
"""The line to write instead, by the module and function that touched a gradient."""


def _called_from(module: str, function: str = "") -> bool:
    """Is code of that module under way?"""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == module and function in ("", frame.f_code.co_name):
            return True
        frame = frame.f_back
    return False


def _refuse(args: Sequence[object]) -> NoReturn:
    flat: list[object] = []
    for a in args:
        flat.extend(a) if isinstance(a, (list, tuple)) else flat.append(a)  # pyright: ignore[reportUnknownArgumentType]
    found = next((a for a in flat if isinstance(a, AwayGrad)), None)
    if found is not None and found.layerwise:
        raise AwayError(
            f"layerwise=True: the gradient of '{found.param_name}' is used and gone before optimizer.step()",
            cause="a GradScaler, clipping and whatever else looks at gradients needs all of them at once",
            remedy="layerwise=False",
        )
    if _called_from("torch.amp.grad_scaler"):
        raise AwayError(
            "a GradScaler would unscale gradients that live in shards",
            remedy='shoal.init(..., precision="float16") scales losses itself; call loss.backward() and '
            "optimizer.step() without the GradScaler",
        )
    name = found.param_name if found is not None else "?"
    raise AwayError(
        f"the gradient of '{name}' is not a whole tensor of this rank",
        cause="shoal sums gradients over all leaves of a step and hands each rank what it updates",
        remedy=next((line for where, line in _INSTEAD.items() if _called_from(*where)), _READ),
    )
