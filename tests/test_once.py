"""`job.once` and `job.main`: work that one rank does for others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shoal
from shoal import once as module
from shoal.comm.group import current
from shoal.comm.threads import run
from shoal.errors import DivergedError, PeerFailed, SettingError
from tests.test_collectives import together


def test_one_rank_works_and_all_hear_of_it() -> None:
    worked: list[int] = []

    def body(job: shoal.Job) -> dict[str, object]:
        def work() -> dict[str, object]:
            worked.append(job.rank)
            return {"path": "data/train.bin", "rows": 3}

        return job.once(work)

    assert together(3, body, order=4) == [{"path": "data/train.bin", "rows": 3}] * 3
    assert worked == [0]


def test_one_rank_of_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 2 are on one host, 1 and 3 on another; what is for the job is done once."""

    def place() -> bytes:
        here = current.get()
        assert here is not None
        return bytes([here.rank % 2])

    def body(job: shoal.Job) -> tuple[int, int]:
        return job.once(lambda: job.rank), job.once(lambda: job.rank, per="job")

    monkeypatch.setattr(module, "_place", place)
    assert together(4, body) == [(0, 0), (1, 0), (0, 0), (1, 0)]


def test_a_failure_is_told_to_all_and_the_job_goes_on() -> None:
    def work() -> None:
        raise FileNotFoundError("no mirror has it")

    def body(job: shoal.Job) -> int:
        kind = FileNotFoundError if job.main else PeerFailed
        with pytest.raises(kind, match=r"no mirror has it") as caught:
            job.once(work)
        if not job.main:
            assert "shoal[E32] job.once failed on rank 0: FileNotFoundError" in str(caught.value)
        return job.reduce(1)

    assert together(3, body) == [3, 3, 3]


def test_what_was_raised_comes_first() -> None:
    def work() -> None:
        raise FileNotFoundError("no mirror has it")

    with pytest.raises(FileNotFoundError):
        together(2, lambda job: job.once(work))


def test_what_cannot_be_told() -> None:
    with pytest.raises(SettingError, match=r"the function returned a Tensor, which the other ranks cannot be told"):
        together(2, lambda job: job.once(lambda: torch.zeros(1)))
    with pytest.raises(SettingError, match=r"job.once\(per='hosts'\)[\s\S]*did you mean 'host'"):
        together(2, lambda job: job.once(lambda: None, per="hosts"))


def test_calls_of_the_job_inside_are_named() -> None:
    with pytest.raises(DivergedError, match=r"rank 0 is in job.reduce; rank 1 is in job.once"):
        together(2, lambda job: job.once(lambda: job.reduce(1)))


def test_a_sharded_model_is_served_meanwhile() -> None:
    """Who waits takes part in gathering: the one that works may look at its model's outputs."""

    def body(job: shoal.Job) -> float:
        model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 1))
        model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

        def work() -> float:
            with torch.no_grad():
                return model.eval()(torch.ones(1, 4)).item()

        return job.once(work)

    assert len(set(together(2, body, strategy="zero3"))) == 1


def test_main_is_rank_0() -> None:
    def body(job: shoal.Job) -> list[bool]:
        with job.main as here:
            return [bool(job.main), here]

    assert together(2, body) == [[True, True], [False, False]]


def test_threads_share_one_place() -> None:
    places: list[bytes] = []
    run(2, lambda _rank: places.append(module._place()))
    assert places[0] == places[1]
