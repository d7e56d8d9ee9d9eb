"""Shared memory of real processes: the pages are those of the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import shoal
from tests.pool import Pool

MIB = 2**20


class Seen(NamedTuple):
    """Of one rank, in bytes: pages of shared memory, and by the ledger the state there and staging now and at most."""

    pages: int
    state: int
    staging: int
    most: int


def pages() -> dict[str, int]:
    """Bytes that this process has mapped, by part, of each piece of memory that ranks have in common (by inode)."""
    found: dict[str, int] = {}
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = words[4] if "memfd:" in line else ""
        elif name and words[0] == "Pss:":
            found[name] = found.get(name, 0) + int(words[1]) * 1024
    return found


def train(strategy: str) -> Seen:
    before = pages()
    with shoal.init(strategy, carrier="shared", run_dir="none", device="cpu", timeout=30.0) as job:
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
        model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters()))
        for _ in range(5):
            model(torch.randn(4, 512)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        memory = job.memory()
        job.mean(torch.zeros(()))  # nobody leaves before all have looked
        found = sum(size for name, size in pages().items() if name not in before)
        job.mean(torch.zeros(()))
        staging = next(e for e in memory.entries if e.name == "staging")
        in_arena = {"ddp": ("common gradient",), "zero1": ("parameters",), "zero3": ("masters",)}[strategy]
        state = sum(e.now for e in memory.entries if e.name in in_arena)
        return Seen(found, state, staging.now, staging.rest)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3"])
def test_pages_are_on_the_bill(strategy: str, pool: Pool) -> None:
    ranks = pool.run(train, strategy, world=2)
    assert all(0 < rank.staging <= rank.most for rank in ranks), ranks
    billed = sum(rank.state + rank.staging for rank in ranks)
    assert 0.9 * billed <= sum(rank.pages for rank in ranks) <= billed + 2 * MIB, ranks
