"""Saved at one (strategy, world), continued at every other: the same bits as without a stop."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import shoal
from shoal.comm.threads import run
from shoal.strategy import Cut, Shard, Strategy
from tests.equivalence.models import Everything, Outcome, adamw, outcome, samples

PLACES = {
    "one": (1, Strategy()),
    "ddp2": (2, Strategy()),
    "zero1x3": (3, Strategy(shard=Shard.OPTIMIZER)),
    "zero2x2": (2, Strategy(shard=Shard.GRADIENTS)),
    "zero3x4": (4, Strategy(shard=Shard.PARAMETERS)),
    "zero3x3 by parameter": (3, Strategy(shard=Shard.PARAMETERS, cut=Cut.PARAMETER)),
    "hybrid2x2": (4, Strategy(shard=Shard.PARAMETERS, ranks_per_copy=2)),
}


def go(place: str, *, epochs: int, load: Path | None = None, save: Path | None = None, **settings: object) -> Outcome:
    world, strategy = PLACES[place]

    def rank_main(_rank: int) -> Outcome | None:
        with shoal.init(strategy, run_dir="none", device="cpu", **settings) as job:
            model = Everything()
            optimizer = adamw(model)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
            model, optimizer, scheduler = job.prepare(model, optimizer, scheduler)
            loader = job.loader(samples(), global_batch=24)
            if load is not None:
                job.load(load)
            losses: list[float] = []
            for _ in range(loader.epoch, epochs):
                for x, y in loader:
                    loss = torch.nn.functional.mse_loss(model(x).float(), y)
                    loss.backward()
                    job.clip_grad_norm(0.5)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    value = job.mean(loss.detach())
                    losses += [] if value is None else [value]
                    if save is not None and job.stepped and job.step == 2:
                        job.save(save)
            return outcome(job, model, optimizer, losses)

    result = run(world, rank_main)[0]
    assert result is not None
    return result


@cache
def uninterrupted(precision: str) -> Outcome:
    return go("one", epochs=2, leaves=4, precision=precision)


@pytest.mark.every(6)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("saved_at", PLACES)
def test_goes_on_everywhere(saved_at: str, precision: str, tmp_path: Path) -> None:
    """Stopped after step 2 of 6, in the middle of an epoch. Leaves and precision come from the checkpoint."""
    want = uninterrupted(precision)
    go(saved_at, epochs=1, leaves=4, save=tmp_path, precision=precision)
    for place in PLACES:
        got = go(place, epochs=2, load=tmp_path)
        assert got[:2] == want[:2], place
        assert got.losses == want.losses[2:], place
