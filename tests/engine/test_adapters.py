"""Adapters beside frozen weights: only a few parameters are trained, and all of them are cut."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset

import shoal
from shoal.comm.threads import run

LEAVES = 4


class Adapted(nn.Module):
    """A frozen weight in eight bits with a scale for every row, and two thin matrices that are trained (LoRA)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-127, 127, (width, width), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(width, 1) / 100, requires_grad=False)
        self.down = nn.Parameter(torch.randn(4, width) / 10)
        self.up = nn.Parameter(torch.zeros(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).T + x @ self.down.T @ self.up.T


def train(strategy: str) -> tuple[dict[str, Tensor], int]:
    """Whole state on rank 0, and bytes of frozen weights that rest on this rank."""
    with shoal.init(strategy, leaves=LEAVES, run_dir="none") as job:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Sequential(Adapted(64), nn.Tanh()) for _ in range(3)))
        net, optimizer = job.prepare(net, AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01))
        numbers = cast("Dataset[int]", range(3 * LEAVES))
        for number in job.loader(numbers, global_batch=LEAVES, shuffle=False):
            inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(int(number)))
            net(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        units = job._bindings[""].engine.units
        frozen = sum(piece.nbytes for unit in units if not unit.trainable for piece in unit.pieces.values())
        return job.state_dict(net), frozen  # type: ignore[return-value]


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 2), ("zero1", 2), ("zero2", 4), ("zero3", 2), ("zero3", 4)])
def test_frozen_weights_in_eight_bits(strategy: str, world: int) -> None:
    (alone, whole), *_ = run(1, lambda _rank: train("ddp"))
    found = run(world, lambda _rank: train(strategy))
    state = found[0][0]
    assert state["0.0.weight"].dtype is torch.int8
    assert not [name for name in alone if not torch.equal(state[name], alone[name])]
    if strategy == "zero3":
        assert max(frozen for _, frozen in found) < 1.2 * whole / world
