"""Loops that accumulate by themselves: micro-steps divided among ranks give the bits of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.errors import BatchError
from tests.equivalence.models import Everything, adamw, digest, sgd

COUNT, STEPS = 6, 3
Loop = Callable[[nn.Module, torch.optim.Optimizer, int, Iterable[int]], list[int]]


def accumulate(model: nn.Module, micro_steps: Iterable[int], dtype: torch.dtype = torch.float32) -> list[int]:
    """The inside of one step: its batches are drawn where they are used."""
    done = []
    for number in micro_steps:
        x, y = torch.randn(8, 11, dtype=dtype), torch.randn(8, 11, dtype=dtype)
        (nn.functional.mse_loss(model(x), y) / COUNT).backward()
        done.append(number)
    return done


def trained(world: int, strategy: str, leaves: int, *, clip: bool = False, **settings: object) -> str:
    def rank_main(_rank: int) -> tuple[str, list[list[int]]]:
        with shoal.init(strategy, leaves=leaves, run_dir="none", **settings) as job:
            model = Everything()
            model, optimizer = job.prepare(model, adamw(model))
            done = []
            for step in range(STEPS):
                done.append(accumulate(model, job.micro_steps(COUNT)))
                if clip:
                    assert job.clip_grad_norm(0.1) > 0
                optimizer.step()
                optimizer.zero_grad()
                assert (job.stepped, job.step) == (True, step + 1)
            return digest(job.state_dict(model)), done

    found = run(world, rank_main, seed=world)
    for step in range(STEPS):
        numbers = sorted(n for _, done in found for n in done[step])
        assert sorted(set(numbers)) == list(range(COUNT))
    return found[0][0]


@cache
def alone(leaves: int, clip: bool) -> str:
    return trained(1, "ddp", leaves, clip=clip)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("leaves", [2, 6])
@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (2, "zero1"), (3, "zero2"), (2, "zero3"), (4, "zero3")])
def test_equals_one_process(world: int, strategy: str, leaves: int, clip: bool) -> None:
    """With two leaves of three micro-steps, and with four ranks of which two have none."""
    assert trained(world, strategy, leaves, clip=clip) == alone(leaves, clip)


def test_one_leaf_is_plain_pytorch() -> None:
    shoal.seed(0, 0)
    model = Everything()
    optimizer = adamw(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(STEPS):

        def seeded(step: int = step) -> Iterable[int]:
            for number in range(COUNT):
                shoal.seed(0, step, number)
                yield number

        accumulate(model, seeded())
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    assert trained(1, "zero3", 1) == digest(dict(model.state_dict()))


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_gradients_add_up_as_in_the_plain_loop(numerics: str) -> None:
    """The loop divides its losses by the count itself: nothing is divided again."""

    def loop(micro: Callable[[int], Iterable[int]], model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        for step in range(STEPS):
            accumulate(model, micro(step), torch.float64)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def plain(step: int) -> Iterable[int]:
        for number in range(COUNT):
            shoal.seed(0, step, number)
            yield number

    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(11, 11).double()

    def rank_main(_rank: int) -> Tensor:
        with shoal.init("ddp", leaves=COUNT, run_dir="none", numerics=numerics) as job:
            model, optimizer = job.prepare(model := make(), sgd(model))
            return loop(lambda _step: job.micro_steps(COUNT), model, optimizer)

    model = make()
    assert torch.allclose(run(2, rank_main)[0], loop(plain, model, sgd(model)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", [0, 5, 9])
def test_a_count_that_leaves_do_not_divide(count: int) -> None:
    with shoal.init(leaves=2, run_dir="none") as job:
        model = nn.Linear(2, 2)
        job.prepare(model, sgd(model))
        with pytest.raises(BatchError) as e:
            job.micro_steps(count)
    assert f"job.micro_steps({count}) does not divide into leaves=2 equal leaves" in str(e.value)
    assert f"try:   job.micro_steps({max(count - 1, 2)}) or " in str(e.value)
