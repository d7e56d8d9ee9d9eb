"""`job.mean` averages along the leaf tree, by the leaves' weights, whoever computed them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shoal
from shoal.comm.threads import run
from tests.engine.trials import PLACES, Numbers


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("place", PLACES)
def test_the_mean_over_samples(place: str) -> None:
    """10 samples in steps of 8, 2 a leaf: the mean of leaf means by weight is the mean over samples."""
    world, strategy = PLACES[place]

    def rank_main(_rank: int) -> list[float | None]:
        with shoal.init(strategy, leaves=4, run_dir="none") as job:
            model = nn.Linear(1, 1)
            model, optimizer = job.prepare(model, sgd(model))
            found: list[float | None] = []
            for x in job.loader(Numbers(11), global_batch=8, shuffle=False):
                x = x.float()
                loss = model(x[:, None]).sum() * 0 + x.mean()
                loss.backward()
                optimizer.step()
                found += [job.mean(loss), job.mean(float(x.square().mean()))]  # a loss with its graph, and a number
            return found

    for found in run(world, rank_main):
        values = [v for v in found if v is not None]
        assert values == pytest.approx([sum(range(8)) / 8, sum(i * i for i in range(8)) / 8, 9.0, (64 + 81 + 100) / 3])


def test_only_the_last_leaf_gives_a_mean() -> None:
    def rank_main(_rank: int) -> list[float | None]:
        with shoal.init("ddp", leaves=5, run_dir="none") as job:
            return [job.mean(float(n)) for n in job.loader(Numbers(5), global_batch=5, shuffle=False)]

    assert run(2, rank_main) == [[None, None, 2.0], [None, 2.0]]


def test_a_leaf_of_weight_zero_is_ignored_even_if_nan() -> None:
    def rank_main(rank: int) -> float | None:
        with shoal.init("zero2", run_dir="none") as job:
            model = nn.Linear(1, 1)
            model, optimizer = job.prepare(model, sgd(model))
            out = model(torch.ones(1, 1))
            job.weight(0 if rank == 1 else 1, full=1)
            out.sum().backward()
            optimizer.step()
            return job.mean(float("nan") if rank == 1 else rank)

    assert run(3, rank_main) == [1.0, 1.0, 1.0]


def test_ranks_without_a_leaf_are_ignored() -> None:
    """Two leaves for three ranks: the third computes a batch that counts for nothing, and hears the mean."""

    def rank_main(_rank: int) -> float | None:
        with shoal.init("ddp", leaves=2, run_dir="none") as job:
            return [job.mean(float(n)) for n in job.loader(Numbers(2), global_batch=2, shuffle=False)][-1]

    assert run(3, rank_main) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("prepared", [True, False])
def test_outside_of_all_leaves_every_rank_counts_once(prepared: bool) -> None:
    def rank_main(rank: int) -> list[float | None]:
        with shoal.init("zero3", leaves=4, run_dir="none") as job:
            if prepared:
                model = nn.Linear(1, 1)
                model, optimizer = job.prepare(model, sgd(model))
                for x in job.loader(Numbers(4), global_batch=4):
                    model(x[:, None].float()).sum().backward()
                    optimizer.step()
            return [job.mean(rank), job.mean(torch.tensor(2 * rank))]

    assert run(3, rank_main) == [[1.0, 2.0]] * 3


def test_the_same_bits_for_every_world() -> None:
    def values(world: int) -> list[float]:
        def rank_main(_rank: int) -> list[float]:
            with shoal.init("ddp", leaves=6, run_dir="none") as job:
                loader = job.loader(Numbers(100), global_batch=12)
                return [m for n in loader if (m := job.mean(1 / (n.double() + 1).mean())) is not None]

        return run(world, rank_main)[0]

    for world in (2, 3, 4):
        assert values(world) == values(1)
