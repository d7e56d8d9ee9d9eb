"""The carrier that counts."""

from __future__ import annotations

import torch

import shoal
from shoal.comm.group import Group, current
from shoal.comm.meter import Alone, Meter, dry_run
from shoal.random import everything


def test_it_counts_what_this_rank_would_send() -> None:
    meter = Meter(1, 3)
    world = Group("world", range(3), meter)
    flat = torch.empty(10, device="meta")
    world.gather("gather", flat, [0, 4, 10, 10]).wait()
    world.gather("gather", flat.to(torch.bfloat16), [0, 4, 10, 10]).wait()
    world.swap("reduce", [[[flat]], [[flat]], [[flat[:0]]]], [[[flat]], [], []]).wait()
    assert dict(meter.sent) == {"gather": 2 * 6 * 4 + 2 * 6 * 2, "reduce": 40}


def test_everybody_seems_to_say_what_we_say() -> None:
    world = Group("world", range(3), Meter(2, 3))
    assert world.share("meet", b"ours") == [b"ours"] * 3
    assert world.share_any("plan", b"longer") == [b"longer"] * 3


def test_it_never_fails_by_itself() -> None:
    meter = Alone()
    assert (meter.rank, meter.size, meter.closed, meter.failed) == (0, 1, False, False)
    meter.note("x")
    meter.hold("x")
    meter.hold("")
    meter.fail("x")
    meter.close()
    assert meter.closed
    assert meter.failed


def test_a_dry_run_leaves_everything_as_it_was() -> None:
    def program(rank: int) -> None:
        with shoal.init("zero3", seed=7, run_dir="none") as job:
            assert (job.rank, job.world_size, job.device.type) == (rank, 4, "meta")
            with job.device:
                model = torch.nn.Linear(64, 64)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            model(torch.empty(2, 64, device="meta")).sum().backward()
            optimizer.step()
            everything(5)

    everything(3)
    want = torch.rand(1)
    everything(3)
    counted = dry_run(3, 4, program)
    assert torch.equal(torch.rand(1), want)
    assert current.get() is None
    assert counted == dry_run(3, 4, program)
    assert counted["gather"] > 0
    assert counted["reduce"] > 0
