"""`job.ema`: the average of weights, on shards."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.errors import OrderError
from tests.engine.trials import PLACES, Numbers, adamw, assert_bits, averaged, inputs

DECAY = 0.9
State = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(19, 150), nn.Tanh(), nn.Linear(150, 19)) for _ in range(2))
        self.blocks[1][0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def loss_of(model: nn.Module, number: int) -> Tensor:
    return model(inputs(*divmod(number, 4), 5, 19)).square().mean()


def plain(steps: int) -> tuple[State, State]:
    """Weights and their average, by hand."""
    shoal.seed(0, 0)
    model = Net()
    optimizer = adamw(model)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(steps):
        found: list[list[Tensor | None]] = []
        for leaf in range(4):
            loss_of(model, 4 * step + leaf).backward()
            found.append([p.grad for p in model.parameters()])
            optimizer.zero_grad()
        for i, p in enumerate(model.parameters()):
            p.grad = averaged([grads[i] for grads in found]) if found[0][i] is not None else None
        optimizer.step()
        optimizer.zero_grad()
        for n, p in model.named_parameters():
            average[n].lerp_(p.detach(), 1 - DECAY)
    return model.state_dict(), average


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "stochastic"])
@pytest.mark.parametrize("place", PLACES)
def test_average(place: str, precision: str, tmp_path: Path) -> None:
    """By hand; alone; saved, and continued elsewhere."""
    settings: dict[str, object] = {"precision": precision}
    if precision == "stochastic":
        settings = {"precision": "bfloat16", "masters": False}

    def trainer(strategy: object, start: int, stop: int) -> object:
        def rank_main(_rank: int) -> tuple[State, State, Tensor, Tensor]:
            with shoal.init(strategy, leaves=4, run_dir="none", **settings) as job:
                model = Net()
                model, optimizer = job.prepare(model, adamw(model))
                ema = job.ema(model, DECAY)
                if start:
                    job.load(tmp_path)
                for number in job.loader(Numbers(4 * (stop - start)), global_batch=4, shuffle=False):
                    loss_of(model, int(number) + 4 * start).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if not start:
                    job.save(tmp_path)
                with ema.whole():
                    inside = loss_of(model, 0).detach()
                with job.whole(model):
                    outside = loss_of(model, 0).detach()
                return job.state_dict(model), job.state_dict(ema), inside, outside

        return rank_main

    world, strategy = PLACES[place]
    half = run(world, trainer(strategy, 0, 2))[0]
    results = run(3, trainer("zero3", 2, 5))
    state, average, inside, outside = results[0]
    assert len({float(r[2]) for r in results}) == 1
    assert float(inside) != float(outside)
    want = run(1, trainer("ddp", 0, 5))[0]
    for key in want[0]:
        assert_bits(state[key], want[0][key], key)
        assert_bits(average[key], want[1][key], key)
    if precision == "float32":
        for found, steps in ((half, 2), (want, 5)):
            weights, by_hand = plain(steps)
            for key, value in by_hand.items():
                assert_bits(found[0][key], weights[key], key)
                assert_bits(found[1][key], value, f"average of {key}")


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_is_none(decay: float) -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", run_dir="none") as job:
            model = Net()
            model, _ = job.prepare(model, adamw(model))
            job.ema(model, decay)

    with pytest.raises(OrderError, match="decay of at least 0 and less than 1"):
        run(1, rank_main)


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    """The average begins with its weights."""

    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", run_dir="none") as job:
            model = Net()
            model, optimizer = job.prepare(model, adamw(model))
            loss_of(model, 0).backward()
            optimizer.step()
            job.save(tmp_path)
        with shoal.init("zero2", run_dir="none") as job:
            model = Net()
            model, optimizer = job.prepare(model, adamw(model))
            ema = job.ema(model, 0.5)
            job.load(tmp_path)
            for key, value in job.state_dict(ema).items():
                assert_bits(value, job.state_dict(model)[key], key)

    run(1, rank_main)
