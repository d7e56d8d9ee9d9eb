"""Ranks that do different things are told so by name, and soon."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import shoal
from shoal import base
from shoal.errors import DivergedError, StalledError
from tests.faults.ranks import SLACK, TIMEOUT, net, timed
from tests.pool import Pool


def frozen() -> nn.Module:
    model = net()
    model[0][0].bias.requires_grad_(False)
    return model


def with_buffer(shape: int) -> nn.Module:
    model = net()
    model.register_buffer("scale", torch.ones(shape))
    return model


class Start:
    """What one rank starts with; rank 1's differs in one thing."""

    def __init__(self, **changed: object) -> None:
        self.strategy: object = "zero3"
        self.settings: dict[str, object] = {}
        self.units: list[str] | None = None
        self.make: Callable[[], nn.Module] = net
        self.optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda m: Adam(m.parameters(), lr=0.1)
        vars(self).update(changed)


STARTS: dict[str, tuple[Start, Start, str]] = {
    "strategy": (Start(), Start(strategy="ddp"), "setting strategy is zero3 on rank 0 and ddp on rank 1"),
    "leaves": (Start(), Start(settings={"leaves": 4}), "strategy leaves is 2 on rank 0 and 4 on rank 1"),
    "grid": (
        Start(settings={"ranks_per_copy": 1}),
        Start(settings={"ranks_per_copy": 2}),
        "strategy ranks_per_copy is 1 on rank 0 and 2 on rank 1",
    ),
    "precision": (
        Start(),
        Start(settings={"precision": "bfloat16"}),
        "strategy precision is float32 on rank 0 and bfloat16 on rank 1",
    ),
    "seed": (Start(settings={"seed": 3}), Start(), "setting seed is 3 on rank 0 and 0 on rank 1"),
    "overlap": (Start(), Start(settings={"overlap": False}), "setting overlap is True on rank 0 and False on rank 1"),
    "rounds": (
        Start(settings={"one_round": 0}),
        Start(),
        "setting one_round is 0 on rank 0 and None on rank 1",
    ),
    "shape": (
        Start(),
        Start(make=lambda: nn.Sequential(nn.Linear(65, 64))),
        "parameter '0.0.weight' is (65, 65) float32 on rank 0 and nothing on rank 1",
    ),
    "frozen": (
        Start(make=frozen),
        Start(),
        "parameter '0.0.bias' is (65,) float32, frozen on rank 0 and (65,) float32 on rank 1",
    ),
    "buffer": (
        Start(make=lambda: with_buffer(1)),
        Start(make=lambda: with_buffer(2)),
        "buffer 'scale' is (1,) float32 on rank 0 and (2,) float32 on rank 1",
    ),
    "units": (Start(units=["0"]), Start(units=["0", "1"]), "unit "),
    "optimizer": (
        Start(),
        Start(optimizer=lambda m: SGD(m.parameters(), lr=0.1)),
        "optimizer is Adam on rank 0 and SGD on rank 1",
    ),
    "learning rate": (
        Start(),
        Start(optimizer=lambda m: Adam(m.parameters(), lr=0.2)),
        "optimizer group 0 lr is 0.1 on rank 0 and 0.2 on rank 1",
    ),
    "groups": (
        Start(),
        Start(optimizer=lambda m: Adam([{"params": m[0].parameters()}, {"params": m[1:].parameters()}], lr=0.1)),
        "on rank 0",
    ),
}


def prepare(name: str) -> None:
    with timed():
        start = STARTS[name][int(os.environ["RANK"])]
        with shoal.init(start.strategy, run_dir="none", timeout=TIMEOUT, **start.settings) as job:
            model = start.make()
            job.prepare(model, start.optimizer(model), units=start.units)


@pytest.mark.parametrize("name", STARTS)
def test_ranks_prepare_different_things(name: str, pool: Pool) -> None:
    pool.run(os.getpid)  # they are awake
    begin = time.monotonic()
    for result in pool.start(prepare, name).results(TIMEOUT + SLACK, grace=SLACK):
        error = result.exception
        assert isinstance(error, DivergedError), result.error
        assert error.what.startswith("ranks prepare different things: ")
        assert STARTS[name][2] in error.what
        assert error.cause.startswith("the ranks run different programs, settings or versions")
        assert error.remedy == "start the same program with the same settings on all ranks"
        assert error.at - begin < TIMEOUT  # nobody waited until then


# ---------------------------------------------------------------- in the loop


class Run:
    """A prepared job, and the ways in which rank 1 may go on differently."""

    def __init__(self, strategy: str, folder: str) -> None:
        self.job = shoal.init(strategy, run_dir="none", timeout=TIMEOUT)
        self.folder, self.odd = folder, self.job.rank == 1
        self.model, self.optimizer = self.job.prepare(model := net(), Adam(model.parameters()))

    def steps(self, count: int, *, clip: bool = True) -> None:
        for _ in range(count):
            self.loss = self.model(torch.randn(4, 65)).sum()
            self.loss.backward()
            if clip:
                self.job.clip_grad_norm(1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def one_more(self) -> None:
        self.steps(3 + self.odd)

    def one_fewer(self) -> None:
        self.steps(3 - self.odd)

    def none_at_all(self) -> None:
        self.steps(0 if self.odd else 1)

    def save(self) -> None:
        self.steps(2)
        if self.odd:
            self.job.save(self.folder)
        self.steps(1)

    def load(self) -> None:
        if self.odd:
            self.job.load(self.folder)
        self.steps(1)

    def mean(self) -> None:
        self.steps(2)
        if self.odd:
            self.job.mean(self.loss.detach())
        self.steps(1)

    def state(self) -> None:
        self.steps(2)
        if self.odd:
            self.job.state_dict(self.model)
        self.steps(1)

    def whole(self) -> None:
        self.steps(2)
        if self.odd:
            with self.job.whole(self.model):
                pass
        self.steps(1)

    def clip(self) -> None:
        self.steps(2)
        self.steps(2, clip=self.odd)

    def order(self) -> None:
        self.steps(2)
        if self.odd:
            self.job.mean(1.0)
        self.steps(1)
        if not self.odd:
            self.job.mean(1.0)


def go(strategy: str, what: str, folder: str) -> None:
    with timed():
        run = Run(strategy, folder)
        with run.job:
            (Path(folder) / "done").write_text(str(time.monotonic()))
            getattr(run, what)()


LOOPS = {
    "one_more": {
        "ddp": "rank 0 has finished and closes the job; rank 1 reduces gradients of leaf turn 3",
        "zero3": "rank 0 has finished and closes the job; rank 1 begins leaf turn 3",
    },
    "one_fewer": {
        "ddp": "rank 0 reduces gradients of leaf turn 2; rank 1 has finished and closes the job",
        "zero3": "rank 0 begins leaf turn 2; rank 1 has finished and closes the job",
    },
    "none_at_all": {"zero2": "rank 0 reduces gradients of leaf turn 0; rank 1 has finished and closes the job"},
    "save": {
        "ddp": "rank 0 reduces gradients of leaf turn 2; rank 1 is in job.save at step 2",
        "zero3": "rank 0 begins leaf turn 2; rank 1 is in job.save at step 2",
    },
    "load": {"zero1": "rank 0 reduces gradients of leaf turn 0; rank 1 is in job.load"},
    "mean": {"zero3": "rank 0 begins leaf turn 2; rank 1 is in job.mean of step 2"},
    "state": {"ddp": "rank 0 reduces gradients of leaf turn 2; rank 1 is in job.state_dict"},
    "whole": {"zero2": "rank 0 reduces gradients of leaf turn 2; rank 1 is in job.whole"},
    "clip": {"ddp": "rank 0 reduces gradients of leaf turn 3; rank 1 is in clip_grad_norm of step 2"},
    "order": {"zero3": "rank 0 begins leaf turn 2; rank 1 is in job.mean of step 2"},
}


@pytest.mark.parametrize(("what", "strategy"), [(what, strategy) for what in LOOPS for strategy in LOOPS[what]])
def test_ranks_go_different_ways(what: str, strategy: str, pool: Pool, tmp_path: Path) -> None:
    for result in pool.start(go, strategy, what, str(tmp_path)).results(2 * TIMEOUT, grace=SLACK):
        error = result.exception
        assert isinstance(error, DivergedError), result.error
        assert error.what == "ranks do different things: " + LOOPS[what][strategy]
        assert error.at - float((tmp_path / "done").read_text()) < SLACK


def test_only_waiting_tells(pool: Pool, tmp_path: Path) -> None:
    """Rank 0 goes on to gather parameters, which no meeting announces; rank 1 wants a norm."""
    for result in pool.start(go, "zero1", "clip", str(tmp_path)).results(TIMEOUT + 6, grace=SLACK):
        error = result.exception
        assert isinstance(error, StalledError), result.error
        assert "    rank 0 waits in 'gather shard unit 0 step 2'" in error.what
        assert "(ends step 2)\n    rank 1 waits in 'meet world #" in error.what
        assert "(is in clip_grad_norm of step 2)" in error.what
        assert error.at - float((tmp_path / "done").read_text()) < TIMEOUT + SLACK


# ---------------------------------------------------------------- what may differ


def own_values() -> tuple[list[float], list[str]]:
    said: list[str] = []
    say, base.say = base.say, said.append
    try:
        with shoal.init("zero3", run_dir="none", timeout=TIMEOUT) as job:
            torch.manual_seed(job.rank)
            model = with_buffer(1)
            model.scale.fill_(job.rank + 1)
            model, _ = job.prepare(model, Adam(model.parameters()))
            with job.whole(model):
                return [float(t.detach().double().sum()) for t in [*model.parameters(), *model.buffers()]], said
    finally:
        base.say = say


def test_initial_values_are_rank_0_s(pool: Pool) -> None:
    (first, said), (second, _), (third, _) = pool.run(own_values, world=3, timeout=15)
    assert first == second == third
    torch.manual_seed(0)
    assert first == [float(t.detach().double().sum()) for t in [*net().parameters(), torch.ones(1)]]
    line = "initial values of rank 1, 2 differ from rank 0's: taking rank 0's (make the model after init)"
    assert said[0] == line
