"""AdamW with 8 bits per state: numbers share a scale in blocks, so a parameter may be cut between blocks only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 256
"""Elements that share a scale."""


class AdamW8bit(Optimizer):
    """AdamW that keeps both means in 8 bits: a quarter of AdamW's state.

    After Dettmers et al.: 8-bit Optimizers via Block-wise Quantization (2022), with even steps; of the squares' mean
    the root is kept, which spreads small values.

    Args:
        params: as of any torch optimizer.
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.
    """

    granule = BLOCK
    """Parameters are cut at multiples of this."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, object]], lr: float = 1e-3, *,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(group, p)

    def _step(self, group: dict[str, object], p: Tensor) -> None:
        first, second = cast(tuple[float, float], group["betas"])
        lr, decay, eps = (cast(float, group[k]) for k in ("lr", "weight_decay", "eps"))
        state = self.state[p]
        if not state:
            blocks = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_root"):
                state[name] = torch.zeros_like(p, dtype=torch.int8)
                state[f"{name}_scale"] = blocks.clone()
        state["step"] += 1
        grad = cast(Tensor, p.grad)
        mean = unpack(state["exp_avg"], state["exp_avg_scale"]).lerp_(grad, 1 - first)
        squares = unpack(state["exp_avg_root"], state["exp_avg_root_scale"]).square_()
        squares.mul_(second).addcmul_(grad, grad, value=1 - second)
        pack(mean, state["exp_avg"], state["exp_avg_scale"])
        root = squares.sqrt_()
        pack(root, state["exp_avg_root"], state["exp_avg_root_scale"])
        p.mul_(1 - lr * decay)
        denominator = (root / (1 - second ** state["step"]) ** 0.5).add_(eps)
        p.sub_(mean.div_(1 - first ** state["step"]).div_(denominator).mul_(lr))


def pack(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Round to 255 even steps between minus and plus the largest of each block."""
    flat = _blocks(values)
    scales.copy_(flat.abs().amax(1) / 127)
    steps = torch.where(scales > 0, scales, 1.0)[:, None]
    codes.view(-1).copy_((flat / steps).round_().view(-1)[: codes.numel()])


def unpack(codes: Tensor, scales: Tensor) -> Tensor:
    """What was packed, as float32."""
    return (_blocks(codes.float()) * scales[:, None]).view(-1)[: codes.numel()].view(codes.shape)


def _blocks(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
