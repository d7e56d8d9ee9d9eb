"""torch's tensor parallelism inside a cell, data parallelism and ZeRO across cells: 2 x 2 real processes."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shoal
from shoal.errors import OptimizerError, OrderError, StrategyError
from shoal.optim import LAMB
from shoal.strategy import Shard, Strategy
from tests.engine.trials import Numbers, inputs
from tests.pool import Pool

STEPS, LEAVES = 4, 4


class Block(nn.Module):
    """A feed-forward block with a norm whose parameters are on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 192), nn.Linear(192, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def loss_of(model: nn.Module, number: int) -> Tensor:
    return model(inputs(*divmod(number, LEAVES), 6, 24)).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(strategy: Strategy, optimizer: object = adamw) -> tuple[dict[str, Tensor], list[float | None]]:
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    try:
        cells = int(os.environ["WORLD_SIZE"]) // strategy.tensor
        mesh = init_device_mesh("cpu", (cells, strategy.tensor), mesh_dim_names=("data", "tensor"))
        with shoal.init(strategy, leaves=LEAVES, run_dir="none") as job:
            model = Net()
            for block in model.blocks:
                parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            model, opt = job.prepare(model, optimizer(model))
            norms: list[float | None] = []
            for number in job.loader(Numbers(STEPS * LEAVES), global_batch=LEAVES, shuffle=False):
                loss_of(model, int(number)).backward()
                norms.append(job.clip_grad_norm(0.5))
                opt.step()
                opt.zero_grad()
            with pytest.raises(OrderError, match="boxes of DTensors"):
                job.state_dict(model)
            state: dict[str, Tensor] = {}
            for name, p in model.named_parameters():
                state[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            return state, [n for n in norms if n is not None]
    finally:
        dist.destroy_process_group()


def run_fresh(world: int, function: object, *arguments: object) -> list[object]:
    """In processes of their own: DTensor remembers process groups that are gone."""
    pool = Pool()
    try:
        return pool.run(function, *arguments, world=world, timeout=60)
    finally:
        pool.close()


def refused(optimizer: object) -> str:
    with pytest.raises(OptimizerError) as e:
        train(Strategy(tensor=2), optimizer)
    return str(e.value)


def plain() -> tuple[dict[str, Tensor], list[float]]:
    """One process without tensor parallelism, the mean of all leaves at once."""
    shoal.seed(0, 0)
    model = Net()
    opt = adamw(model)
    norms: list[float] = []
    for step in range(STEPS):
        sum(loss_of(model, LEAVES * step + leaf) / LEAVES for leaf in range(LEAVES)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        opt.step()
        opt.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}, norms


@cache
def one_cell() -> list[object]:
    return run_fresh(2, train, Strategy(tensor=2))


SLOW = pytest.mark.slow
SHARDS = [Shard.GRADIENTS, pytest.param(Shard.NOTHING, marks=SLOW), pytest.param(Shard.OPTIMIZER, marks=SLOW)]


@pytest.mark.parametrize("shard", SHARDS)
def test_two_cells_of_two_are_one_cell_of_two(shard: Shard) -> None:
    one = one_cell()
    four = run_fresh(4, train, Strategy(shard=shard, tensor=2))
    want, norms = plain()
    assert one[0][1] == pytest.approx(norms, rel=1e-5), "the norm counts what is spread once, and what is shared once"
    for state, found in [*one, *four]:
        assert found == one[0][1]
        for name, value in one[0][0].items():
            assert torch.equal(state[name], value), name
            assert torch.allclose(value, want[name], atol=2e-6), name


def lamb(model: nn.Module) -> torch.optim.Optimizer:
    return LAMB(model.parameters())


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])


@pytest.mark.parametrize("optimizer", [lamb, pytest.param(muon, marks=SLOW)])
def test_optimizers_that_read_whole_parameters_are_refused(optimizer: object) -> None:
    for text in run_fresh(2, refused, optimizer):
        assert "reads whole parameters, and 'blocks.0.up.weight' is spread over a cell" in text


def test_cells_that_do_not_fit() -> None:
    with pytest.raises(StrategyError, match="tensor=2 with shard=PARAMETERS"):
        Strategy(shard=Shard.PARAMETERS, tensor=2)
    with pytest.raises(StrategyError, match="a world of 3 ranks has no cells of 2"):
        Strategy(tensor=2).settled(3, 3)
