"""The dry run sends what the real run sends, to the byte, by verb, on every rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import shoal
from shoal.comm.meter import dry_run
from shoal.comm.threads import run
from shoal.strategy import Strategy
from tests.equivalence.models import Everything, adamw, samples
from tests.equivalence.test_table import STRATEGIES


def program(strategy: Strategy, leaves: int, precision: str, one_round: str = "0") -> Callable[[int], dict[str, int]]:
    def rank_main(_rank: int) -> dict[str, int]:
        with shoal.init(strategy, leaves=leaves, precision=precision, one_round=one_round, run_dir="none") as job:
            with job.device:  # `.to("meta")` would untie tied weights
                model = Everything()
            model, optimizer = job.prepare(model, adamw(model))
            for x, y in job.loader(samples(), global_batch=24):
                loss = nn.functional.mse_loss(model(x.to(job.device)).float(), y.to(job.device))
                loss.backward()
                job.clip_grad_norm(1.0)
                optimizer.step()
                optimizer.zero_grad()
                job.mean(loss.detach())
        return {verb: n for verb, n in job.traffic.items() if verb != "start"}  # a dry run has no values to compare

    return rank_main


def crossing(strategy: Strategy, leaves: int) -> Callable[[int], tuple[dict[str, int], dict[str, int]]]:
    """What a rank has sent, and what of it to other hosts."""

    def rank_main(_rank: int) -> tuple[dict[str, int], dict[str, int]]:
        with shoal.init(strategy, leaves=leaves, run_dir="none") as job:
            with job.device:
                model = Everything()
            model, optimizer = job.prepare(model, adamw(model))
            for x, y in job.loader(samples(), global_batch=24):
                nn.functional.mse_loss(model(x.to(job.device)), y.to(job.device)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return tuple({verb: n for verb, n in sent.items() if verb != "start"} for sent in (job.traffic, job.crossed))

    return rank_main


@pytest.mark.parametrize(
    ("name", "ranks_per_copy", "ranks_per_host"),
    [(name, None, (2, 2)) for name in STRATEGIES] + [("zero1", None, (2, 1)), ("zero3", 2, (4, 2))],
    ids=str,
)
def test_bytes_between_hosts_equal_the_measured_ones(
    name: str, ranks_per_copy: int | None, ranks_per_host: tuple[int, ...]
) -> None:
    world = sum(ranks_per_host)
    run_on = crossing(Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy), 4)
    measured = run(world, run_on, common=True, ranks_per_host=ranks_per_host)
    alike = {"shared": True, "ranks_per_host": ranks_per_host}
    ranks = range(world)
    assert [dry_run(r, world, run_on, **alike) for r in ranks] == [sent for sent, _ in measured]
    assert [dry_run(r, world, run_on, **alike, crossing=True) for r in ranks] == [away for _, away in measured]


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_crosses_to_another_host_crosses_once(name: str) -> None:
    """Two hosts exchange what two ranks would, however many ranks are on each."""

    def between(ranks_per_host: tuple[int, ...]) -> dict[str, int]:
        world = sum(ranks_per_host)
        each = run(world, crossing(Strategy.named(name), world), common=True, ranks_per_host=ranks_per_host)
        return {verb: sum(away.get(verb, 0) for _, away in each) for verb in ("gather", "reduce", "agree")}

    assert between((2, 2)) == between((1, 1))


@pytest.mark.every(5)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("leaves", [3, 4])
@pytest.mark.parametrize("ranks_per_copy", [None, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_bytes_equal_the_measured_ones(
    name: str, ranks_per_copy: int | None, leaves: int, precision: str, shared: bool
) -> None:
    """Three ranks, or two copies of two; ranks with unequal numbers of leaves among them."""
    if name == "ddp" and ranks_per_copy:
        ranks_per_copy = 1
    strategy = Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy)
    world = 4 if ranks_per_copy == 2 else 3
    measured = run(world, program(strategy, leaves, precision), common=shared)
    predicted = [dry_run(r, world, program(strategy, leaves, precision), shared=shared) for r in range(world)]
    assert predicted == measured
    assert all(sum(m.values()) > 10_000 for m in measured)
    assert all(("gather" in m) != (shared or name == "ddp") for m in measured) or name in ("zero1", "zero2")
