"""Loops that accumulate by themselves, several backward calls before one step, against plain PyTorch's same sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import shoal
from shoal.comm.threads import run
from shoal.leaves import Tree
from shoal.random import everything, mix
from shoal.strategy import Strategy
from tests.equivalence.models import (
    Everything,
    MakeOptimizer,
    Outcome,
    adamw,
    digest,
    outcome,
    samples,
    sgd,
    state_digest,
)
from tests.equivalence.test_table import GRID, STRATEGIES

BATCH, STEPS, SEED = 2, 3, 0
OPTIMIZERS: dict[str, MakeOptimizer] = {"sgd": sgd, "adamw": adamw}


class Plain(nn.Module):
    """Dropout, a tied and an unused weight, odd sizes. No buffers: their mean over leaves is shoal's own."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(11, 37)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(37, 131), nn.Tanh(), nn.Dropout(0.2), nn.Linear(131, 37)) for _ in range(2)
        )
        self.unused = nn.Parameter(torch.randn(9))
        self.out = nn.Linear(11, 37, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        return x @ self.out.weight


def by_shoal(
    world: int, strategy: str | Strategy, many: int, optimizer: str,
    make_model: Callable[[], nn.Module] = Plain, **settings: object,
) -> Outcome:  # fmt: skip
    """The habit as it stands in people's scripts."""

    def rank_main(_rank: int) -> Outcome | None:
        with shoal.init(strategy, seed=SEED, run_dir="none", device="cpu", **settings) as job:
            model = make_model()
            source = DataLoader(samples(BATCH * many * world * STEPS), batch_size=BATCH)
            model, opt, loader = job.prepare(model, OPTIMIZERS[optimizer](model), source)
            for number, (x, y) in enumerate(loader):
                loss = nn.functional.mse_loss(model(x), y) / many
                loss.backward()
                if (number + 1) % many == 0:
                    opt.step()
                    opt.zero_grad()
            assert job.step == STEPS
            return outcome(job, model, opt, [])

    found = run(world, rank_main, seed=world)[0]
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def by_torch(world: int, many: int, optimizer: str) -> Outcome:
    """One process: of every rank the sum of its `many` gradients, then those of all ranks along the tree, then the mean."""
    shoal.seed(SEED, 0)
    model = Plain()
    shoal.seed(SEED, 0)
    opt = OPTIMIZERS[optimizer](model)
    x, y = samples(BATCH * many * world * STEPS).tensors
    for step in range(STEPS):
        trees: dict[str, Tree[Tensor]] = {n: Tree(world, lambda a, b: a + b) for n, _ in model.named_parameters()}
        for rank in range(world):
            model.zero_grad()
            for k in range(many):
                everything(mix("more", SEED, step, str(rank), k)) if k else shoal.seed(SEED, step, rank)
                batch = (step * many + k) * world + rank
                rows = slice(batch * BATCH, (batch + 1) * BATCH)
                (nn.functional.mse_loss(model(x[rows]), y[rows]) / many).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    trees[name].put_leaf(rank, p.grad)
        for name, p in model.named_parameters():
            if trees[name].complete:
                p.grad = trees[name].take() / world + 0.0
        opt.step()
        opt.zero_grad()
    return Outcome(digest(dict(model.state_dict())), state_digest(opt.state_dict()), ())


@pytest.mark.every(4)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("many", [2, 5])
@pytest.mark.parametrize(("name", "world", "ranks_per_copy"), GRID)
def test_the_same_sums_as_plain_torch(
    name: str, world: int, ranks_per_copy: int | None, many: int, optimizer: str
) -> None:
    strategy = Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy)
    assert by_shoal(world, strategy, many, optimizer) == by_torch(world, many, optimizer)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_model_with_everything(name: str, world: int) -> None:
    """Its buffers are the mean over leaves: the same under every strategy at one world size, with overlap and without."""
    want = everything_under_ddp(world)
    assert by_shoal(world, name, 3, "adamw", Everything) == want
    assert by_shoal(world, name, 3, "adamw", Everything, overlap=False) == want


@cache
def everything_under_ddp(world: int) -> Outcome:
    return by_shoal(world, "ddp", 3, "adamw", Everything)


def test_it_can_fail() -> None:
    assert by_torch(2, 2, "sgd") != by_torch(2, 5, "sgd")
    assert by_torch(2, 2, "sgd") != by_torch(3, 2, "sgd")
