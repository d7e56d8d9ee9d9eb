"""Optimizers that nobody prepared: when ranks are told to have drifted apart, and when not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import shoal
from shoal.comm.threads import run
from shoal.dropin.strays import digest, power_of_eight

Program = Callable[[shoal.Job], None]


def stepped(rate: float) -> None:
    shoal.seed(3, 0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def prepared(job: shoal.Job) -> None:
    """What shoal itself updates is no stray, though ranks hold other pieces."""
    model = nn.Linear(64, 64)
    model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()


PROGRAMS: dict[str, tuple[Program, bool]] = {
    "other updates": (lambda job: stepped(0.1 + job.rank), True),
    "the same updates": (lambda _job: stepped(0.1), False),
    "on one rank only": (lambda job: stepped(0.1) if job.rank else None, False),
    "prepared": (prepared, False),
    "nothing": (lambda _job: None, False),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_said_at_the_end(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, told = PROGRAMS[name]

    def rank_main(_rank: int) -> None:
        with shoal.init("zero1", run_dir="none", device="cpu") as job:
            program(job)

    run(2, rank_main)
    said = capsys.readouterr().err
    assert ("replicas drifted apart: after 1 steps of SGD" in said) is told
    assert ("job.prepare(model, optimizer), or shoal.DistributedDataParallel(model), does" in said) is told


def test_digests() -> None:
    """Of values, their order, and which tensor has them; the same for the same."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    found = [digest(x) for x in ([a, b], [a.flip(0), b], [b, a], [a, b + 1e-7], [a.double(), b], [])]
    assert len(set(found)) == 6 - (torch.equal(b, b + 1e-7))
    assert digest([a.clone(), b.clone(), torch.empty(0), torch.empty(3, device="meta")]) == found[0]
    assert [n for n in range(1, 600) if power_of_eight(n)] == [1, 8, 64, 512]
    assert not power_of_eight(0)
