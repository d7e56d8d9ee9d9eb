"""Models given as meta tensors get their values block by block, so that no rank ever holds the whole of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from shoal.engine.unit import Part, view_of
from shoal.errors import ModelError
from shoal.random import everything, mix

Fill = Callable[[nn.Module], None]
"""Gives one module's own parameters and buffers their values, whatever they were."""


class Filler:
    """Gives a meta model values that depend on the seed and on the names of modules alone.

    Args:
        model: with some or all parameters on the meta device.
        optimizers: their groups follow when parameters are replaced.
        device: where the values belong.
        seed: the job's.
        fill: None: every module's own `reset_parameters()`.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], device: torch.device, seed: int, fill: Fill | None
    ) -> None:
        self.optimizers, self.device, self.seed, self.given = optimizers, device, seed, fill
        self.modules = list(cast(Iterable[tuple[str, nn.Module]], model.named_modules()))
        self.owner: dict[nn.Parameter, nn.Module] = {}  # the first one gives a tied parameter its values
        for _, module in self.modules:
            for param in module.parameters(recurse=False):
                self.owner.setdefault(param, module)
        for name, module in self.modules:
            mine = [p for p in module.parameters(recurse=False) if p.is_meta]
            if (mine or _meta_buffers(module)) and fill is None and _reset(module) is None:
                raise ModelError(
                    f"'{name}', a {type(module).__name__}, is on the meta device and has no reset_parameters()",
                    remedy="prepare(..., fill=function), which is called with each module and gives it its values",
                )

    def block(self, parts: Sequence[Part]) -> list[Part]:
        """Make the meta parameters of one block's units real and give them their values."""
        made = [self._real(part) if any(p.is_meta for p in part.params.values()) else part for part in parts]
        fresh = {p for part, old in zip(made, parts, strict=True) if part is not old for p in part.params.values()}
        for name, module in self.modules:
            mine = {p for p in module.parameters(recurse=False) if p in fresh and self.owner[p] is module}
            if mine:
                self._fill(name, module, mine)
        return made

    def rest(self) -> None:
        """Buffers of modules that have no parameters."""
        for name, module in self.modules:
            if _meta_buffers(module):
                self._fill(name, module, set())

    def _real(self, part: Part) -> Part:
        dtype = next(iter(part.params.values())).dtype
        flat = torch.zeros(part.layout.numel, dtype=dtype, device=self.device)
        fresh: dict[nn.Parameter, nn.Parameter] = {}
        named: dict[str, nn.Parameter] = {}
        for s in part.layout.spans:
            old = part.params[s.name]
            param = nn.Parameter(torch.empty(0, dtype=dtype, device=self.device), requires_grad=old.requires_grad)
            param.data = view_of(flat[s.start : s.stop], s.shape, part.orders.get(s.name))  # with a version of its own
            named[s.name] = fresh[old] = param
            self.owner[param] = self.owner[old]
        for _, module in self.modules:
            for key, param in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if param in fresh:
                    module.register_parameter(key, fresh[param])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [fresh.get(p, p) for p in cast(list[nn.Parameter], group["params"])]
        return replace(part, params=named, flat=flat)

    def _fill(self, name: str, module: nn.Module, here: set[nn.Parameter]) -> None:
        """Parameters of the same module that belong to other units keep what they have."""
        for key in _meta_buffers(module):
            setattr(module, key, torch.zeros_like(module.get_buffer(key), device=self.device))
        others = {p: p.data for p in module.parameters(recurse=False) if p not in here and not p.is_meta}
        for param in others:
            param.data = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        everything(mix("fill", self.seed, name))
        with torch.no_grad():
            if self.given is not None:
                self.given(module)
            else:
                reset = _reset(module)
                assert reset is not None
                reset()
        for param, data in others.items():
            param.data = data


def _meta_buffers(module: nn.Module) -> list[str]:
    return [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]


def _reset(module: nn.Module) -> Callable[[], None] | None:
    for name in ("reset_parameters", "_reset_parameters"):
        found = getattr(module, name, None)
        if callable(found):
            return cast(Callable[[], None], found)
    return None
