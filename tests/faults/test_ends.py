"""A rank ends before its time: the others end with it, soon, and name it."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

import shoal
from shoal.comm.group import Group
from shoal.errors import DivergedError, PeerLost
from shoal.start import find_carrier
from tests.faults.ranks import CARRIERS, SLACK, TIMEOUT, Boom, after, boom, program, timed
from tests.pool import Pool, Result

on_every_carrier = pytest.mark.parametrize("carrier", CARRIERS)


def run(
    pool: Pool, carrier: str, strategy: str, moment: str, deed: str, rank: int, folder: Path,
    world: int = 2, copy: int | None = None,
) -> list[Result]:  # fmt: skip
    running = pool.start(program, carrier, strategy, moment, deed, rank, str(folder), copy, world=world)
    return running.results(TIMEOUT + 10, grace=5)


@on_every_carrier
@pytest.mark.parametrize(
    ("strategy", "moment", "rank"),
    [
        ("zero3", "forward", 0),
        ("zero3", "between", 1),
        ("ddp", "gradient", 1),
        ("zero2", "clip", 0),
        ("zero1", "end", 1),
    ],
)
def test_a_rank_raises(carrier: str, strategy: str, moment: str, rank: int, pool: Pool, tmp_path: Path) -> None:
    results = run(pool, carrier, strategy, moment, "raise", rank, tmp_path)
    assert isinstance(results[rank].exception, Boom)
    other = results[1 - rank]
    assert isinstance(other.exception, PeerLost)
    assert other.exception.what.startswith(f"rank {rank} failed; rank {1 - rank} was in '")
    assert other.exception.cause == "Boom: on purpose"
    assert other.exception.remedy == f"see rank {rank}'s own traceback or log"
    assert after(tmp_path, other) < SLACK


@pytest.mark.parametrize(
    ("carrier", "strategy", "moment", "rank", "world"),
    [
        ("gloo", "zero3", "before gather", 1, 2),
        ("gloo", "zero3", "after gather", 0, 2),
        ("gloo", "zero3", "after gather", 2, 3),
        ("shared", "zero3", "before seen", 1, 2),
        ("shared", "zero3", "after seen", 0, 2),
        ("shared", "zero3", "after reduce", 2, 3),
        ("shared", "zero2", "after gather", 0, 2),
        *(
            (carrier, *case)
            for carrier in CARRIERS
            for case in [
                ("zero2", "before reduce", 1, 2),
                ("ddp", "after agree", 0, 2),
                ("zero1", "between", 1, 2),
                ("zero1", "save", 1, 2),
                ("zero2", "between", 0, 3),
            ]
        ),
    ],
)
def test_a_rank_is_killed(
    carrier: str, strategy: str, moment: str, rank: int, world: int, pool: Pool, tmp_path: Path
) -> None:
    results = run(pool, carrier, strategy, moment, "kill", rank, tmp_path, world)
    assert results[rank].signal == signal.SIGKILL
    for other in set(range(world)) - {rank}:
        error = results[other].exception
        assert isinstance(error, PeerLost), results[other].error
        assert error.what.startswith(f"rank {rank} is gone; rank {other} was in '")
        how = "it was killed, ended early or lost its network ("
        assert error.cause.startswith(how + "its process has ended)" * (carrier == "shared"))
        assert error.remedy == f"see the log of rank {rank}"
        assert after(tmp_path, results[other]) < SLACK
    assert {p.name for p in tmp_path.iterdir()} == {"done"}  # no half checkpoint


@pytest.mark.parametrize(("carrier", "moment"), [("gloo", "before gather"), ("shared", "before seen")])
@pytest.mark.parametrize("deed", ["kill", "raise"])
def test_ranks_that_do_not_speak_with_it_name_it_too(
    deed: str, carrier: str, moment: str, pool: Pool, tmp_path: Path
) -> None:
    """2 copies x 2 ranks: rank 0 gathers with rank 1 only. Rank 3 goes, rank 2 sees it, and rank 0 sees rank 2 end."""
    results = run(pool, carrier, "zero3", moment, deed, 3, tmp_path, world=4, copy=2)
    for other in range(3):
        error = results[other].exception
        assert isinstance(error, PeerLost), results[other].error
        assert error.what.startswith(("rank 3 is gone; ", "rank 3 failed; "))
        assert after(tmp_path, results[other]) < SLACK


@on_every_carrier
@pytest.mark.parametrize(("deed", "code"), [("leave 0", 0), ("leave 7", 7), ("exit 3", 3)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_leaves(deed: str, code: int, rank: int, carrier: str, pool: Pool, tmp_path: Path) -> None:
    results = run(pool, carrier, "zero3", "forward", deed, rank, tmp_path)
    assert results[rank].exit_code == code
    error = results[1 - rank].exception
    assert isinstance(error, PeerLost)
    how = f"rank {rank} failed" if deed == "exit 3" else f"rank {rank} is gone"
    assert error.what.startswith(f"{how}; rank {1 - rank} was in '")
    assert "SystemExit: 3" in error.cause if deed == "exit 3" else "ended early" in error.cause
    assert after(tmp_path, results[1 - rank]) < SLACK


@on_every_carrier
def test_a_rank_finishes_early_between_steps(carrier: str, pool: Pool, tmp_path: Path) -> None:
    for result in run(pool, carrier, "ddp", "between", "exit 0", 1, tmp_path):
        assert isinstance(result.exception, DivergedError)
        ways = "rank 0 (reduces gradients of leaf turn 2|ends step 2); rank 1 has finished and closes the job"
        assert re.fullmatch(f"ranks do different things: {ways}", result.exception.what)
        assert after(tmp_path, result) < SLACK


def test_a_rank_finishes_early_within_a_step(pool: Pool, tmp_path: Path) -> None:
    """The others wait in a planned transfer, which the one that closes the job never comes to."""
    results = run(pool, "gloo", "zero3", "forward", "exit 0", 1, tmp_path)
    for rank, result in enumerate(results):
        assert isinstance(result.exception, PeerLost)
        assert result.exception.what.startswith(f"rank 1 has finished and closes the job; rank {rank} was in '")
        assert result.exception.cause == "it left earlier than the others, perhaps by sys.exit()"
        assert after(tmp_path, result) < SLACK


def test_a_rank_finishes_early_before_it_reduces(pool: Pool, tmp_path: Path) -> None:
    """In shared memory the others have come to the vote, which waits for no transfer."""
    for result in run(pool, "shared", "zero3", "before reduce", "exit 0", 1, tmp_path):
        assert isinstance(result.exception, DivergedError)
        ways = "rank 0 ends step 2; rank 1 has finished and closes the job"
        assert result.exception.what == f"ranks do different things: {ways}"
        assert after(tmp_path, result) < SLACK


def slow_to_leave(name: str) -> None:
    """Rank 1 waits for rank 0, rank 2 for rank 1 only. Who fails takes its time to leave."""
    with timed():
        carrier, _ = find_carrier(TIMEOUT, name)
        Group("all", range(3), carrier).share("all", b"here")
        time.sleep(0.3)
        try:
            if carrier.rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            pair = Group("pair", [carrier.rank - 1, carrier.rank], carrier)
            pair.share("chain", b"x")
        except PeerLost as error:
            error.seconds = time.monotonic()
            time.sleep(TIMEOUT)
            raise


@on_every_carrier
def test_nobody_waits_for_a_rank_that_is_slow_to_leave(carrier: str, pool: Pool) -> None:
    """Not even without the store, which rank 0 has taken along."""
    _, first, second = pool.start(slow_to_leave, carrier, world=3).results(3 * TIMEOUT)
    for rank, result in ((1, first), (2, second)):
        assert isinstance(result.exception, PeerLost), result.error
        assert result.exception.what == f"rank 0 is gone; rank {rank} was in 'chain pair #1'"
    assert abs(first.exception.seconds - second.exception.seconds) < 1


def leaves_at_once(carrier: str) -> None:
    """Rank 0 serves the store, where its reason is."""
    with timed(), shoal.init("ddp", run_dir="none", timeout=TIMEOUT, carrier=carrier) as job:
        job.mean(1.0)
        if job.rank == 1:
            job.mean(1.0)
        try:
            with job:
                boom()
        except Boom:
            os._exit(1)


@on_every_carrier
def test_its_reason_is_heard_before_the_store_goes(carrier: str, pool: Pool) -> None:
    _, result = pool.start(leaves_at_once, carrier).results(TIMEOUT + SLACK)
    assert isinstance(result.exception, PeerLost), result.error
    assert result.exception.what == "rank 0 failed; rank 1 was in 'meet world #1'"
    assert result.exception.cause == "Boom: on purpose"
