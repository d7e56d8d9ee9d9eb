"""Buffers: every leaf starts from the step's; floating ones are averaged over leaves, others are the last leaf's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.errors import ModelError
from tests.engine.trials import PLACES, Leaf, Numbers, assert_same, inputs, plain, sgd, train


class Normed(nn.Module):
    """Batch norms of two kinds, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 37), nn.BatchNorm1d(37), nn.Dropout(0.2), nn.Linear(37, 11), nn.BatchNorm1d(11, momentum=None)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Counting(nn.Module):
    """Whole numbers, a flag, wide and narrow floats, one not persistent, one shared, one that nothing changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("wide", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("narrow", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("passing", torch.zeros(3), persistent=False)
        self.register_buffer("still", torch.arange(3.0))
        self.register_buffer("nothing", None)
        self.inner = nn.Module()
        self.inner.register_buffer("shared", self.wide)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + self.passing * self.still
        with torch.no_grad():
            self.calls += 1
            self.seen[int(x[0, 0].abs() * 10) % 4] = True
            self.wide += y.mean(0).double()
            self.narrow.copy_(y[0])
            self.passing.lerp_(y[1], 0.3)
        return y


class Replacing(nn.Module):
    """Assigns a new tensor to its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) - self.mean
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y


class Sometimes(nn.Module):
    """Changes its buffer in some leaves only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, change: bool) -> Tensor:
        y = self.linear(x)
        if change:
            self.total += y.detach().mean(0)
            self.count += 1
        return y


def square(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 4, 5)).square().mean()


def some_leaves(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 4, 5), step != 1 and number in (0, 2)).square().mean()


CASES: dict[str, tuple[Callable[[], nn.Module], Leaf]] = {
    "batch norm": (Normed, square),
    "counting": (Counting, square),
    "replacing": (Replacing, square),
    "in some leaves": (Sometimes, some_leaves),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_buffers_by_the_rule(case: str, place: str) -> None:
    make_model, leaf = CASES[case]
    assert_same(train(place, make_model, leaf), plain(make_model, leaf))


@pytest.mark.parametrize("place", PLACES)
def test_one_leaf_keeps_what_it_made(place: str) -> None:
    """A step with one leaf has plain PyTorch's buffers."""
    assert_same(train(place, Normed, square, leaves=1), plain(Normed, square, leaves=1))


@pytest.mark.parametrize("place", PLACES)
def test_what_the_user_changes_between_steps_counts(place: str) -> None:
    """In place, by a new tensor, and by loading a state dict into the module that has the buffer."""

    def each(job: shoal.Job, model: nn.Module, _optimizer: object) -> None:
        norm = model.layers[1]
        if job.step == 1:
            norm.running_mean.fill_(0.5)
        elif job.step == 2:
            norm.running_var = torch.full((37,), 2.0)
        norm.reset_running_stats() if job.step == 3 else None

    want = train((1, "ddp"), Normed, square, each=each, steps=4)
    assert_same(train(place, Normed, square, each=each, steps=4), want)
    assert not torch.equal(
        want.model["layers.1.running_mean"], plain(Normed, square, steps=4).model["layers.1.running_mean"]
    )


@pytest.mark.parametrize("place", PLACES)
def test_weights_and_uneven_leaves(place: str) -> None:
    """14 samples in steps of 12, 3 a leaf: means of buffers are weighted as the gradients are."""
    world, strategy = PLACES[place]

    def program(strategy: object) -> Callable[[int], dict[str, Tensor]]:
        def rank_main(_rank: int) -> dict[str, Tensor]:
            with shoal.init(strategy, leaves=4, run_dir="none", device="cpu") as job:
                model = Normed()
                model, optimizer = job.prepare(model, sgd(model))
                for batch in job.loader(Numbers(14), global_batch=12, shuffle=False):
                    model(torch.stack([inputs(0, int(i), 5) for i in batch])).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                return job.state_dict(model)

        return rank_main

    want, got = run(1, program("ddp"))[0], run(world, program(strategy))[0]
    assert all(torch.equal(got[k], v) for k, v in want.items())
    assert want["layers.1.num_batches_tracked"] == 2


def test_batches_that_count_for_nothing_leave_no_trace() -> None:
    """Three ranks, two leaves: the third rank's forward changes no buffer."""
    got = train((3, "ddp"), Normed, square, leaves=2)
    assert_same(got, plain(Normed, square, leaves=2))


def test_sync_batch_norm_is_refused() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", run_dir="none") as job:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(Normed())
            job.prepare(model, sgd(model))

    with pytest.raises(ModelError) as e:
        run(1, rank_main)
    assert "'layers.1' is a SyncBatchNorm, which mixes samples of several ranks" in str(e.value)
    assert "torch.nn.BatchNorm2d" in str(e.value)
