"""Random augmentation has the same bits with 0, 2 and 5 loader workers, at every world size."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import shoal
from shoal.comm.threads import run

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors

Drawn = dict[tuple[int, int, int], list[float]]
"""By (epoch, step, leaf) what a batch holds, and a number that the loop draws after it."""


def augmented(number: int) -> Tensor:
    """A sample with noise of all generators that people use."""
    return torch.tensor([number, torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)


class Images(Dataset[Tensor]):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Tensor:
        return augmented(index)


class Stream(IterableDataset[Tensor]):
    """Divides itself among loader workers, as torch asks for, and shuffles."""

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        order = list(range(23))
        random.shuffle(order)
        for number in order[info.id :: info.num_workers] if info else order:
            yield augmented(number)


class Careless(Stream):
    """Does not: with torch alone every worker would give all of it."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from (augmented(number) for number in range(23))


def noisy(batch: list[Tensor]) -> Tensor:
    """Collation draws, too."""
    return torch.stack(batch) + torch.rand(()).item()


def prepared(job: shoal.Job, source: DataLoader[Tensor]) -> Iterable[Tensor]:
    model = nn.Linear(1, 1)
    return job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), source)[2]


LOADERS: dict[str, Callable[[shoal.Job, int], Iterable[Tensor]]] = {
    "prepared": lambda job, n: prepared(job, DataLoader(Images(), batch_size=3, shuffle=True, num_workers=n)),
    "prepared, collated": lambda job, n: prepared(
        job, DataLoader(Images(), batch_size=3, shuffle=True, num_workers=n, collate_fn=noisy)
    ),
    "of the job": lambda job, n: job.loader(Images(), global_batch=12, workers=n),
    "of the job, by key": lambda job, n: job.loader(
        Images(), global_batch=12, workers=n, partition="key", key=[k % 5 for k in range(23)]
    ),
    "read through": lambda job, n: prepared(job, DataLoader(Stream(), batch_size=3, num_workers=n)),
    "read through, collated": lambda job, n: prepared(
        job, DataLoader(Stream(), batch_size=3, num_workers=n, collate_fn=noisy)
    ),
    "read through, not divided": lambda job, n: prepared(job, DataLoader(Careless(), batch_size=3, num_workers=n)),
}  # fmt: skip


def drawn(name: str, world: int, workers: int) -> Drawn:
    def rank_main(_rank: int) -> Drawn:
        with shoal.init("ddp", leaves=4, run_dir="none", device="cpu") as job:
            loader = LOADERS[name](job, workers)
            found: Drawn = {}
            for epoch in range(2):
                for batch in loader:
                    now = job._feed.handed
                    if now.leaf is not None:
                        found[epoch, loader.next_step, now.leaf] = [*batch.flatten().tolist(), torch.rand(()).item()]
            return found

    together: Drawn = {}
    for found in run(world, rank_main, seed=world):
        assert not together.keys() & found.keys()
        together |= found
    return together


@cache
def alone(name: str) -> Drawn:
    return drawn(name, 1, 0)


@pytest.mark.every(3)
@pytest.mark.parametrize("workers", [0, 2, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", LOADERS)
def test_the_same_bits(name: str, world: int, workers: int) -> None:
    assert drawn(name, world, workers) == alone(name)


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_drawn_differs(name: str) -> None:
    """From sample to sample and from epoch to epoch, so that the rows above can fail."""
    noise = [value for batch in alone(name).values() for value in batch[1:-1:4]]
    assert len(set(noise)) == len(noise) >= 46


def test_only_one_worker_reads_through(capsys: pytest.CaptureFixture[str]) -> None:
    drawn("read through", 2, 5)
    told = capsys.readouterr().err
    assert told.count("a set that can only be read through is read by one loader worker, not 5") == 1


def test_evaluation_reads_each_sample_once() -> None:
    """Also with several workers of a set that does not divide itself."""

    def rank_main(_rank: int) -> tuple[int, float]:
        with shoal.init("ddp", run_dir="none", device="cpu") as job:
            model = nn.Linear(1, 1)
            job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            found = []
            for workers in (0, 2):
                loader = DataLoader(Careless(), batch_size=3, num_workers=workers)
                found.append(
                    job.evaluate(model, loader, {"noise": nn.functional.mse_loss}, predict=lambda _m, b: (b, 0 * b))
                )
            assert found[0] == found[1]
            return found[0].samples, found[0]["noise"]

    results = [*run(1, rank_main), *run(2, rank_main), *run(3, rank_main)]
    assert {r[0] for r in results} == {23}
    assert len(set(results)) == 1
