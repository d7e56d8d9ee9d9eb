"""Which dtype everything has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from shoal.strategy import Strategy

T = TypeVar("T")


class Dtypes(NamedTuple):
    """Of one parameter: what the model computes with, what is updated, and in what its gradient travels."""

    compute: torch.dtype
    master: torch.dtype
    reduce: torch.dtype


_HALF = (torch.float16, torch.bfloat16)


def dtypes(param: nn.Parameter, owner: nn.Module, s: Strategy) -> Dtypes:
    """The dtypes of one parameter, which `owner` holds.

    Batch norm keeps float32 parameters, as its running statistics do: torch refuses to mix them.
    """
    reduce = cast(torch.dtype, getattr(torch, s.reduce))
    if param.dtype not in (torch.float32, *_HALF):
        return Dtypes(param.dtype, param.dtype, param.dtype)
    if param.dtype == torch.float32 and s.precision == "bfloat16" and not _keeps_float32(owner):
        return Dtypes(torch.bfloat16, torch.float32, reduce)
    return Dtypes(param.dtype, param.dtype, reduce)


def _keeps_float32(owner: nn.Module) -> bool:
    return isinstance(owner, nn.modules.batchnorm._NormBase)  # pyright: ignore[reportPrivateUsage]


def cast_floats(value: T, to: torch.dtype, only: torch.dtype | None = None) -> T:
    """The same structure with its floating tensors cast: lists, tuples, dicts and dataclasses are entered.

    Args:
        value: what a module gets or returns.
        to: the dtype of float16, bfloat16, float32 tensors afterwards.
        only: leave tensors of other dtypes alone.
    """
    if isinstance(value, Tensor):
        wanted = value.dtype in (torch.float32, *_HALF) if only is None else value.dtype == only
        return cast(T, value.to(to)) if wanted else value
    if isinstance(value, tuple):
        parts = [cast_floats(v, to, only) for v in cast(tuple[object, ...], value)]
        make = cast(Callable[..., object], value.__class__)
        named = hasattr(cast(object, value), "_fields")
        return cast(T, make(*parts) if named else tuple(parts))
    if isinstance(value, list):
        return cast(T, [cast_floats(v, to, only) for v in cast(list[object], value)])
    if isinstance(value, dict):
        made = {k: cast_floats(v, to, only) for k, v in cast(dict[object, object], value).items()}
        return cast(T, type(value)(made))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: cast_floats(getattr(value, f.name), to, only) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def tensors(value: object) -> list[Tensor]:
    """All tensors in what a module returns."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in cast(Mapping[object, object], value).values() for t in tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in cast(list[object], value) for t in tensors(v)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in tensors(getattr(value, f.name))]
    return []
