"""Waits without progress: reported, then ended on every living rank with a table of what each of them does."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shoal
from shoal.errors import PeerLost, StalledError
from tests.faults.ranks import CARRIERS, SLACK, TIMEOUT, Boom, after, net, program, timed
from tests.pool import Pool, Result

on_every_carrier = pytest.mark.parametrize("carrier", CARRIERS)
TABLE = "nobody moved for 3 s; the last marks are\n"
HELP = (
    "\n  cause: ranks do different things, or one of them is stuck or stopped"
    "\n  try:   if a rank rightly works for longer, raise timeout= (seconds), or do it inside job.whole(model)"
)


def all_at_once(
    pool: Pool, carrier: str, folder: Path, cases: list[tuple[str, str, str, int]], *,
    world: int = 2, grace: float = 2 * SLACK,
) -> list[tuple[Path, list[Result]]]:  # fmt: skip
    """They mostly sleep."""
    folders = [folder / str(n) for n in range(len(cases))]
    for made in folders:
        made.mkdir()
    running = [pool.start(program, carrier, *case, str(f), world=world) for case, f in zip(cases, folders, strict=True)]
    return [(f, r.results(TIMEOUT + 12, grace=grace)) for f, r in zip(folders, running, strict=True)]


@on_every_carrier
def test_a_rank_is_stopped(carrier: str, pool: Pool, tmp_path: Path) -> None:
    """Rank 0 of the second job serves the store, where the marks are."""
    cases = [("zero3", "between", "stop", 1), ("zero2", "after reduce", "stop", 0), ("ddp", "save", "stop", 1)]
    first, second, saving = all_at_once(pool, carrier, tmp_path, cases, grace=0.2)
    error = stalled(*first, 0)
    found = re.search(r"    rank 0 waits in 'meet world #\d+' \(begins leaf turn 2\)\n", error.what)
    assert found is not None, error.what
    waits = found[0]
    stands = "    rank 1 runs since 'norm copy #2' (has done step 1)"
    assert str(error) == f"shoal[E31] {TABLE}{waits}{stands}{HELP}"
    assert error.reports == [f"rank 0 has waited 1 s\n{waits}{stands}"]

    error = stalled(*second, 1)
    assert error.what.startswith(TABLE + "    rank 0 ")
    assert re.search("\n    rank 1 waits in '(reduce shard|meet world) ", error.what)  # the vote needs no gradients
    assert error.what.endswith("\n    rank 0, which keeps these marks, does not answer: the marks may be old")
    assert len(error.reports) == 1

    error = stalled(*saving, 0)
    assert "    rank 0 holds: job.save in 'file world #" in error.what
    assert "    rank 1 holds: job.save since 'file world #" in error.what


def stalled(folder: Path, results: list[Result], rank: int) -> StalledError:
    error = results[rank].exception
    assert isinstance(error, StalledError), results[rank].error
    assert TIMEOUT - 0.6 < after(folder, results[rank]) < TIMEOUT + SLACK
    return error


@pytest.mark.parametrize(
    ("carrier", "strategy", "moment", "transfer"),
    [("gloo", "zero3", "forward", "gather shard"), ("shared", "zero2", "before reduce", "(reduce shard|meet world)")],
)
def test_one_of_three_is_stopped(
    carrier: str, strategy: str, moment: str, transfer: str, pool: Pool, tmp_path: Path
) -> None:
    cases = [(strategy, moment, "stop", 1)]
    ((folder, results),) = all_at_once(pool, carrier, tmp_path, cases, world=3, grace=SLACK)
    errors = [stalled(folder, results, rank) for rank in (0, 2)]
    assert str(errors[0]) == str(errors[1])  # the first one's word
    assert re.search(f"    rank 0 waits in '{transfer} ", errors[0].what)
    assert "    rank 1 runs since '" in errors[0].what


@pytest.mark.parametrize("carrier", ["gloo", pytest.param("shared", marks=pytest.mark.slow)])
def test_a_rank_works_too_long(carrier: str, pool: Pool, tmp_path: Path) -> None:
    """It hears of it when it comes back."""
    cases = [("zero3", "forward", "nap", 1), ("ddp", "between", "compute", 0)]
    for (folder, results), busy in zip(all_at_once(pool, carrier, tmp_path, cases), (1, 0), strict=True):
        error, late = stalled(folder, results, 1 - busy), results[busy].exception
        assert f"    rank {busy} runs since '" in error.what
        assert f"    rank {1 - busy} waits in '" in error.what
        assert isinstance(late, StalledError)
        assert str(late) == str(error)
        assert after(folder, results[busy]) < TIMEOUT + SLACK


@pytest.mark.parametrize("carrier", [pytest.param("gloo", marks=pytest.mark.slow), "shared"])
def test_a_lease_stops_the_count(carrier: str, pool: Pool, tmp_path: Path) -> None:
    """One rank alone works for longer than the time-out, under a lease."""
    cases = [("zero3", "whole", "nap", 0), ("ddp", "save", "nap", 1)]
    for folder, results in all_at_once(pool, carrier, tmp_path, cases):
        assert [r.value for r in results] == ["finished"] * 2, results
        assert time.monotonic() - float((folder / "done").read_text()) > TIMEOUT


def nested_leases() -> str:
    with timed(), shoal.init("zero3", run_dir="none", timeout=1.0) as job:
        model = net()
        model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with job.whole(model):
            job.state_dict(optimizer)  # takes a lease of its own, and gives it back
            if job.rank == 0:
                time.sleep(3.0)
    return "finished"


def test_leases_can_be_nested(pool: Pool) -> None:
    assert pool.run(nested_leases, timeout=15) == ["finished"] * 2


def progress_elsewhere() -> str:
    """Rank 0 has more and longer leaves: its mark changes, though it sends nothing for longer than the time-out."""
    with timed(), shoal.init("ddp", run_dir="none", timeout=1.2, leaves=9) as job:
        model = net()
        model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(len(job._find(None).engine.turns.of(job.rank))):
            model(torch.randn(4, 65)).sum().backward()
            if job.rank == 0:
                time.sleep(0.7)
            optimizer.step()
        assert job.stepped
    return "finished"


def test_leaves_are_progress(pool: Pool) -> None:
    assert pool.run(progress_elsewhere, timeout=15) == ["finished"] * 2


def late_start(rank: int, seconds: float) -> str:
    if int(os.environ["RANK"]) == rank:
        time.sleep(seconds)
    with shoal.init("ddp", run_dir="none", timeout=TIMEOUT) as job:
        return f"{job.rank} of {job.world_size}"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_starts_late_is_waited_for(rank: int, pool: Pool) -> None:
    assert pool.run(late_start, rank, 2.0, timeout=10) == ["0 of 2", "1 of 2"]


def with_data_workers(folder: str) -> None:
    with timed(), shoal.init("ddp", run_dir="none", timeout=TIMEOUT) as job:
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(TensorDataset(torch.ones(400, 3)), batch_size=2, num_workers=1)
        model, optimizer, loader = job.prepare(model, optimizer, loader)
        for step, (x,) in enumerate(loader):
            if job.rank == 1 and step == 3:
                (Path(folder) / "done").write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
            model(x).sum().backward()
            optimizer.step()
    raise Boom("trained without rank 1")


def test_a_killed_rank_has_data_workers(pool: Pool, tmp_path: Path) -> None:
    """They live on for seconds, and must not hold its connections."""
    survivor, _ = pool.start(with_data_workers, str(tmp_path)).results(TIMEOUT + 10)
    assert isinstance(survivor.exception, PeerLost), survivor.error
    assert after(tmp_path, survivor) < SLACK
