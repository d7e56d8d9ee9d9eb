"""The NCCL carrier without NCCL: instead of it, something that matches messages by order alone, as NCCL does."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.comm import nccl
from shoal.comm.group import Group, Like, current
from shoal.comm.nccl import Nccl, _unwatched
from shoal.comm.pairwise import Gloo
from shoal.comm.reductions import Reductions
from shoal.comm.rendezvous import Address
from shoal.errors import PeerLost, StalledError
from shoal.start import find_carrier
from tests.equivalence.models import Outcome, on_threads, trainer
from tests.equivalence.test_fast import LEAVES, Result, assert_close, assert_equal, exact, trained
from tests.pool import Pool

CPU = torch.device("cpu")


class Batch:
    """What was started together."""

    def __init__(self, works: list[Any]) -> None:
        self.works, self.over = works, False

    def is_completed(self) -> bool:
        return self.over

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.over = True


class ByOrder:
    """Stands for ProcessGroupNCCL. Knows neither labels nor sizes, only how many messages two ranks have exchanged."""

    def __init__(self, group: Any) -> None:
        self.group, self.counts, self.aborted = group, Counter[tuple[str, int]](), threading.Event()

    def _start_coalescing(self) -> None:
        self.works: list[Any] = []

    def _end_coalescing(self) -> Batch:
        return Batch(self.works)

    def send(self, tensors: list[Tensor], peer: int, _tag: int) -> None:
        self._next("send", tensors, peer)

    def recv(self, tensors: list[Tensor], peer: int, _tag: int) -> None:
        self._next("recv", tensors, peer)

    def _next(self, way: str, tensors: list[Tensor], peer: int) -> None:
        self.counts[way, peer] += 1
        self.works.append(getattr(self.group, way)(tensors, peer, (1 << 30) + self.counts[way, peer]))

    def get_error(self) -> str:
        return "no error"

    def abort(self) -> None:
        self.aborted.set()

    def shutdown(self) -> None:
        return


class Adds(ByOrder):
    """With sums of its own, over all ranks."""

    def __init__(self, lives: Gloo, name: str) -> None:
        super().__init__(lives.group)
        made = lives._reductions(name, range(lives.size))
        assert isinstance(made, Reductions)
        self.adds = made.group
        self.allreduce, self._reduce_scatter_base = self.adds.allreduce, self.adds._reduce_scatter_base


def instead(lives: Gloo, name: str, _address: Address, _device: torch.device) -> ByOrder:
    return ByOrder(lives.group) if name == "nccl" else Adds(lives, name)


@contextmanager
def carrier(timeout: float) -> Iterator[Nccl]:
    """Every message of the program goes over it."""
    connected, nccl._connected = nccl._connected, instead
    gloo = find_carrier(timeout, "gloo")[0]
    address = Address(gloo.rank, gloo.size, "127.0.0.1", 1, False)
    made = Nccl(gloo, gloo, CPU, address, timeout)
    token = current.set(made)
    try:
        yield made
    finally:
        current.reset(token)
        nccl._connected = connected
        made.close()
        gloo.close()


def train(strategy: str, settings: dict[str, object]) -> Outcome | None:
    with carrier(20.0) as made:
        result = trainer(strategy, leaves=4, **settings)(made.rank)
        assert made.sent["order"] > 0
        return result


def fast(strategy: str) -> list[Result]:
    with carrier(20.0) as made:
        result = trained(strategy, leaves=LEAVES, numerics="fast")
        (label,) = {"reduce", "agree"} & set(made.sent)  # the other axis has nobody else
        assert label == ("agree" if strategy == "ddp" else "reduce")
        sums = list(made._sums.values())
        assert [s.scatters for s in sums] == [True]
        made._sums.clear()  # gloo closes them
        return [result]


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_fast_numerics(strategy: str, pool: Pool) -> None:
    """Sums on a device are over when its streams say so; those inside a copy are scattered, of equal parts."""
    results = [result for (result,) in pool.run(fast, strategy, world=3, timeout=20)]
    assert_equal(results)
    assert_close(results[0].whole, exact(LEAVES))


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_all_that_a_job_exchanges_has_an_order(strategy: str, pool: Pool) -> None:
    assert pool.run(train, strategy, {}, world=3, timeout=20) == [on_threads(1, "ddp", leaves=4), None, None]


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_layerwise_updates_have_an_order(strategy: str, pool: Pool) -> None:
    how: dict[str, object] = {"layerwise": True, "clip": None, "memory": "16MiB"}
    want = on_threads(1, "ddp", leaves=4, clip=None)
    assert pool.run(train, strategy, how, world=3, timeout=20) == [want, None, None]


def swap() -> tuple[list[list[float]], bool, dict[str, int]]:
    with carrier(3.0) as made:
        group, mine = Group("all", range(2), made), [torch.full((3,), 1.0 + made.rank), torch.full((2,), 5.0)]
        pending = group.swap("swap", [[mine]] * 2, [[Like((3, 2), torch.float32, CPU)]] * 2)
        came = [strip.tolist() for strip in pending.wait()[0]]
        over = pending.ready()
        pending.release()
        nothing = group.swap("nothing", [[[]]] * 2, [[[]]] * 2)
        assert nothing.ready() in (True, False)
        assert nothing.wait() == [[]]
        return came, over, {word: made.sent[word] for word in ("swap", "nothing")}


def test_swap(pool: Pool) -> None:
    sent = {"swap": 20, "nothing": 0}
    assert pool.run(swap) == [([[2.0] * 3, [5.0] * 2], True, sent), ([[1.0] * 3, [5.0] * 2], True, sent)]


def differs() -> None:
    with carrier(1.5) as made:
        group, strip = Group("all", range(2), made), torch.ones(1000)
        group.swap("other" if made.rank else "swap", [[[strip]]] * 2, [[[torch.empty(1000)]]] * 2).wait()


def test_what_does_not_match_is_not_waited_for_on_the_device(pool: Pool) -> None:
    for result in pool.start(differs).results(10, grace=2):
        assert isinstance(result.exception, StalledError), result.error
        assert "rank 0 waits in 'order swap all #1' (starts)" in result.exception.what
        assert "rank 1 waits in 'order other all #1' (starts)" in result.exception.what


def stuck() -> tuple[bool, float, str]:
    """Rank 0 waits for its device, which waits for rank 1, which has died."""
    with carrier(20.0) as made:
        group, strip = Group("all", range(2), made), torch.ones(3)
        group.share("all", b"here")
        if made.rank == 1:
            os._exit(7)
        made.under_way.append(nccl.Started("swap all #2", [1], Batch([])))
        begin = time.monotonic()
        freed = made.group.aborted.wait(10)
        took = time.monotonic() - begin
        with pytest.raises(PeerLost) as caught:
            group.swap("swap", [[[strip]]] * 2, [[[strip.clone()]]] * 2).wait()
        return freed, took, caught.value.what


def test_a_device_that_waits_for_the_dead_is_freed(pool: Pool) -> None:
    freed, took, what = pool.start(stuck).results(20)[0].value
    assert freed
    assert took < 3
    assert what.startswith("rank 1 is gone; rank 0 was in '")


def test_the_watchdog_is_off_while_a_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has set counts; afterwards all is as before."""
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    with _unwatched():
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
        assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "1"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "1"
