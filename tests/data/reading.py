"""What all ranks of a job are handed, put together by step and leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run

Make = Callable[[shoal.Job], Iterable[Tensor]]
Handed = dict[tuple[int, int], list[float]]
"""By (step, leaf) the numbers of the batch."""


def handed(world: int, leaves: int, make: Make, *, save: Path | None = None, load: Path | None = None) -> Handed:
    """One epoch with a model that trains; it ends after a save in its second step."""

    def rank_main(_rank: int) -> Handed:
        with shoal.init("zero2", leaves=leaves, run_dir="none", device="cpu", seed=3) as job:
            model = nn.Linear(1, 1)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            loader = make(job)
            if load is not None:
                job.load(load)
            found: Handed = {}
            for batch in loader:
                now = job._feed.handed
                if now.leaf is not None and now.weight:
                    found[loader.next_step - 1, now.leaf] = batch.flatten().tolist()
                model(batch.float().reshape(-1, 1)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if save is not None and job.stepped and job.step == 2:
                    job.save(save)
                    break
            return found

    together: Handed = {}
    for found in run(world, rank_main, seed=world):
        assert not together.keys() & found.keys()
        together |= found
    return together


def flat(found: Handed) -> list[float]:
    return [value for _, batch in sorted(found.items()) for value in batch]
