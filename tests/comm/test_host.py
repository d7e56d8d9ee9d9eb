"""Who shares memory with whom: neighbours if they can, TCP if not, a clear refusal if memory was asked for by name."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoal.comm import host
from shoal.comm.pairwise import Gloo
from shoal.comm.shared_memory import Shared
from shoal.errors import EnvironmentFault
from shoal.start import find_carrier
from tests.comm.carriers import TIMEOUT, world_of
from tests.pool import Pool


def no_memfd() -> None:
    del os.memfd_create


def no_pidfd() -> None:
    def refused(_pid: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    os.pidfd_open = refused


def no_proc() -> None:
    def unreadable(_path: str) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    os.readlink = unreadable


def no_view() -> None:
    host._view = lambda _card, _mine: None


def alone() -> None:
    own = bytes([int(os.environ["RANK"]) + 1]) * 32
    host.identity = lambda: own


REASONS: dict[str, tuple[Callable[[], None], str]] = {
    "memfd": (no_memfd, "this system has no memfd or no pidfd"),
    "pidfd": (no_pidfd, "no memory can be mapped (Operation not permitted)"),
    "proc": (no_proc, "no memory can be mapped (No such file or directory)"),
    "view": (no_view, "processes may not open each other's files under /proc"),
    "alone": (alone, "no other rank is on its host"),
}


def joined(name: str, missing: str, on_rank: int) -> tuple[str, list[bytes]]:
    """What `find_carrier` returns in a process that lacks something; then all exchange something."""
    saved = os.memfd_create, os.pidfd_open, os.readlink, host._view, host.identity
    if missing and on_rank in (-1, int(os.environ["RANK"])):
        REASONS[missing][0]()
    try:
        carrier, _ = find_carrier(TIMEOUT, name)
    finally:
        os.memfd_create, os.pidfd_open, os.readlink, host._view, host.identity = saved
    said = world_of(carrier).share("all", bytes([carrier.rank]))
    assert not carrier.sent["host"]  # what it took to find that out is of no model
    carrier.close()
    return type(carrier).__name__, said


EVERYBODY = [b"\0", b"\1"]


def test_processes_of_a_host_share_memory(pool: Pool) -> None:
    assert pool.run(joined, "auto", "", -1) == [(Shared.__name__, EVERYBODY)] * 2
    assert pool.run(joined, "gloo", "", -1) == [(Gloo.__name__, EVERYBODY)] * 2


@pytest.mark.parametrize("on_rank", [-1, 1])
@pytest.mark.parametrize("missing", REASONS)
def test_where_they_cannot_they_speak_over_tcp(missing: str, on_rank: int, pool: Pool) -> None:
    """All of them, even if only one cannot."""
    assert pool.run(joined, "auto", missing, on_rank) == [(Gloo.__name__, EVERYBODY)] * 2


@pytest.mark.parametrize("missing", REASONS)
def test_asked_for_by_name_it_is_refused(missing: str, pool: Pool) -> None:
    for rank, result in enumerate(pool.start(joined, "shared", missing, -1).results(10)):
        assert isinstance(result.exception, EnvironmentFault), result.error
        assert str(result.exception) == (
            f"shoal[E50] rank {rank} shares no memory with other ranks: {REASONS[missing][1]}\n"
            '  try:   carrier="auto", or carrier="gloo"'
        )


def test_a_rank_of_another_host_is_not_a_neighbour(pool: Pool) -> None:
    """One of three is elsewhere: the other two share memory."""
    results = pool.run(joined, "auto", "alone", 2, world=3)
    everybody = [b"\0", b"\1", b"\2"]
    assert results == [("Shared", everybody), ("Shared", everybody), ("Gloo", everybody)]


def test_an_arena_must_be_the_one_that_is_meant() -> None:
    """A number of a process or of a file may mean another one meanwhile."""
    arena, _, why = host._arena(2)
    assert arena is not None, why
    arena.map[8:24] = b"n" * 16
    me, fd = os.getpid().to_bytes(8, "little"), arena.fd.to_bytes(8, "little")
    assert host._view(bytes(32) + me + fd + b"n" * 16, arena) is not None
    assert host._view(bytes(32) + me + fd + b"m" * 16, arena) is None
    assert host._view(bytes(32) + me + (10**6).to_bytes(8, "little") + b"n" * 16, arena) is None
    arena.close()


def killed() -> None:
    carrier, _ = find_carrier(TIMEOUT, "shared")
    common = carrier.common("common", [0, 1], 10**6, torch.float32, torch.device("cpu"))
    assert common is not None
    common.data.fill_(1)
    world_of(carrier).share("all", b"x")
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_is_left_behind(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory has no name: it goes with its processes, however they end."""
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir("/dev/shm"))
    for result in pool.start(killed).results(15):
        assert result.signal == signal.SIGKILL, result.error
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "shoal" in name]
    assert not list(tmp_path.iterdir())


def several() -> list[int]:
    """File descriptors of arenas and neighbours after each of several jobs."""
    left = []
    for _ in range(3):
        carrier, _ = find_carrier(TIMEOUT, "shared")
        world_of(carrier).share("all", b"x")
        carrier.close()
        del carrier  # what is mapped goes with the last tensor in it
        gc.collect()
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _there(fd)]
        left.append(len([name for name in links if "memfd:shoal" in name or "pidfd" in name]))
    return left


def _there(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_closed_job_leaves_no_files_open(pool: Pool) -> None:
    assert pool.run(several) == [[0, 0, 0]] * 2
