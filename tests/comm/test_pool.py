"""Buffers that are used again: which, how many, and not while others read them."""

from __future__ import annotations

import torch

from shoal.comm.pool import KEPT, LEAST, Pool, least

CPU = torch.device("cpu")


def test_only_the_same_kind_is_used_again() -> None:
    pool = Pool(least=0)
    buffer = pool.take(10, torch.float32, CPU)
    assert (buffer.numel(), buffer.dtype, buffer.device) == (10, torch.float32, CPU)
    pool.give(buffer)
    assert pool.take(11, torch.float32, CPU) is not buffer
    assert pool.take(10, torch.int32, CPU) is not buffer
    assert pool.take(10, torch.float32, CPU) is buffer
    assert pool.take(10, torch.float32, CPU) is not buffer  # it is somebody's again


def test_few_wait() -> None:
    pool = Pool(least=0)
    for buffer in [pool.take(10, torch.float32, CPU) for _ in range(KEPT + 3)]:
        pool.give(buffer)
    assert pool.nbytes == KEPT * 40


def test_of_the_hosts_only_those_whose_pages_would_be_lost() -> None:
    pool = Pool()
    small, large = (torch.empty(nbytes, dtype=torch.uint8) for nbytes in (LEAST - 1, LEAST))
    pool.give(small)
    pool.give(large)
    assert pool.nbytes == LEAST
    assert least(torch.device("cuda")) == 0


def test_one_that_others_read_is_left_alone() -> None:
    made: list[torch.Tensor] = []
    read: set[int] = set()

    def make(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(torch.zeros(numel, dtype=dtype, device=device))
        return made[-1]

    pool = Pool(make, lambda buffer: id(buffer) not in read, least=0)
    first, second = (pool.take(4, torch.float32, CPU) for _ in range(2))
    pool.give(first)
    pool.give(second)
    read.add(id(first))
    assert pool.take(4, torch.float32, CPU) is second
    assert pool.take(4, torch.float32, CPU) is made[2]
    read.clear()
    assert pool.take(4, torch.float32, CPU) is first
