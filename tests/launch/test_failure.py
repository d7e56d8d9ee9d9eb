"""Which rank is to blame, and what is said about the others."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from shoal.launch.failure import Ended, Failure, exit_code, first_failure, report


def failure(rank: int, time: float, **changed: object) -> Failure:
    fields = {
        "rank": rank,
        "time": time,
        "type": "ValueError",
        "message": "boom\nmore",
        "code": None,
        "traceback": "Traceback (most recent call last):\nValueError: boom\nmore\n",
        "exit_code": 1,
        "secondary": False,
    }
    return Failure.model_validate(fields | changed)


def ended(rank: int, time: float, **changed: object) -> Ended:
    return Ended(rank=rank, code=1, time=time + 0.5, failure=failure(rank, time, **changed))


FINE = Ended(rank=0, code=0, time=9.0)
TOLD = Ended(rank=1, code=-15, time=1.0, by_launcher=True)
PEER = ended(2, 2.0, secondary=True, type="shoal.errors.PeerLost", message="shoal[E30] rank 3 left", code="E30")
LATER = ended(3, 3.0)
LATEST = ended(4, 4.0)
KILLED = Ended(rank=5, code=-9, time=3.5, last_words="one\ntwo")


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ([FINE, TOLD], None),
        ([FINE, TOLD, PEER], PEER),  # nobody else is left to blame
        ([FINE, PEER, LATER], LATER),  # though the peer failed earlier
        ([LATER, LATEST], LATER),
        ([KILLED, LATEST, PEER], KILLED),
        ([KILLED, LATER], LATER),
    ],
)
def test_first_failure_in_any_order(ends: list[Ended], first: Ended | None) -> None:
    assert {first_failure(order) for order in permutations(ends)} == {first}


def test_report_has_the_first_traceback_first() -> None:
    assert report([FINE, TOLD, PEER, LATER, KILLED]).splitlines() == [
        "rank 3 failed:",
        "Traceback (most recent call last):",
        "ValueError: boom",
        "more",
        "rank 0 had finished",
        "rank 1 was ended by shoal run",
        "rank 2: shoal.errors.PeerLost: shoal[E30] rank 3 left",
        "rank 5 was killed by SIGKILL",
    ]
    assert report([FINE]) == ""


def test_report_of_a_killed_rank() -> None:
    assert report([KILLED]).splitlines() == [
        "rank 5 was killed by SIGKILL",
        "  cause: most often the machine ran out of memory",
        "  its last words:",
        "    one",
        "    two",
    ]


@pytest.mark.parametrize(
    ("end", "text", "code"),
    [
        (FINE, "rank 0 had finished", 0),
        (LATER, "rank 3: ValueError: boom", 1),
        (Ended(rank=1, code=-11, time=0), "rank 1 was killed by SIGSEGV", 1),
        (Ended(rank=1, code=-40, time=0), "rank 1 was killed by signal 40", 1),
        (Ended(rank=1, code=7, time=0), "rank 1 left with exit code 7 and no traceback", 1),
        (ended(1, 0, type="SystemExit", message="bye"), "rank 1 left with exit code 1: bye", 1),
        (ended(1, 0, code="E02", exit_code=2, message="no"), "rank 1: ValueError: no", 2),
        (ended(1, 0, code="E40", exit_code=4, message="no"), "rank 1: ValueError: no", 4),
        (ended(1, 0, code=None, exit_code=4, message="no"), "rank 1: ValueError: no", 1),
    ],
)
def test_one_rank_in_one_line(end: Ended, text: str, code: int) -> None:
    assert (str(end), exit_code([end])) == (text, code)


def test_a_failure_comes_back_from_its_file(tmp_path: Path) -> None:
    failure(1, 2.5).write(tmp_path / "failure-1.json")
    assert Failure.read(tmp_path / "failure-1.json") == failure(1, 2.5)
    assert [p.name for p in tmp_path.iterdir()] == ["failure-1.json"]


@pytest.mark.parametrize("content", [b'{"rank": 1', b'{"rank": 1}', b"\xff", None])
def test_half_a_failure_is_none(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "failure-1.json"
    if content is not None:
        path.write_bytes(content)
    assert Failure.read(path) is None
