"""Models on the meta device: values block by block, the same under every strategy and in every world."""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.errors import ModelError
from shoal.strategy import Strategy
from tests.engine.trials import PLACES, Numbers, assert_bits, inputs
from tests.pool import Pool

State = dict[str, Tensor]


class Net(nn.Module):
    """Tied, frozen, normalised; a module whose parameters lie in two units; buffers without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 70)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(70, 90), nn.BatchNorm1d(90), nn.Linear(90, 70)) for _ in range(3)
        )
        self.blocks[1][0].bias.requires_grad_(False)
        self.steps = Steps()
        self.out = nn.Linear(70, 30)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(self.steps(x))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(70.0), persistent=False)

    def reset_parameters(self) -> None:
        self.table.copy_(torch.arange(70.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.to(x.dtype) / 100


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)


def trainer(
    strategy: str | Strategy, *, fill: Callable[[nn.Module], None] | None = None, **settings: object
) -> Callable[[int], tuple[State, State]]:
    def rank_main(_rank: int) -> tuple[State, State]:
        with shoal.init(strategy, leaves=4, seed=5, run_dir="none", **settings) as job:
            with torch.device("meta"):
                model = Net()
            model, optimizer = job.prepare(model, adamw(model), fill=fill)
            start = job.state_dict(model)
            for number in job.loader(Numbers(8), global_batch=4, shuffle=False):
                words = torch.randint(30, (6,), generator=torch.Generator().manual_seed(int(number)))
                nn.functional.cross_entropy(model(words), words.roll(1)).backward()
                optimizer.step()
                optimizer.zero_grad()
            return start, job.state_dict(model)

    return rank_main


@cache
def alone(precision: str) -> tuple[State, State]:
    return run(1, trainer("ddp", precision=precision))[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", PLACES)
def test_filled_alike_everywhere(place: str, precision: str) -> None:
    world, strategy = PLACES[place]
    for got, want in zip(run(world, trainer(strategy, precision=precision))[0], alone(precision), strict=True):
        assert list(got) == list(want)
        for key, value in want.items():
            assert_bits(got[key], value, key)


def test_values_are_those_of_reset_parameters() -> None:
    start, _ = alone("float32")
    assert torch.equal(start["out.weight"], start["words.weight"])
    assert 0.9 < start["words.weight"].std().item() < 1.1
    assert 0 < start["blocks.0.0.weight"].abs().max().item() <= 70**-0.5
    assert torch.equal(start["blocks.2.1.running_var"], torch.ones(90))
    assert not torch.equal(start["blocks.0.0.weight"], start["blocks.1.0.weight"])


def test_a_function_of_ones_own() -> None:
    def fill(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            p.normal_(std=0.02)
        if isinstance(module, nn.BatchNorm1d | Steps):
            module.reset_parameters()

    (start, end), (start2, end2) = run(1, trainer("zero3", fill=fill))[0], run(3, trainer("zero3", fill=fill))[0]
    assert 0.015 < start["blocks.0.0.bias"].std().item() < 0.025
    for key in start:
        assert_bits(start2[key], start[key], key)
        assert_bits(end2[key], end[key], key)


def test_a_checkpoint_fills_it(tmp_path: Path) -> None:
    def rank_main(_rank: int) -> State:
        with shoal.init("zero3", run_dir="none") as job:
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(9, 99), nn.Linear(99, 9))
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
            if any(tmp_path.iterdir()):
                job.load(tmp_path)
            else:
                model(inputs(0, job.rank, 2, 9)).sum().backward()
                optimizer.step()
                job.save(tmp_path)
            return job.state_dict(model)

    saved, loaded = run(2, rank_main)[0], run(3, rank_main)[0]
    for key, value in saved.items():
        assert_bits(loaded[key], value, key)


def test_a_module_that_cannot_fill_itself() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3))

    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", run_dir="none") as job:
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(3, 3), Bare())
            job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))

    with pytest.raises(ModelError, match=r"'1', a Bare, is on the meta device and has no reset_parameters\(\)"):
        run(1, rank_main)


LAYERS, WIDTH = 60, 4096
"""60 x 4096 x 4096: 1.007e9 parameters."""


def peak_of_filling(strategy: str) -> tuple[int, int, int]:
    """In bytes: the peak of this process above what it had before, its shard, the largest unit."""
    with shoal.init(strategy, run_dir="none") as job:
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # the first one imports 70 MiB of torch
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        job.prepare(model, optimizer)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        unit = 4 * WIDTH * WIDTH
        return after - before, LAYERS * unit // job.world_size, unit


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_billion_parameters_on_four_ranks(pool: Pool) -> None:
    """A rank never holds more than its shard and the largest unit."""
    for rank, (peak, shard, unit) in enumerate(pool.run(peak_of_filling, "zero3", world=4, timeout=280)):
        print(f"rank {rank}: peak {peak / 2**20:.0f} MiB, shard {shard / 2**20:.0f} MiB, unit {unit / 2**20:.0f} MiB")
        assert peak < shard + 1.1 * unit + 2**25
