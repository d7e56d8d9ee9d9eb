"""What architectures in the wild do, found by benchmarks/zoo.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.engine.units import choose
from shoal.strategy import Shard, Strategy
from tests.engine.trials import assert_same, inputs, plain, train


class Holders(nn.Module):
    """Blocks that hang on modules without a forward, as in the VQ-GAN of Janus: those are never entered."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for _ in range(3):
            level = nn.Module()
            level.body = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
            level.named = nn.ModuleDict({"scale": nn.Linear(64, 64)})
            self.levels.append(level)
        self.paths = nn.ModuleList([nn.ModuleDict({"one": nn.Linear(64, 64), "two": nn.Linear(64, 64)})])

    def forward(self, x: Tensor) -> Tensor:
        for level in self.levels:
            for linear in level.body:
                x = x + linear(x).tanh()
            x = level.named["scale"](x)
        return self.paths[0]["two"](self.paths[0]["one"](x))


def test_modules_without_forward_are_no_blocks() -> None:
    names = [f"levels.{i}.body.{j}" for i in range(3) for j in range(2)]
    assert list(choose(Holders())) == [*names, ""]


@pytest.mark.parametrize("place", ["ddp", "zero3"])
def test_modules_without_forward_train(place: str) -> None:
    def leaf(model: nn.Module, step: int, number: int) -> Tensor:
        return model(inputs(step, number, 4, 64)).square().mean()

    assert_same(train(place, Holders, leaf), plain(Holders, leaf))


class Shared(nn.Module):
    """Two of these share their activation, as all FlauBERTs share one that is global to their file."""

    activation = nn.GELU()

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 70), Shared.activation, nn.Linear(70, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def test_two_models_share_a_module_without_parameters() -> None:
    def rank_main(_rank: int) -> tuple[list[str], Tensor]:
        with shoal.init("zero3", leaves=2, run_dir="none", device="cpu") as job:
            models = [Shared(), Shared()]
            for name, model in zip("ab", models, strict=True):
                job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), name=name)
            with job.whole(models[0]):
                names = list(models[0].state_dict())
                twin = copy.deepcopy(models[0])
            return names, twin(torch.ones(1, 8)).detach()

    (names, value), (_, other) = run(2, rank_main)
    assert names == ["up.weight", "up.bias", "down.weight", "down.bias"]
    assert torch.equal(value, other)
    assert "__deepcopy__" not in Shared.activation.__dict__
    assert not Shared.activation._state_dict_pre_hooks


class Adapted(nn.Module):
    """Three blocks of a frozen and a trained unit each, any of which a leaf may skip, as layer drop does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3))
        for block in self.blocks:
            block[0].requires_grad_(False)

    def forward(self, x: Tensor, used: tuple[int, ...]) -> Tensor:
        x = self.first(x)
        for i in used:
            x = x + self.blocks[i](x).tanh()
        return x


@pytest.mark.parametrize("first", [(0, 1), (1, 2), (0, 2), (0,), (1,), (2,), ()])
def test_blocks_of_several_units_that_the_first_leaf_skips(first: tuple[int, ...]) -> None:
    later = [(0, 1, 2), (0, 2), (1,), (0, 1, 2), (1, 2), (0, 1)]

    def leaf(model: nn.Module, step: int, number: int) -> Tensor:
        used = [first, first, *later][2 * step + number]
        return model(inputs(step, number, 4, 64), used).square().mean()

    blocks = [f"blocks.{i}" for i in range(3)]
    strategy = Strategy(shard=Shard.PARAMETERS)
    found = train((2, strategy), Adapted, leaf, leaves=2, steps=4, units=blocks, make_optimizer=trained)
    assert_same(found, plain(Adapted, leaf, leaves=2, steps=4, make_optimizer=trained))


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
