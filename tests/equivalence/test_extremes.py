"""Odd sizes, empty shards, more ranks than parameters, deep networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoal.strategy import Cut, Strategy
from shoal.verify import verify
from tests.equivalence.test_table import STRATEGIES


def loss_of(width: int):
    def loss(model: nn.Module, step: int, leaf: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(1000 * step + leaf)
        return model(torch.randn(3, width, generator=g)).square().mean()

    return loss


def adam(params):
    return torch.optim.Adam(params, lr=1e-2)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("width", [1, 7, 8, 9, 63, 64, 65])
def test_odd_sizes(name: str, width: int) -> None:
    report = verify(lambda: nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1)), adam, loss_of(width),
                    Strategy(shard=STRATEGIES[name]), workers=3, clip=0.1)  # fmt: skip
    assert report.equal, report


@pytest.mark.parametrize("cut", list(Cut))
@pytest.mark.parametrize("name", STRATEGIES)
def test_more_ranks_than_parameters(name: str, cut: Cut) -> None:
    report = verify(lambda: nn.Linear(3, 1), adam, loss_of(3), Strategy(shard=STRATEGIES[name], cut=cut), workers=6)
    assert report.equal, report


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("ddp", "zero2")), "zero3"])
def test_a_hundred_layers_on_eight_ranks(name: str) -> None:
    def deep() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(65, 65), nn.Tanh()) for _ in range(100)))

    report = verify(deep, adam, loss_of(65), Strategy(shard=STRATEGIES[name]), workers=8, steps=2)
    assert report.equal, report


def test_the_oracle_sees_a_difference() -> None:
    """A model that draws its weights from no seed differs from the first step on, by name."""
    counter = iter(range(100))

    def loss(model: nn.Module, step: int, leaf: int) -> torch.Tensor:
        return model(torch.full((1, 4), 1.0 + next(counter))).sum()

    report = verify(lambda: nn.Linear(4, 4), lambda p: torch.optim.SGD(p, lr=0.1), loss, "zero1", workers=2, steps=2)
    assert not report.equal
    assert report.step == 0
    assert report.name == "weight"
    assert report.ulps is not None
    assert report.ulps > 0
    assert "different after step 0: 'weight'" in str(report)
