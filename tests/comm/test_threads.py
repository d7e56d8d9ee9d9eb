"""Ranks that are threads: one baton, own random numbers, deadlocks seen at once."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch

from shoal.comm.group import Group, current
from shoal.comm.threads import run
from shoal.errors import PeerLost, StalledError
from shoal.random import everything
from shoal.start import find_carrier


def world() -> Group:
    carrier, seat = find_carrier(1.0)
    assert not seat.own_process
    return Group("world", range(carrier.size), carrier)


def test_results_come_rank_by_rank() -> None:
    assert run(3, lambda rank: rank * rank) == [0, 1, 4]
    assert run(1, lambda _rank: world().share("x", b"y")) == [[b"y"]]
    assert current.get() is None


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_rank_has_its_own_generators(seed: int | None) -> None:
    """Draws between exchanges are those of a rank that runs alone; the caller's go on where they were."""

    def program(rank: int) -> list[tuple[float, float, float]]:
        everything(rank)
        group, drawn = world(), []
        for _ in range(4):
            drawn.append(draw())
            group.share("step", b"")
            group.share("step", b"x")
        return drawn

    def alone(rank: int) -> list[tuple[float, float, float]]:
        everything(rank)
        return [draw() for _ in range(4)]

    everything(99)
    before = draw()
    everything(99)
    got = run(3, program, seed=seed)
    assert draw() == before
    assert got == [alone(rank) for rank in range(3)]


def test_the_order_is_shuffled_by_seed() -> None:
    def order(seed: int | None) -> list[int]:
        ran: list[int] = []

        def program(_rank: int) -> None:
            group = world()
            for _ in range(5):
                ran.append(group.rank)
                group.share("step", b"x")

        run(4, program, seed=seed)
        return ran

    assert order(None) == order(None)
    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in (None, 1, 2, 3)}) > 2


def test_one_rank_runs_at_a_time() -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def program(_rank: int) -> None:
        nonlocal inside, most
        group = world()
        for _ in range(3):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.002)
            with lock:
                inside -= 1
            group.share("step", b"x")

    run(3, program)
    assert most == 1


def test_a_deadlock_is_seen_at_once() -> None:
    def program(rank: int) -> None:
        group = world()
        group.share("before", b"")
        group.carrier.note(f"does what rank {rank} does")
        group.share("here" if rank else "there", b"x")

    begin = time.monotonic()
    with pytest.raises(StalledError) as caught:
        run(3, program)
    assert time.monotonic() - begin < 1
    assert str(caught.value).splitlines() == [
        "shoal[E31] all ranks wait for each other; rank 0 in 'there world #2'",
        "  cause: ranks do different things; their last marks:",
        "    rank 0: 'there world #2' (does what rank 0 does)",
        "    rank 1: 'here world #2' (does what rank 1 does)",
        "    rank 2: 'here world #2' (does what rank 2 does)",
    ]


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_rank_s_own_error_comes_first(seed: int | None) -> None:
    errors: dict[int, str] = {}

    def program(rank: int) -> None:
        group = world()
        if rank == 2:
            raise ValueError("boom")
        try:
            group.share("step", b"x")
        except PeerLost as e:
            errors[rank] = str(e)
            raise

    with pytest.raises(ValueError, match="boom"):
        run(3, program, seed=seed)
    lost = "shoal[E30] rank 2 left while rank {} waited in 'step world #1'\n  cause: it raised ValueError: boom"
    assert errors == {rank: lost.format(rank) for rank in (0, 1)}


def test_a_rank_that_returned_is_missed() -> None:
    with pytest.raises(PeerLost) as caught:
        run(2, lambda rank: None if rank else world().share("step", b"x"))
    assert (
        str(caught.value) == "shoal[E30] rank 1 left while rank 0 waited in 'step world #1'\n  cause: it had returned"
    )
