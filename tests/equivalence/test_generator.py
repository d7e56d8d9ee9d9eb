"""Loops that draw their own batches from `job.generator()` end in the bits of one process."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import shoal
from shoal.comm.threads import run
from tests.equivalence.models import Everything, Outcome, adamw, outcome, samples


@cache
def trained(world: int, strategy: str, loader: bool = False) -> tuple[Outcome | None, list[tuple[int, ...]]]:
    """Six leaves a step, which 4 ranks do not share equally. What rank 0 has in the end, and all that was drawn."""
    drawn: list[tuple[int, ...]] = []

    def rank_main(_rank: int) -> Outcome | None:
        with shoal.init(strategy, leaves=6, run_dir="none", device="cpu") as job:
            model = Everything()
            model, optimizer = job.prepare(model, adamw(model))
            x, y = samples().tensors
            losses: list[float] = []
            batches = iter(job.loader(samples(18), global_batch=6)) if loader else None
            while job.step < 3:
                if batches is not None and next(batches, None) is None:
                    break
                rows = torch.randint(56, (5,), generator=job.generator())
                drawn.append(tuple(rows.tolist()))
                nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
            return outcome(job, model, optimizer, losses)

    return run(world, rank_main, seed=world)[0], drawn


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize(("world", "strategy"), [(2, "zero3"), (3, "ddp"), (4, "zero3")])
def test_equals_one_process(world: int, strategy: str, loader: bool) -> None:
    found, drawn = trained(world, strategy, loader)
    want, alone = trained(1, "ddp", loader)
    assert found == want
    assert sorted(drawn) == sorted(alone)
    assert len(set(alone)) == 18


def test_names_draw_apart() -> None:
    with shoal.init("ddp", run_dir="none") as job:
        numbers = [torch.rand(1, generator=job.generator(name)).item() for name in ("", "", "negatives")]
    assert numbers[0] == numbers[1] != numbers[2]
