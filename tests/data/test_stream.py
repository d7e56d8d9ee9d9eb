"""Data sets that can only be read through: the same bits at every world size, each sample once an epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import shoal
from shoal.comm.threads import run
from shoal.errors import DivergedError
from tests.equivalence.models import Everything, Outcome, adamw, outcome, samples


class Files(IterableDataset[tuple[Tensor, Tensor]]):
    """Rows of several files, whose order is drawn, with noise on each row."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = samples().tensors
        files = [range(i, min(i + 9, 56)) for i in range(0, 56, 9)]
        random.shuffle(files)
        for file in files:
            for row in file:
                yield x[row] + 0.1 * torch.randn(()), y[row]


class Numbers(IterableDataset[int]):
    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.first + 23))


@cache
def trained(world: int, strategy: str, epochs: int = 2) -> Outcome | None:
    """56 rows in batches of 6, 4 leaves a step: the last batch is short, and so is the last step."""

    def rank_main(_rank: int) -> Outcome | None:
        with shoal.init(strategy, leaves=4, run_dir="none", device="cpu") as job:
            model = Everything()
            model, optimizer, loader = job.prepare(model, adamw(model), DataLoader(Files(), batch_size=6))
            losses: list[float] = []
            for _ in range(epochs):
                for x, y in loader:
                    loss = nn.functional.mse_loss(model(x), y)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    value = job.mean(loss)
                    losses += [] if value is None else [value]
            assert loader.dataset.epoch == epochs - 1
            return outcome(job, model, optimizer, losses)

    return run(world, rank_main, seed=world)[0]


@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (3, "zero3")])
def test_equals_one_process(world: int, strategy: str) -> None:
    assert trained(world, strategy) == trained(1, "ddp")
    assert trained(1, "ddp", epochs=1) != trained(1, "ddp")


def read(job: shoal.Job, first: int = 0, stop: int | None = None, path: Path | None = None) -> list[int]:
    """The numbers of this rank's leaves."""
    model = nn.Linear(1, 1)
    source = DataLoader(Numbers(first), batch_size=2)
    model, optimizer, loader = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), source)
    if path is not None and stop is None:
        job.load(path)
    found: list[int] = []
    for numbers in loader:
        if job._feed.handed.leaf is not None:
            found += numbers.tolist()
        model(numbers.float()[:, None]).sum().backward()
        optimizer.step()
        if job.stepped and job.step == stop:
            job.save(path)
            break
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_each_sample_once(world: int) -> None:
    def rank_main(_rank: int) -> list[int]:
        with shoal.init("ddp", leaves=3, run_dir="none", device="cpu") as job:
            return read(job)

    assert sorted(n for mine in run(world, rank_main) for n in mine) == list(range(23))


def test_going_on_in_the_middle(tmp_path: Path) -> None:
    """Two steps of three leaves on two ranks, the rest on three."""

    def rank_main(stop: int | None) -> list[int]:
        with shoal.init("ddp", leaves=3, run_dir="none", device="cpu") as job:
            return read(job, stop=stop, path=tmp_path)

    first = [n for mine in run(2, lambda _rank: rank_main(2)) for n in mine]
    rest = [n for mine in run(3, lambda _rank: rank_main(None)) for n in mine]
    assert sorted(first) == list(range(12))
    assert sorted(rest) == list(range(12, 23))


@pytest.mark.parametrize("world", [2, 3])
def test_what_the_set_draws_is_drawn_alike(world: int) -> None:
    """Also in a loop that trains nothing, where ranks draw numbers of their leaves between two steps of the stream."""

    def rank_main(_rank: int) -> list[float]:
        with shoal.init("ddp", leaves=3, run_dir="none", device="cpu") as job:
            model = nn.Linear(1, 1)
            source = DataLoader(Files(), batch_size=6)
            _, _, loader = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), source)
            return [x.sum().item() for x, _ in loader if job._feed.handed.leaf is not None]

    alone = run(1, rank_main)[0]
    assert sorted(v for mine in run(world, rank_main) for v in mine) == sorted(alone)


def test_a_set_that_divides_itself_is_named() -> None:
    def rank_main(rank: int) -> list[int]:
        with shoal.init("ddp", leaves=2, run_dir="none", device="cpu") as job:
            return read(job, first=100 * rank)

    with pytest.raises(DivergedError, match=r"ranks read different batches[\s\S]*divides itself by rank"):
        run(2, rank_main)


def test_it_has_no_length() -> None:
    with shoal.init("ddp", run_dir="none", device="cpu") as job:
        model = nn.Linear(1, 1)
        _, _, loader = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(Numbers()))
        with pytest.raises(TypeError, match="can only be read through has no length"):
            len(loader)
        found = job.evaluate(
            nn.Identity(), loader, {"n": nn.functional.mse_loss}, predict=lambda _m, b: (b.float(), b.float())
        )
        assert found.samples == 23
