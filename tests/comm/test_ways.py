"""Devices and the host's memory in one job: who carries what. What needs a device is in `tests/gpu`."""

from __future__ import annotations

import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.comm import nccl
from shoal.comm.group import Box, Carrier, Done, Group, Like, Parcel, Pending, current
from shoal.comm.meter import Meter
from shoal.comm.nccl import Asked, Order, Said, against_nccl, over_devices, own_device, uuid_of
from shoal.comm.pairwise import Gloo
from shoal.comm.reductions import Reductions
from shoal.comm.rendezvous import Address
from shoal.comm.routed import Routed
from shoal.comm.staged import Staged
from shoal.comm.threads import run
from shoal.errors import DivergedError, EnvironmentFault, PeerLost, StalledError
from shoal.start import find_carrier
from tests.comm.carriers import TIMEOUT
from tests.equivalence.models import Outcome, on_threads, trainer
from tests.pool import Pool

CPU, META = torch.device("cpu"), torch.device("meta")
NOWHERE = Address(0, 2, "127.0.0.1", 1, False)


# ---------------------------------------------------------------- through host memory


def staged_training(strategy: str) -> Outcome | None:
    """As if the CPU were a device that only host memory leads to."""
    token = current.set(Staged(find_carrier(20.0, "gloo")[0], pinned=False))
    try:
        return trainer(strategy, leaves=4)(0)
    finally:
        current.reset(token)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_training_through_host_memory_gives_the_same_bits(strategy: str, pool: Pool) -> None:
    assert pool.run(staged_training, strategy) == [on_threads(1, "ddp", leaves=4), None]


def staged_swap(rank: int) -> tuple[list[float], list[float], int, int]:
    """The same strip to two ranks, a box of the carrier's choice; twice, the second time in the memory of the first."""
    carrier = Staged(current.get(), pinned=False)
    group = Group("all", range(3), carrier)
    for _ in range(2):
        mine, box = torch.full((5,), float(rank)), torch.full((5,), -1.0)
        boxes = [[Like((5,), torch.float32, CPU)], [[box]], [Like((5,), torch.float32, CPU)]]
        pending = group.swap("swap", [[[mine]]] * 3, boxes)
        came = [strips[0].tolist() for strips in pending.wait()]
        assert pending.ready()
        assert pending.wait() is not None  # a second time changes nothing
        pending.release()
    stages = sum(map(len, carrier.stages.free.values()))
    return [*came[0], *came[1]], box.tolist(), stages, carrier.sent["swap"]


def test_stages_are_used_again() -> None:
    for rank, (came, box, stages, sent) in enumerate(run(3, staged_swap)):
        assert came == [float(r) for r in range(3) if r != rank for _ in range(5)]
        assert box == [-1.0 if rank == 1 else 1.0] * 5
        assert stages == 2  # a pool keeps two of a size
        assert sent == 2 * 2 * 20


# ---------------------------------------------------------------- by device


class Noting:
    """A carrier that notes what it is asked; what it is to receive is there at once."""

    def __init__(self) -> None:
        self.rank, self.size, self.sent, self.closed, self.failed = 0, 2, Counter[str](), False, False
        self.heard: list[Any] = []

    def post(self, label: str, sends: list[Parcel], receives: list[Box]) -> Pending:
        self.heard.append((label, len(sends), len(receives)))
        return Done([[self] for _ in receives])

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.heard.append((name, *args))


def test_each_strip_goes_over_the_carrier_of_its_device() -> None:
    host, device = Noting(), Noting()
    both = Routed(host, device, lambda device: device == META)
    near, far = torch.ones(2), torch.ones(2, device=META)
    pending = both.post(
        "mixed", [(1, [far]), (1, [near])], [(1, Like((2,), torch.float32, META)), (1, [near]), (1, [far])]
    )
    assert [came[0] for came in pending.wait()] == [device, host, device]
    assert pending.ready()
    both.post("near", [(1, [near])], [])
    both.post("far", [], [(1, [far])])
    both.post("nothing", [], [])
    assert host.heard == [("mixed", 1, 1), ("near", 1, 0)]
    assert device.heard == [("mixed", 1, 2), ("far", 0, 1)]


def test_memory_is_asked_of_the_carrier_of_its_device() -> None:
    host, device = Noting(), Noting()
    both = Routed(host, device, lambda device: device == META)
    both.empty(3, torch.float32, META)
    both.idle(torch.ones(2, device=META))
    both.common("label", (0, 1), 3, torch.float32, CPU)
    both.note("mark")
    both.hold("reason")
    both.fail("why")
    both.close()
    assert [name for name, *_ in device.heard] == ["empty", "idle", "fail", "close"]
    assert [name for name, *_ in host.heard] == ["common", "note", "hold", "fail", "close"]


def test_a_device_is_told_that_the_job_has_failed() -> None:
    """NCCL would wait for the others. And a carrier that both share is closed once."""
    host, device = Noting(), Noting()
    both = Routed(host, device)
    host.failed = True
    assert both.failed
    assert not both.closed
    both.close()
    assert [name for name, *_ in device.heard] == ["fail", "close"]
    host.closed = True
    both.close()
    assert [name for name, *_ in host.heard] == ["close"]


def shared_end() -> tuple[bool, bool]:
    """Host and device over one carrier, closed in good order."""
    gloo = find_carrier(TIMEOUT, "gloo")[0]
    both = Routed(gloo, Staged(gloo, pinned=False))
    Group("all", range(2), both).share("all", b"here")
    both.close()
    return both.closed, both.failed


def test_host_and_device_over_one_carrier(pool: Pool) -> None:
    assert pool.run(shared_end) == [(True, False)] * 2


# ---------------------------------------------------------------- which way


@pytest.mark.parametrize(
    ("devices", "obstacle"),
    [
        (["a", "b"], ""),
        (["a", "b", "a"], "ranks 0 and 2 share a device (a)"),
        (["a", ""], "rank 1 computes on the host"),
        (["", ""], "rank 0 computes on the host"),
    ],
)
def test_who_has_a_device_of_its_own(devices: list[str], obstacle: str) -> None:
    assert against_nccl(devices) == obstacle


def way(devices: list[str], rank: int, name: str) -> str:
    """Which carrier a rank with one of these devices gets."""
    host, lives = Noting(), SimpleNamespace(devices=devices)
    device = torch.device("cuda", 0) if devices[rank] else CPU
    found = over_devices(host, lives, device, name, NOWHERE, 1.0)
    return "host" if found is host else type(found.device).__name__


def test_ways_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(Noting):
        def __init__(self, *_args: object) -> None:
            super().__init__()

    monkeypatch.setattr(nccl, "Nccl", Fake)
    assert [way(["", ""], rank, "auto") for rank in range(2)] == ["host"] * 2
    assert [way(["a", "b"], rank, "auto") for rank in range(2)] == ["Fake"] * 2
    assert way(["a", "b"], 0, "nccl") == "Fake"
    assert way(["a", "b"], 0, "gloo") == way(["a", "b"], 0, "mpi") == "Staged"
    assert way(["a", "a"], 0, "auto") == "Staged"
    assert [way(["a", ""], rank, "auto") for rank in range(2)] == ["Staged", "host"]


def test_nccl_where_it_cannot_be() -> None:
    with pytest.raises(EnvironmentFault) as caught:
        way(["a", "a"], 0, "nccl")
    assert str(caught.value) == (
        "shoal[E50] carrier=nccl, but ranks 0 and 1 share a device (a)\n"
        "  try:   one device for each rank, or carrier=auto: through host memory"
    )


def test_the_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert own_device(None, 1) == own_device("cpu", 1) == CPU
    found = [own_device("cuda", 0), own_device("cuda", 3), own_device("cuda:0", 1)]
    assert found == used == [torch.device("cuda", index) for index in (0, 1, 0)]


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault) as caught:
        own_device("cuda", 0)
    assert str(caught.value) == (
        "shoal[E50] device=cuda, but torch finds no such device here\n"
        "  try:   a build of torch for it and its driver, or device=cpu"
    )


def devices_of_all() -> list[str]:
    rank = int(os.environ["RANK"])
    address = Address(rank, 2, "127.0.0.1", int(os.environ["MASTER_PORT"]), False, 0, f"GPU-{rank}" if rank else "")
    carrier = Gloo(address, timeout=TIMEOUT, report=print)
    carrier.close()
    return carrier.devices


def test_ranks_know_each_other_s_devices(pool: Pool) -> None:
    assert pool.run(devices_of_all) == [["", "GPU-1"]] * 2


def test_the_host_has_no_uuid() -> None:
    assert uuid_of(CPU) == ""


# ---------------------------------------------------------------- order


def ordered(rank: int, change: str) -> list[int]:
    """Rank 1 does something else than rank 0, or the same."""
    order = Order(current.get())
    sizes = {"first": 3, "second": 5 if change == "sizes" and rank else 4}
    labels = ["second", "first"] if change == "order" and rank else ["first", "second"]
    asked: dict[str, Asked] = {}
    for label in labels:
        strips = [torch.ones(sizes[label])]
        asked[label] = order.ask(label, [(1 - rank, strips)], [(1 - rank, strips)])
    for label in ("first", "second"):
        asked[label].wait()
        assert asked[label].ready()
    return order.host.sent["order"]


def test_what_ranks_do_in_the_same_order() -> None:
    assert run(2, lambda rank: ordered(rank, "")) == [24, 24]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("order", "'first', of what rank 0 and rank 1 exchange, is number 1 there and 2 here"),
        ("sizes", "'second', of what rank 0 and rank 1 exchange, has other sizes there than here"),
    ],
)
def test_what_ranks_do_in_different_orders(change: str, text: str) -> None:
    with pytest.raises(DivergedError) as caught:
        run(2, lambda rank: ordered(rank, change))
    assert str(caught.value) == (
        f"shoal[E20] {text}\n"
        "  cause: ranks started the same transfers in different orders\n"
        "  try:   overlap=False; and please report it: the plan should not allow this"
    )


def test_each_pair_of_ranks_counts_for_itself() -> None:
    order = Order(Meter(0, 3))
    for peers in ([1], [1, 2]):
        asked = order.ask("label", [(peer, [torch.ones(1)]) for peer in peers], [])
    assert {peer: said.number for peer, said in asked.expected.items()} == {1: 2, 2: 1}
    assert asked.expected[1] == Said(2, 0)


# ---------------------------------------------------------------- the backend's own sums


def joined(timeout: float) -> tuple[Gloo, Reductions]:
    carrier: Carrier = find_carrier(timeout, "gloo")[0]
    assert isinstance(carrier, Gloo)
    make = carrier.sums(torch.device("cpu"))
    assert make is not None
    sums = make("world", range(2))
    assert sums is make("world", range(2))
    assert isinstance(sums, Reductions)
    return carrier, sums


def reduced() -> list[list[float]]:
    carrier, reductions = joined(TIMEOUT)
    mine = torch.arange(4.0) + carrier.rank
    pending = [
        reductions.all_reduce("sum world #1", mine.clone()),
        reductions.reduce_scatter("part world #1", mine),
        reductions.all_gather("gather world #1", mine[:1].clone()),
    ]
    results = [transfer.wait()[0][0].tolist() for transfer in pending]
    assert all(transfer.ready() for transfer in pending)
    assert dict(carrier.sent) == {"sum": 16, "part": 8, "gather": 4}
    carrier.close()
    return results


def test_reductions_of_gloo(pool: Pool) -> None:
    total = [1.0, 3.0, 5.0, 7.0]
    assert pool.run(reduced) == [[total, total[:2], [0.0, 1.0]], [total, total[2:], [0.0, 1.0]]]


def left_alone(how: str) -> None:
    carrier, reductions = joined(1.5)
    Group("world", range(2), carrier).share("all", b"here")
    if carrier.rank == 1:
        if how == "dies":
            os._exit(3)
        carrier.note("does something else")
        threading_wait(carrier)
    reductions.all_reduce("sum world #2", torch.ones(4)).wait()


def threading_wait(carrier: Carrier) -> None:
    Group("other", range(2), carrier).share("other", b"waits")


@pytest.mark.parametrize("how", ["dies", "differs"])
def test_a_reduction_that_nobody_joins(how: str, pool: Pool) -> None:
    first = pool.start(left_alone, how).results(TIMEOUT + 10, grace=5)[0]
    if how == "dies":
        assert isinstance(first.exception, PeerLost), first.error
        assert first.exception.what == "rank 1 is gone; rank 0 was in 'sum world #2'"
    else:
        assert isinstance(first.exception, StalledError), first.error
        assert "rank 1 waits in 'other other #1' (does something else)" in first.exception.what
