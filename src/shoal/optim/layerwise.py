"""LARS and LAMB: rates that follow the norms of each parameter and of its update, for very large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

from shoal.errors import OptimizerError
from shoal.optim.norms import NeedsNorms

Params = Iterable[Tensor] | Iterable[dict[str, object]]


class LARS(NeedsNorms):
    """SGD with momentum whose rate is, for each parameter, in proportion to its norm over its gradient's.

    You, Gitman, Ginsburg: Large Batch Training of Convolutional Networks (2017).

    Args:
        params: as of any torch optimizer.
        lr: the global rate.
        momentum: of the velocity.
        weight_decay: times the parameter, added to its gradient.
        trust: how much of a parameter's norm an update may change at rate 1.
    """

    def __init__(
        self, params: Params, lr: float = 0.1, *, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3
    ) -> None:
        _check(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        held = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = self.norms({p: [p, p.grad] for _, p in held})
        for group, p in held:
            decay, weight, grad = cast(float, group["weight_decay"]), *norms[p]
            rate = cast(float, group["lr"])
            if weight and grad:
                rate *= cast(float, group["trust"]) * weight / (grad + decay * weight)
            state = self.state[p]
            if not state:
                state["velocity"] = torch.zeros_like(p)
            update = torch.add(p.grad, p, alpha=decay)
            state["velocity"].mul_(group["momentum"]).add_(update.mul_(rate))
            p.sub_(state["velocity"])


class LAMB(NeedsNorms):
    """Adam whose update is, for each parameter, scaled to the parameter's norm.

    You et al.: Large Batch Optimization for Deep Learning: Training BERT in 76 minutes (2020).

    Args:
        params: as of any torch optimizer.
        lr: the rate.
        betas: of the means of gradients and of their squares.
        eps: added to the root of the squares' mean.
        weight_decay: times the parameter, added to the update.
    """

    def __init__(
        self, params: Params, lr: float = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        _check(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        held = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        updates = {p: self._update(group, p) for group, p in held}
        norms = self.norms({p: [p, updates[p]] for _, p in held})
        for group, p in held:
            weight, update = norms[p]
            p.sub_(updates[p].mul_(cast(float, group["lr"]) * (weight / update if weight and update else 1.0)))

    def _update(self, group: dict[str, object], p: Tensor) -> Tensor:
        first, second = cast(tuple[float, float], group["betas"])
        state = self.state[p]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        grad = cast(Tensor, p.grad)
        state["exp_avg"].lerp_(grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
        mean = state["exp_avg"] / (1 - first ** state["step"])
        root = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt_().add_(cast(float, group["eps"]))
        return mean.div_(root).add_(p, alpha=cast(float, group["weight_decay"]))


def _check(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise OptimizerError(f"{name}={value:g}", remedy=f"{name} of at least 0")
