"""Which dtype everything has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from shoal.errors import ModelError, nearest
from shoal.strategy import Strategy

T = TypeVar("T")


class Dtypes(NamedTuple):
    """Of one parameter: what the model computes with, what is updated, and in what its gradient travels."""

    compute: torch.dtype
    master: torch.dtype
    reduce: torch.dtype
    stochastic: bool = False  # masters are updated in float32 and rounded by chance


_HALF = (torch.float16, torch.bfloat16)


def compute_dtype(s: Strategy) -> torch.dtype:
    """What float32 parameters compute in."""
    return cast(torch.dtype, getattr(torch, s.precision))


def dtypes(param: nn.Parameter, s: Strategy, *, keep: bool) -> Dtypes:
    """The dtypes of one parameter; `keep`: it computes in its own.

    Batch norm keeps float32 parameters, as its running statistics do: torch refuses to mix them.
    """
    reduce = cast(torch.dtype, getattr(torch, s.reduce))
    if param.dtype not in (torch.float32, *_HALF):
        return Dtypes(param.dtype, param.dtype, param.dtype)
    narrow = compute_dtype(s)
    if param.dtype == torch.float32 and narrow != torch.float32 and not keep:
        return Dtypes(narrow, torch.float32 if s.masters else narrow, reduce, not s.masters)
    return Dtypes(param.dtype, param.dtype, reduce)


def kept(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules that compute in float32 whatever the precision: by name, or by the name of their class.

    Raises:
        ModelError: a name that is neither.
    """
    modules = dict(cast(Iterable[tuple[str, nn.Module]], model.named_modules()))
    classes = {type(m).__name__ for m in modules.values()}
    for name in names:
        if name not in modules and name not in classes:
            raise ModelError(
                f"float32= names {name!r}, which is neither a module nor the class of one",
                remedy=nearest(name, [*modules, *classes]),
            )
    return [m for n, m in modules.items() if n in names or type(m).__name__ in names]


def keepers(model: nn.Module, names: Sequence[str]) -> set[nn.Parameter]:
    """The parameters of those modules, and of all batch norms."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]  # pyright: ignore[reportPrivateUsage]
    return {p for m in [*kept(model, names), *norms] for p in m.parameters()}


def cast_floats(value: T, to: torch.dtype, only: torch.dtype | None = None) -> T:
    """The same structure with its floating tensors cast.

    Args:
        value: what a module gets or returns.
        to: the dtype of float16, bfloat16, float32 tensors afterwards.
        only: leave tensors of other dtypes alone.
    """

    def cast_one(tensor: Tensor) -> Tensor:
        wanted = tensor.dtype in (torch.float32, *_HALF) if only is None else tensor.dtype == only
        return tensor.to(to) if wanted else tensor

    return each_tensor(value, cast_one)


def each_tensor(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same structure with its tensors changed: lists, tuples, dicts and dataclasses are entered."""
    if isinstance(value, Tensor):
        return cast(T, change(value))
    if isinstance(value, tuple):
        parts = [each_tensor(v, change) for v in cast(tuple[object, ...], value)]
        make = cast(Callable[..., object], value.__class__)
        named = hasattr(cast(object, value), "_fields")
        return cast(T, make(*parts) if named else tuple(parts))
    if isinstance(value, list):
        return cast(T, [each_tensor(v, change) for v in cast(list[object], value)])
    if isinstance(value, dict):
        made = {k: each_tensor(v, change) for k, v in cast(dict[object, object], value).items()}
        return cast(T, type(value)(made))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: each_tensor(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
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
