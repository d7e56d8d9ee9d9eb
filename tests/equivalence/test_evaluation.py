"""`job.evaluate` gives equal bits at every world size, under every strategy."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import shoal
from shoal.comm.threads import run
from tests.equivalence.models import Everything, adamw, samples

NAMES = ["accuracy", "precision", "recall", "f1", "auc", "perplexity"]


class Total:
    """The user's own, whose bits depend on the order of batches."""

    def reset(self) -> None:
        self.total = torch.zeros(())

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total = self.total * 0.9 + (outputs.sum() - targets.sum())

    def compute(self) -> float:
        return self.total.item()


def classes(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """With random numbers, as a model that samples draws them."""
    outputs = model(batch[0])
    return outputs + torch.rand_like(outputs), batch[1].argmax(-1)


@cache
def evaluated(world: int, strategy: str, pending: bool = False) -> dict[str, object]:
    """After a step of training. 56 samples in batches of 5: the last one is short, 12 batches do not divide by 5.

    Under zero3 all ranks read all batches, else only their own.
    """

    def rank_main(_rank: int) -> dict[str, object]:
        with shoal.init(strategy, leaves=4, run_dir="none", device="cpu", pending=pending) as job:
            model = Everything()
            model, optimizer = job.prepare(model, adamw(model))
            for x, y in job.loader(samples(24), global_batch=24):
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            metrics = {name: name for name in NAMES} | {"loss": nn.functional.cross_entropy, "own": Total()}
            loader = DataLoader(samples(), batch_size=5)
            found = job.evaluate(model, list(loader) if strategy == "zero3" else loader, metrics, predict=classes)
            return dict(found.values) | {"samples": found.samples}

    results = run(world, rank_main, seed=world)
    assert all(r == results[0] for r in results)
    return results[0]


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("world", [2, 3])
def test_equals_one_process(world: int, strategy: str) -> None:
    assert evaluated(world, strategy) == evaluated(1, "ddp")


def test_pending_updates_are_finished_first() -> None:
    assert evaluated(2, "zero3", pending=True) == evaluated(1, "ddp")
