"""Loaders hand out the same leaves whatever the world size, workers, or interruptions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

import shoal
from shoal.comm.threads import run
from shoal.errors import BatchError, OrderError
from shoal.strategy import Strategy
from tests.engine.test_models import Stack
from tests.engine.trials import PLACES, Numbers, sgd
from tests.equivalence.models import Everything, adamw, outcome, samples

Steps = list[list[list[int]]]
"""Per step, per leaf, the samples."""


def handed_out(
    world: int, leaves: int, make: Callable[[shoal.Job], Iterable[Tensor]], epochs: int = 2, strategy: str = "ddp"
) -> Steps:
    """What all ranks are handed, put together again."""

    def rank_main(_rank: int) -> dict[tuple[int, int], list[int]]:
        with shoal.init(strategy, leaves=leaves, run_dir="none", seed=3) as job:
            loader = make(job)
            found: dict[tuple[int, int], list[int]] = {}
            for epoch in range(epochs):
                count = 0
                for batch in loader:
                    count += 1
                    handed = job._feed.handed
                    if handed.leaf is not None:
                        found[epoch * 1000 + loader.next_step, handed.leaf] = batch.tolist()
                assert epoch or count == len(loader)
            return found

    together: dict[tuple[int, int], list[int]] = {}
    for found in run(world, rank_main):
        assert not together.keys() & found.keys()
        together |= found
    steps = sorted({step for step, _ in together})
    return [[together[s, leaf] for s_, leaf in sorted(together) if s_ == s] for s in steps]


def of_the_job(count: int, **kw: object) -> Callable[[shoal.Job], Iterable[Tensor]]:
    return lambda job: job.loader(Numbers(count), **kw)


def prepared(make: Callable[[], DataLoader[int]]) -> Callable[[shoal.Job], Iterable[Tensor]]:
    def wrap(job: shoal.Job) -> Iterable[Tensor]:
        model = nn.Linear(1, 1)
        return job.prepare(model, sgd(model), make())[2]

    return wrap


class Pairs(BatchSampler):
    """The user's own: neighbours from a list that is new in every epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(10).tolist()
        yield from ([2 * i, 2 * i + 1] for i in order)

    def __len__(self) -> int:
        return 10


LOADERS: dict[str, Callable[[shoal.Job], Iterable[Tensor]]] = {
    "of the job": of_the_job(50, global_batch=12),
    "in order": of_the_job(50, global_batch=12, shuffle=False),
    "full steps only": of_the_job(50, global_batch=12, drop_last=True),
    "fewer samples than leaves": of_the_job(3, global_batch=12),
    "shuffled": prepared(lambda: DataLoader(Numbers(50), batch_size=3, shuffle=True)),
    "a generator of its own": prepared(
        lambda: DataLoader(Numbers(50), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(8))
    ),
    "last dropped": prepared(lambda: DataLoader(Numbers(50), batch_size=3, drop_last=True)),
    "a sampler": prepared(
        lambda: DataLoader(Numbers(50), batch_size=3, sampler=RandomSampler(range(50), num_samples=20))
    ),
    "a batch sampler": prepared(lambda: DataLoader(Numbers(20), batch_sampler=Pairs())),
    "a distributed sampler": prepared(
        lambda: DataLoader(Numbers(50), batch_size=3, sampler=DistributedSampler(Numbers(50), 1, 0))
    ),
}


@pytest.mark.parametrize("leaves", [1, 4, 6])
@pytest.mark.parametrize("name", LOADERS)
def test_the_same_leaves_whatever_the_world(name: str, leaves: int) -> None:
    want = handed_out(1, leaves, LOADERS[name])
    for world, strategy in [(2, "ddp"), (3, "zero2"), (4, "zero3")]:
        assert handed_out(world, leaves, LOADERS[name], strategy=strategy) == want
    first, second = want[: len(want) // 2], want[len(want) // 2 :]
    if name in ("in order", "last dropped"):
        assert first == second
    elif name != "fewer samples than leaves":
        assert first != second, "a new order every epoch"


def test_every_sample_once_an_epoch() -> None:
    for name in ("of the job", "shuffled", "a distributed sampler", "a batch sampler"):
        steps = handed_out(3, 4, LOADERS[name], epochs=1)
        flat = [i for step in steps for leaf in step for i in leaf]
        assert sorted(flat) == list(range(len(flat))), name
        assert flat != sorted(flat), name


def test_scripts_may_look_at_the_sampler_and_call_set_epoch() -> None:
    with shoal.init(run_dir="none", device="cpu") as job:
        model = torch.nn.Linear(1, 1)
        source = DataLoader(Numbers(8), batch_size=4, sampler=DistributedSampler(Numbers(8), 1, 0))
        _, _, loader = job.prepare(model, torch.optim.SGD(model.parameters()), source)
        assert (loader.batch_size, loader.dataset) == (4, source.dataset)
        assert isinstance(loader.sampler, DistributedSampler)
        loader.sampler.set_epoch(3)


def test_a_distributed_sampler_is_taken_out(capsys: pytest.CaptureFixture[str]) -> None:
    handed_out(2, 2, LOADERS["a distributed sampler"], epochs=1)
    assert "took the DistributedSampler out of the loader: batches are counted out by leaf" in capsys.readouterr().err


def test_steps_leaves_and_weights() -> None:
    """14 samples, 12 a step, 3 a leaf: the second step has one leaf of 2 samples, which weighs 2/3."""

    def rank_main(_rank: int) -> list[tuple[int | None, float, int]]:
        with shoal.init("ddp", leaves=4, run_dir="none") as job:
            loader = job.loader(Numbers(14), global_batch=12, shuffle=False)
            return [(h.leaf, h.weight, len(b)) for b in loader for h in [job._feed.handed]]

    assert run(2, rank_main) == [[(0, 1.0, 3), (1, 1.0, 3), (0, 2 / 3, 2)], [(2, 1.0, 3), (3, 1.0, 3), (None, 0.0, 2)]]


class Augmented(Dataset[Tensor]):
    """Every sample is drawn with all generators that people use."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()])


@pytest.mark.parametrize("of_job", [True, False])
def test_workers_change_no_numbers(of_job: bool) -> None:
    def draw(world: int, workers: int) -> list[Tensor]:
        def rank_main(_rank: int) -> dict[tuple[int, int | None], Tensor]:
            with shoal.init("ddp", leaves=2, run_dir="none") as job:
                if of_job:
                    loader = job.loader(Augmented(), global_batch=6, workers=workers)
                else:
                    model = nn.Linear(1, 1)
                    source = DataLoader(Augmented(), batch_size=3, shuffle=True, num_workers=workers)
                    loader = job.prepare(model, sgd(model), source)[2]
                found = [(b, torch.rand(1)) for _ in range(2) for b in loader]
                return [torch.cat([b.flatten(), after]) for b, after in found]

        return run(world, rank_main)[0]

    want = draw(1, 0)
    for got, value in zip(draw(1, 2), want, strict=True):
        assert torch.equal(got, value)
    assert torch.equal(draw(2, 0)[0], want[0])
    assert not torch.equal(want[0], want[2])


def test_collation_and_other_settings_stay() -> None:
    def rank_main(_rank: int) -> list[object]:
        with shoal.init("ddp", run_dir="none") as job:
            model = nn.Linear(1, 1)
            source = DataLoader(Numbers(4), batch_size=2, collate_fn=lambda x: {"sum": sum(x)})
            _, _, loader = job.prepare(model, sgd(model), source)
            assert loader.dataset is source.dataset
            own = job.loader(Numbers(4), global_batch=2, shuffle=False, collate_fn=lambda x: str(x))
            return [*loader, *own]

    assert run(1, rank_main) == [[{"sum": 1}, {"sum": 5}, "[0, 1]", "[2, 3]"]]


# -------------------------------------------------------------------- loops inside loops, loops that are left


def test_a_loop_that_is_left_is_over() -> None:
    """The next one begins the next epoch; its position is where it stopped."""

    def rank_main(_rank: int) -> list[object]:
        with shoal.init("ddp", run_dir="none") as job:
            loader = job.loader(Numbers(6), global_batch=2, shuffle=False)
            found: list[object] = []
            for batch in loader:
                found.append(batch.tolist())
                if len(found) == 2:
                    break
            found.append(loader.position())
            found += [b.tolist() for b in loader]
            found.append(loader.position())
            return found

    left, over = {"epoch": 0, "step": 2}, {"epoch": 2, "step": 0}
    assert run(1, rank_main) == [[[0, 1], [2, 3], left, [0, 1], [2, 3], [4, 5], over]]


@pytest.mark.parametrize("when", ["before forward", "before backward", "after step"])
@pytest.mark.parametrize("place", PLACES)
def test_an_evaluation_loader_inside_a_training_loop(place: str, when: str) -> None:
    """Its batches are no leaves of the step: weights, turns and random numbers of the outer loop stay as they were."""
    world, strategy = PLACES[place]

    def program(evaluates: bool, strategy: str | Strategy = "ddp") -> Callable[[int], object]:
        def rank_main(_rank: int) -> object:
            with shoal.init(strategy, leaves=4, run_dir="none", device="cpu") as job:
                model = Everything()
                model, optimizer = job.prepare(model, adamw(model))
                loader = job.loader(samples(), global_batch=24)
                other = job.loader(samples(23), global_batch=8)
                means: list[list[float]] = []

                def evaluate(now: str) -> None:
                    if now != when or not evaluates:
                        return
                    model.eval()
                    with torch.no_grad():
                        values = [nn.functional.mse_loss(model(x), y) for x, y in other]
                        if when == "after step":
                            values = [job.mean(nn.functional.mse_loss(model(x), y)) for x, y in other]
                        for _ in other:
                            break
                    model.train()
                    means.append([v for v in values if v is not None])

                losses: list[float] = []
                for x, y in loader:
                    evaluate("before forward")
                    loss = nn.functional.mse_loss(model(x), y)
                    if when != "before backward" or job.strategy.shard < 3:
                        evaluate("before backward")
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    value = job.mean(loss.detach())
                    losses += [] if value is None else [value]
                    if job.stepped:
                        evaluate("after step")
                return outcome(job, model, optimizer, losses), means

        return rank_main

    (want, _), (same, alone) = run(1, program(False))[0], run(1, program(True))[0]
    assert same == want
    got, together = run(world, program(True, strategy))[0]
    assert got == want
    if when == "after step":
        assert together == alone


# -------------------------------------------------------------------- refusals


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(3)


REFUSED: dict[str, tuple[Callable[[shoal.Job], object], str]] = {
    "iterable": (lambda job: job.loader(Stream(), global_batch=4), "whose samples have no numbers to count out"),
    "no batches": (prepared(lambda: DataLoader(Numbers(3), batch_size=None)), "the loader has batch_size=None"),
    "does not divide": (
        of_the_job(9, global_batch=6),
        "global_batch=6 does not divide into leaves=4 equal micro-batches",
    ),
    "too few": (of_the_job(9, global_batch=3), "global_batch=4 or 4"),
    "nothing": (of_the_job(9, global_batch=0), "global_batch=0 does not divide"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, text = REFUSED[name]

    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", leaves=4, run_dir="none") as job:
            make(job)

    with pytest.raises(BatchError) as e:
        run(1, rank_main)
    assert text in str(e.value)
    assert "try:" in str(e.value)


def test_global_batch_errors_name_the_neighbours() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", leaves=4, run_dir="none") as job:
            job.loader(Numbers(9), global_batch=10)

    with pytest.raises(BatchError) as e:
        run(1, rank_main)
    assert "leaves=4 is the strategy's, or the world at first start" in str(e.value)
    assert "global_batch=8 or 12, or leaves= a divisor of 10" in str(e.value)


def test_a_step_for_every_batch() -> None:
    """A loop that takes two batches per `optimizer.step()` from a loader with `leaves=` is told."""

    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", leaves=4, run_dir="none") as job:
            model = Stack()
            model, optimizer = job.prepare(model, sgd(model))
            for n, x in enumerate(job.loader(TensorDataset(torch.randn(16, 5)), global_batch=8)):
                model(x[0]).sum().backward()
                if n % 2:
                    optimizer.step()

    with pytest.raises(OrderError) as e:
        run(2, rank_main)
    assert "the loader handed out leaf" in str(e.value)
    assert "call optimizer.step() after every batch" in str(e.value)


@pytest.mark.parametrize(
    ("batches", "said"), [(1, "a leaf is one batch of the loader"), (2, "a leaf is the 2 batches")]
)
def test_a_line_says_what_a_leaf_is(batches: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, after the first step, on rank 0."""

    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", overlap=False, run_dir="none") as job:
            model = Stack()
            source = DataLoader(TensorDataset(torch.randn(16, 5)), batch_size=2)
            model, optimizer, loader = job.prepare(model, sgd(model), source)
            for n, (x,) in enumerate(loader):
                model(x).sum().backward()
                if n % batches == batches - 1:
                    optimizer.step()
                    optimizer.zero_grad()

    run(2, rank_main)
    assert capsys.readouterr().err.count(said) == 1
