"""`shoal.spawn`: processes, threads, and what goes wrong in them."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.errors import PeerLost, SettingError


def place(start: float) -> tuple[int, int, int]:
    with shoal.init(run_dir="none", device="cpu") as job:
        assert gradient(start + job.rank) == start + (job.world_size - 1) / 2
        return job.rank, job.world_size, os.getpid()


def gradient(value: float) -> float:
    """The drop-ins find their places too."""
    model = shoal.DistributedDataParallel(nn.Linear(1, 1, bias=False))
    model(torch.tensor([[value]])).sum().backward()
    return float(model.module.weight.grad)


def broken(how: str) -> Any:
    with shoal.init(run_dir="none", device="cpu") as job:
        if job.rank == 1:
            if how == "leaves":
                os._exit(7)
            raise SettingError("rank 1 has had enough", remedy="less") if how == "ours" else KeyError("lost")
        model = nn.Linear(2, 1)
        job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_processes() -> None:
    found = shoal.spawn(place, 3.0, workers="2")
    assert [(rank, size) for rank, size, _ in found] == [(0, 2), (1, 2)]
    assert len({os.getpid(), *(pid for _, _, pid in found)}) == 3


def test_threads() -> None:
    """In this process, one rank at a time: what a debugger needs."""
    assert shoal.spawn(place, 3.0, workers="threads:4") == [(r, 4, os.getpid()) for r in range(4)]
    assert (
        shoal.spawn(lambda: threading.current_thread() is threading.main_thread(), workers="threads:2") == [False] * 2
    )


@pytest.mark.parametrize(("how", "workers"), [("ours", 2), ("ours", "threads:2"), ("theirs", "threads:2")])
def test_the_first_error_is_raised(how: str, workers: int | str) -> None:
    """Not that of the rank that lost its neighbour; with the worker's traceback as its cause."""
    kind = SettingError if how == "ours" else KeyError
    with pytest.raises(kind, match="had enough" if how == "ours" else "lost") as e:
        shoal.spawn(broken, how, workers=workers)
    if workers == 2:
        assert "worker 1:\nTraceback" in str(e.value.__cause__)
        assert "in broken" in str(e.value.__cause__)


def test_a_worker_that_ends_without_a_word() -> None:
    with pytest.raises(PeerLost) as e:
        shoal.spawn(broken, "leaves", workers=2)
    assert "worker 1 ended with exit code 7 and without a word" in str(e.value)
    assert 'workers="threads:2" with a debugger' in str(e.value)


@pytest.mark.parametrize("workers", [0, "many", "threads:", "threads:x", "threads:0"])
def test_workers_that_cannot_be(workers: int | str) -> None:
    with pytest.raises(SettingError, match=r'workers=[\s\S]*workers=2 for processes, or workers="threads:2"'):
        shoal.spawn(place, 1, workers=workers)


def test_a_function_that_processes_cannot_find() -> None:
    with pytest.raises(SettingError, match=r'cannot be sent to other processes[\s\S]*or workers="threads:2"'):
        shoal.spawn(lambda: 1, workers=2)
