"""A small training program in which one rank does something that ends it, or stops it, at a given moment."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import shoal
from shoal import start
from shoal.checkpoint import write
from shoal.comm import watch
from shoal.comm.common import Seen
from shoal.errors import ShoalError
from tests.pool import Result

TIMEOUT = 3.0  # of every job here
SLACK = 2.0  # seconds by which nothing may outlast its time-out, or the end of another rank


class Boom(Exception):
    """What a rank raises on purpose."""


def boom() -> None:
    raise Boom("on purpose")


def compute(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.randn(64, 64).matmul(torch.randn(64, 64))


DEEDS: dict[str, Callable[[], object]] = {
    "raise": boom,
    "exit 0": lambda: sys.exit(0),
    "exit 3": lambda: sys.exit(3),
    "leave 0": lambda: os._exit(0),
    "leave 7": lambda: os._exit(7),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "nap": lambda: time.sleep(TIMEOUT + 1.5),
    "compute": lambda: compute(TIMEOUT + 1.5),
}


class Moment:
    """Does the deed once, on one rank, when its moment has come; says when in a file."""

    def __init__(self, wanted: str, deed: str, folder: str) -> None:
        self.wanted, self.deed, self.folder, self.armed = wanted, deed, Path(folder), False

    def come(self, moment: str) -> None:
        if self.armed and moment == self.wanted:
            self.armed = False
            if self.deed in ("stop", "nap", "compute"):
                time.sleep(0.3)  # marks are published every 0.2 s
            (self.folder / "done").write_text(str(time.monotonic()))
            DEEDS[self.deed]()


def net() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(65, 65), nn.Tanh()) for _ in range(3)))


CARRIERS = ("gloo", "shared")


def program(
    carrier: str, strategy: str, moment: str, deed: str, rank: int, folder: str, ranks_per_copy: int | None = None
) -> str:
    """Train 5 steps; from step 2 on `rank` waits for its moment.

    Moments: "between", "forward", "gradient" (a hook in backward), "clip", "save" (a file is being written), "whole",
    "end"; or "before VERB" and "after VERB" of a transfer; or "before seen" and "after seen" of a wait for memory that
    the ranks of a host have in common.
    """
    grid = {} if ranks_per_copy is None else {"ranks_per_copy": ranks_per_copy}
    with timed(), shoal.init(strategy, run_dir="none", timeout=TIMEOUT, carrier=carrier, **grid) as job:
        model, at = net(), Moment(moment, deed, folder)
        model, optimizer = job.prepare(model, torch.optim.Adam(model.parameters()))
        model[0].register_forward_pre_hook(lambda *_: at.come("forward"))
        model[1][0].weight.register_hook(lambda _grad: at.come("gradient"))
        with transfers_told(job, at), writing_told(at):
            for step in range(5):
                at.armed = at.armed or (step == 2 and job.rank == rank)
                at.come("between")
                model(torch.randn(4, 65)).sum().backward()
                at.come("clip")
                job.clip_grad_norm(1.0)
                optimizer.step()
                optimizer.zero_grad()
                if moment == "save" and step == 2:
                    job.save(folder)
                if moment == "whole" and step == 2:
                    with job.whole(model):
                        at.come("whole")
            at.come("end")
    return "finished"


@contextmanager
def transfers_told(job: shoal.Job, at: Moment) -> Iterator[None]:
    carrier, post = job._carrier, job._carrier.post

    def told(label: str, sends: object, receives: object) -> object:
        verb = label.split()[0]
        at.come(f"before {verb}")
        pending = post(label, sends, receives)
        at.come(f"after {verb}")
        return pending

    def seen(self: Seen) -> object:
        at.come("before seen")
        pending = current(self)
        at.come("after seen")
        return pending

    current = Seen.current
    carrier.post, Seen.current = told, seen
    try:
        yield
    finally:
        Seen.current = current
        del carrier.post


@contextmanager
def writing_told(at: Moment) -> Iterator[None]:
    write_file = write.write_file

    def told(*args: object) -> object:
        at.come("save")
        return write_file(*args)

    write.write_file = told
    try:
        yield
    finally:
        write.write_file = write_file


@contextmanager
def timed() -> Iterator[None]:
    """Errors know when they came; what was reported before comes with them. Waits are reported after 1 s here."""
    reports: list[str] = []
    warn, report = start.warn, watch.REPORT
    start.warn, watch.REPORT = reports.append, 1.0
    try:
        yield
    except (ShoalError, Boom) as error:
        error.at = time.monotonic()
        error.reports = reports
        raise
    finally:
        start.warn, watch.REPORT = warn, report


def after(folder: Path, result: Result) -> float:
    """Seconds from the deed to a rank's error."""
    assert result.exception is not None, result.error
    return result.exception.at - float((folder / "done").read_text())
