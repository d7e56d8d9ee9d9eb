"""Weights that the user changes in place between steps, as a critic's are clipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.errors import AwayError
from tests.engine.trials import PLACES, Numbers, adamw, assert_bits, averaged, inputs

State = dict[str, Tensor]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 130), nn.Tanh(), nn.Linear(130, 9))


def clip(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.05, 0.05)


def plain() -> State:
    shoal.seed(0, 0)
    model = net()
    optimizer = adamw(model)
    for step in range(3):
        found: list[list[Tensor]] = []
        for leaf in range(4):
            model(inputs(step, leaf, 3, 9)).square().mean().backward()
            found.append([p.grad for p in model.parameters()])
            optimizer.zero_grad()
        for i, p in enumerate(model.parameters()):
            p.grad = averaged([grads[i] for grads in found])
        optimizer.step()
        optimizer.zero_grad()
        clip(model)
    return model.state_dict()


def trained(place: str, *, whole: bool, precision: str = "float32") -> State:
    world, strategy = PLACES[place]

    def rank_main(_rank: int) -> State:
        with shoal.init(strategy, leaves=4, precision=precision, run_dir="none") as job:
            model = net()
            model, optimizer = job.prepare(model, adamw(model))
            for number in job.loader(Numbers(12), global_batch=4, shuffle=False):
                model(inputs(*divmod(int(number), 4), 3, 9)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if job.stepped and whole:
                    with job.whole(model, write=True):
                        clip(model)
                elif job.stepped:
                    clip(model)
            return job.state_dict(model)

    return run(world, rank_main)[0]


@pytest.mark.parametrize("place", PLACES)
def test_inside_whole(place: str) -> None:
    for key, value in plain().items():
        assert_bits(trained(place, whole=True)[key], value, key)


@pytest.mark.parametrize("place", ["ddp", "zero1", "zero2"])
def test_where_parameters_are_whole_anyway(place: str) -> None:
    for key, value in plain().items():
        assert_bits(trained(place, whole=False)[key], value, key)


@pytest.mark.parametrize(
    ("place", "precision", "text"),
    [
        ("ddp", "bfloat16", "were changed in place, in copies of what is trained"),
        ("zero1", "float16", "they compute in float16; masters lie apart"),
    ],
)
def test_where_it_would_be_lost(place: str, precision: str, text: str) -> None:
    with pytest.raises(AwayError) as e:
        trained(place, whole=False, precision=precision)
    assert text in str(e.value)
    assert "with job.whole(model, write=True)" in str(e.value)


@pytest.mark.parametrize("place", ["zero3", "hybrid"])
def test_where_parameters_are_away(place: str) -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        trained(place, whole=False)
