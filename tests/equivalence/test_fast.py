"""Fast numerics: close to the exact ones under every strategy, equal on all ranks, refused where they cannot be."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.meter import dry_run
from shoal.comm.threads import run
from shoal.strategy import Cut, Shard, Strategy
from tests.engine.trials import Numbers, inputs
from tests.equivalence.test_dry_run import program
from tests.equivalence.test_table import GRID, STRATEGIES
from tests.pool import Pool

LEAVES = 4
WEIGHTS = (1.0, 0.25, 0.0, 0.5)


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a frozen weight between trained ones, and one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(37, 131), nn.Tanh(), nn.Linear(131, 37)) for _ in range(3))
        self.blocks[1][0].weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(9))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Result(NamedTuple):
    """What a rank has at the end: its parameters, which are the steps' gradients as rate and momentum are 1 and 0."""

    whole: dict[str, Tensor]
    said: str
    sent: dict[str, int]


def trained(strategy: str | Strategy, weights: tuple[float, ...] = WEIGHTS, **settings: object) -> Result:
    """One step, then a second one without any weight."""
    with shoal.init(strategy, run_dir="none", device="cpu", **settings) as job:
        model = Odd()
        model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for number in job.loader(Numbers(3 * job.leaves), global_batch=job.leaves, shuffle=False):
            step, leaf = divmod(int(number), job.leaves)
            job.weight(0.0 if step == 1 else weights[leaf % len(weights)], full=1.0)
            model(inputs(step, leaf, 5, 37)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with job.whole(model):
            whole = {name: value.detach().clone() for name, value in model.named_parameters()}
        return Result(whole, job.strategy.numerics, job.traffic)


def on(world: int, strategy: str | Strategy, *, order: int | None = None, **settings: object) -> list[Result]:
    how = {key: bool(settings.pop(key, False)) for key in ("common", "scatters")}
    return run(world, lambda _rank: trained(strategy, **settings), seed=order, **how)


@cache
def exact(leaves: int, precision: str = "float32") -> dict[str, Tensor]:
    return on(1, "ddp", leaves=leaves, precision=precision)[0].whole


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], relative: float = 1e-6) -> None:
    for name, value in want.items():
        apart = (got[name] - value).abs().max() / value.abs().max()
        assert apart <= relative, f"{name}: {apart:g}"


def assert_equal(results: list[Result]) -> None:
    for result in results[1:]:
        for name, value in results[0].whole.items():
            assert torch.equal(result.whole[name], value), name


@pytest.mark.parametrize("scatters", [False, True])
@pytest.mark.parametrize(("name", "world", "ranks_per_copy"), [place for place in GRID if place[1] > 1])
def test_close_to_exact_and_equal_on_all_ranks(
    name: str, world: int, ranks_per_copy: int | None, scatters: bool
) -> None:
    """Leaves of several weights, one of none, and a step without any; more leaves on some ranks than on others."""
    leaves = 6
    strategy = Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy, numerics="fast")
    results = on(world, strategy, leaves=leaves, order=world, scatters=scatters)
    assert_equal(results)
    assert_close(results[0].whole, exact(leaves))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    "settings",
    [{"twig": 2}, {"overlap": False}, {"cut": "parameter"}, {"leaves": 2}, {"precision": "float16"}],
    ids=lambda s: next(iter(s)),
)
def test_beside_every_other_setting(name: str, settings: dict[str, object]) -> None:
    settings = {"leaves": LEAVES} | settings
    results = on(3, name, numerics="fast", **settings)
    assert_equal(results)
    want = exact(int(str(settings["leaves"])), str(settings.get("precision", "float32")))
    assert_close(results[0].whole, want)


def test_the_order_of_sums_is_another() -> None:
    """So that the tests above are seen to run something else: the bits differ, and with the order of ranks they stay."""
    weights = tuple(0.1 + 0.07 * n for n in range(6))
    first, again = (on(3, "zero2", numerics="fast", leaves=6, weights=weights, order=o)[0] for o in (1, 2))
    want = on(1, "ddp", leaves=6, weights=weights)[0].whole
    assert_close(first.whole, want)
    assert any(not torch.equal(first.whole[name], value) for name, value in want.items())
    assert all(torch.equal(first.whole[name], value) for name, value in again.whole.items())


@pytest.mark.parametrize("order", range(4))
def test_who_runs_first_changes_no_order_of_sums(order: int) -> None:
    """Copies of two: what goes across them begins in one order, whoever has finished first inside."""
    strategy = Strategy(shard=Shard.PARAMETERS, ranks_per_copy=2, numerics="fast")
    assert_close(on(4, strategy, leaves=8, order=order)[3].whole, exact(8))


@pytest.mark.parametrize(("name", "ranks_per_copy"), [("ddp", None), ("zero1", None), ("zero3", None), ("zero2", 2)])
def test_bytes_equal_the_dry_run(name: str, ranks_per_copy: int | None) -> None:
    strategy = Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy, numerics="fast")
    world, ours = 4, program(strategy, LEAVES, "float32")
    assert run(world, ours) == [dry_run(rank, world, ours) for rank in range(world)]


# ---------------------------------------------------------------- processes


def apart(strategy: Strategy, carrier: str) -> Result:
    return trained(strategy, leaves=LEAVES, carrier=carrier, timeout=20.0)


@pytest.mark.parametrize(
    ("name", "world", "ranks_per_copy"), [("ddp", 2, None), ("ddp", 3, None), ("zero1", 3, None), ("zero3", 4, 2)]
)
def test_processes_over_gloo(name: str, world: int, ranks_per_copy: int | None, pool: Pool) -> None:
    strategy = Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy, numerics="fast")
    results = pool.run(apart, strategy, "gloo", world=world)
    assert_equal(results)
    assert_close(results[0].whole, exact(LEAVES))


def test_over_shared_memory_fast_is_exact(pool: Pool) -> None:
    results = pool.run(apart, Strategy(shard=Shard.PARAMETERS, numerics="fast"), "shared")
    assert_equal(results)
    assert all(torch.equal(results[0].whole[name], value) for name, value in exact(LEAVES).items())


def killed() -> None:
    """Rank 1 dies in the second step, while rank 0 waits in a sum."""
    with shoal.init("ddp", run_dir="none", carrier="gloo", numerics="fast", timeout=5.0) as job:
        model = Odd()
        model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(3):
            model(inputs(step, job.rank, 5, 37)).square().mean().backward()
            if step == 2 and job.rank == 1:
                os._exit(3)
            optimizer.step()
            optimizer.zero_grad()


def test_a_rank_that_dies_is_named(pool: Pool) -> None:
    first = pool.start(killed).results(15, grace=5)[0]
    assert isinstance(first.exception, shoal.errors.PeerLost), first.error
    assert first.exception.what.startswith("rank 1 is gone; rank 0 was in '")


# ---------------------------------------------------------------- words


def test_the_line_at_start_says_numerics(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    for numerics, common in (("exact", False), ("fast", False), ("fast", True)):
        on(2, "ddp", numerics=numerics, common=common)
        lines += [line.split("cut even, ")[1] for line in capsys.readouterr().err.splitlines() if "cut even" in line]
    assert lines == ["numerics exact", "numerics fast", "numerics fast (exact here: nothing adds up faster)"]


def test_lossy_by_name() -> None:
    assert on(1, Strategy(numerics="fast", cut=Cut.PARAMETER))[0].said == "fast"
    assert on(1, "ddp")[0].said == "exact"
    assert Strategy(numerics="fast").explain().splitlines()[0].endswith("numerics=fast")
