"""A leaf's gradients as autograd gives them, laid out as they travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.engine.sums import Sum
from shoal.engine.unit import Unit
from shoal.layout import Span


def strips_of(unit: Unit, grads: Mapping[str, Tensor]) -> list[Tensor]:
    """A unit's gradients run by run: large ones as they are, small ones side by side; zeros for what is missing."""
    with torch.no_grad():
        return [_strip(unit, grads, spans) for spans in unit.run_spans]


def not_finite(unit: Unit, strips: Sequence[Tensor]) -> list[str]:
    """The names of a unit's parameters whose gradients have overflowed."""
    if all(bool(strip.sum().isfinite()) for strip in strips):
        return []
    whole, runs = Sum(strips), unit.runs
    spans = unit.layout.spans
    return [s.name for s in spans if not all(bool(t.isfinite().all()) for t in whole.between(runs, s.start, s.stop))]


def _strip(unit: Unit, grads: Mapping[str, Tensor], spans: Sequence[Span]) -> Tensor:
    dtype, first = unit.dtypes.reduce, spans[0]
    if unit.alone:
        if first.name in grads:
            return _as_it_is(unit, first.name, grads[first.name], dtype)
        return torch.zeros(unit.pieces[first.name].shape, dtype=dtype, device=unit.device)
    if len(spans) == 1 and first.name in grads:
        return _flat(unit, first.name, grads[first.name], dtype)
    strip = torch.zeros(spans[-1].stop - first.start, dtype=dtype, device=unit.device)
    there = [s for s in spans if s.name in grads]
    if there:
        views = [strip[s.start - first.start : s.stop - first.start] for s in there]
        flat = [_flat(unit, s.name, grads[s.name], None) for s in there]
        torch._foreach_copy_(views, flat)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return strip


def _as_it_is(unit: Unit, name: str, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in its own shape: where nothing travels, nothing needs to lie in a row."""
    if grad.requires_grad:
        grad = grad.detach()
    if unit.orders:
        grad = unit.as_it_lies(name, grad)
    if not grad.is_contiguous():
        grad = grad.contiguous()
    return grad if grad.dtype is dtype else grad.to(dtype)


def _flat(unit: Unit, name: str, grad: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A gradient as its parameter lies in memory, without a copy where it lies so already. Not under autograd."""
    if grad.requires_grad:  # create_graph=True
        grad = grad.detach()
    flat = (unit.as_it_lies(name, grad) if unit.orders else grad).reshape(-1)
    return flat if dtype is None or flat.dtype is dtype else flat.to(dtype)
