"""torch.compile on every block: the same bits under every strategy."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.errors import ModelError
from tests.engine.trials import PLACES, Numbers, adamw, assert_bits, inputs

State = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 160), nn.GELU(), nn.LayerNorm(160), nn.Linear(160, 16)) for _ in range(2)
        )
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def train(place: str | tuple[int, str], backend: str, make: type[nn.Module] = Net) -> State:
    world, strategy = PLACES[place] if isinstance(place, str) else place

    def rank_main(_rank: int) -> State:
        torch.compiler.reset()
        with shoal.init(strategy, leaves=4, run_dir="none") as job:
            model = make()
            model, optimizer = job.prepare(model, adamw(model), compile={"backend": backend})
            for number in job.loader(Numbers(12), global_batch=4, shuffle=False):
                model(inputs(*divmod(int(number), 4), 6, 16)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                model.eval()
                model(inputs(9, 9, 6, 16))
            return job.state_dict(model)

    return run(world, rank_main)[0]


@cache
def alone(backend: str) -> State:
    return train((1, "ddp"), backend)


@pytest.mark.parametrize("place", PLACES)
def test_the_same_bits(place: str) -> None:
    for key, value in train(place, "aot_eager").items():
        assert_bits(value, alone("aot_eager")[key], key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in what the backend imports
@pytest.mark.parametrize("place", ["ddp", "zero3"])
def test_the_same_bits_with_generated_kernels(place: str) -> None:
    for key, value in train(place, "inductor").items():
        assert_bits(value, alone("inductor")[key], key)


def test_blocks_are_really_compiled() -> None:
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, _example: list[Tensor]) -> object:
        seen.append(len(graph.graph.nodes))
        return graph

    def rank_main(_rank: int) -> None:
        torch.compiler.reset()
        with shoal.init("zero3", run_dir="none") as job:
            model = Net()
            model, optimizer = job.prepare(model, adamw(model), compile={"backend": backend})
            for step in range(3):
                model(inputs(step, 0, 6, 16)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert "forward" not in model.blocks[0].__dict__, "the user's model is as it was"

    run(1, rank_main)
    assert seen
    assert len(seen) <= 2  # one graph a block, or one for both, and none for the second step


@pytest.mark.parametrize("how", ["whole", "in place"])
def test_a_model_that_is_compiled_already(how: str) -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", run_dir="none") as job:
            model = Net()
            optimizer = adamw(model)
            if how == "whole":
                model = torch.compile(model, backend="eager")
            else:
                model.blocks[0].compile(backend="eager")
            job.prepare(model, optimizer)

    with pytest.raises(ModelError, match="compile=True"):
        run(1, rank_main)
