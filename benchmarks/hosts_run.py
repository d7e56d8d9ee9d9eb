"""One plan on hosts of one rank each: processes that train, tell what they saw, and may be killed by a cap."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from statistics import median
from typing import TYPE_CHECKING, TypedDict, cast

import measure
import torch
from models import Blocks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from shoal import init

if TYPE_CHECKING:
    from tests.hosts import Host  # of this repository, which is not on the path before a network is open

PORTS = count(29600)
"""A port of its own for each run: hosts live longer than one."""
RATE = 1e-3
WARM_UP = 1
"""Steps before those that count: the optimizer makes its state, and shoal's first leaf runs without overlap."""


class Failed(Exception):
    """A rank raised, or said nothing in time."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained, whoever does it. `draw(step, first, samples)` gives that part of a step's global batch."""

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[int, int, int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    samples: int  # of a step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a step is done: in so many micro-batches in all, by a strategy of shoal's or in "plain" PyTorch."""

    strategy: str
    parts: int
    recompute: bool = False

    def __str__(self) -> str:
        return f"{self.strategy}, {self.parts} micro-batches{', recomputing' if self.recompute else ''}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A plan for some work. `hashed`: compare bits at the end, for which all parameters come together."""

    work: Work
    plan: Plan
    steps: int
    hashed: bool = False
    patience: float = 300.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A rank among those of all hosts."""

    rank: int
    world: int
    master: str
    port: int


class Told(TypedDict, total=False):
    """What a rank says. `bits`: a hash of all parameters at the end."""

    failed: str
    seconds: list[float]
    bits: str


@dataclass(frozen=True, kw_only=True)
class Ran:
    """`seconds` of a step: the median of the slowest rank. `peak`: of the fullest rank."""

    seconds: float
    bits: str
    peak: int


def recomputed(model: nn.Module) -> nn.Module:
    """Blocks keep their inputs alone and run again in the backward."""
    blocks: Blocks = model  # type: ignore[assignment]
    for block in blocks.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def made(work: Work, plan: Plan) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = recomputed(work.build()) if plan.recompute else work.build()
    return model, torch.optim.AdamW(model.parameters(), lr=RATE, foreach=False)


# ---------------------------------------------------------------- a rank


def _plain(work: Work, plan: Plan, place: Seat, steps: int, _hashed: bool) -> Told:
    """Plain PyTorch on this rank's part of the batch alone."""
    model, optimizer = made(work, plan)
    mine, parts = work.samples // place.world, plan.parts // place.world
    seconds: list[float] = []
    for step in range(WARM_UP + steps):
        start = time.perf_counter()
        for part in range(parts):
            inputs, targets = work.draw(step, place.rank * mine + part * (mine // parts), mine // parts)
            (work.loss(model(inputs), targets) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return Told(seconds=seconds[WARM_UP:], bits="")


def _shoal(work: Work, plan: Plan, _place: Seat, steps: int, hashed: bool) -> Told:
    strategy, _, pending = plan.strategy.partition(" ")
    with init(
        strategy, leaves=plan.parts, pending=bool(pending), run_dir="none", device="cpu", timeout=300.0
    ) as job:  # fmt: skip
        model, optimizer = job.prepare(*made(work, plan))
        each, seconds = work.samples // plan.parts, list[float]()
        start = time.perf_counter()
        numbers = cast("Dataset[int]", range(plan.parts * (WARM_UP + steps)))
        for number in job.loader(numbers, global_batch=plan.parts, shuffle=False):
            step, part = divmod(int(number), plan.parts)
            inputs, targets = work.draw(step, part * each, each)
            work.loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            if job.stepped:
                seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
        bits = hashlib.sha256()
        if hashed:
            with job.whole(model):
                for parameter in model.parameters():
                    bits.update(parameter.detach().numpy().tobytes())
        return Told(seconds=seconds[WARM_UP:], bits=bits.hexdigest())


def _rank_main(job: Job, place: Seat, host: Host, log: int, answer: Connection) -> None:
    measure.die_with_parent(signal.SIGKILL)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        host.enter()
        for name in [name for name in os.environ if name.startswith("SHOAL_")]:
            del os.environ[name]  # settings of the environment would win over the plan's
        numbers = {"RANK": place.rank, "LOCAL_RANK": 0, "WORLD_SIZE": place.world, "LOCAL_WORLD_SIZE": 1}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": place.master, "MASTER_PORT": str(place.port), "GLOO_SOCKET_IFNAME": "eth0"}
        torch.set_num_threads(1)
        act = _plain if job.plan.strategy == "plain" else _shoal
        told = act(job.work, job.plan, place, job.steps, job.hashed)
    except BaseException:
        told = Told(failed=traceback.format_exc())
    answer.send_bytes(json.dumps(told).encode())
    answer.poll(None)  # until it is killed: others may still need its connections


# ---------------------------------------------------------------- all of them


def ran(job: Job, hosts: Sequence[Host]) -> Ran | None:
    """Run it with one rank on each host.

    Returns:
        What was seen; None if a rank needed more memory than its host has.

    Raises:
        Failed: a rank raised or was silent for `patience` seconds.
    """
    fork, port = multiprocessing.get_context("fork"), next(PORTS)
    ranks: list[tuple[Connection, BaseProcess]] = []
    with tempfile.TemporaryFile() as log:
        try:
            for rank, host in enumerate(hosts):
                place = Seat(rank=rank, world=len(hosts), master=hosts[0].address, port=port)
                answer, theirs = fork.Pipe()
                process = fork.Process(target=_rank_main, args=(job, place, host, log.fileno(), theirs), daemon=True)
                process.start()
                theirs.close()
                ranks.append((answer, process))
            told = _hear(job, ranks)
        finally:
            for _, process in ranks:
                process.kill()
                process.join()
    if told is None:
        return None
    bits = {t.get("bits", "") for t in told}
    if len(bits) != 1:
        raise Failed(f"{job.plan}: ranks end with different bits: {sorted(bits)}")
    return Ran(
        seconds=max(median(t.get("seconds", [])) for t in told), bits=bits.pop(), peak=max(map(cgroup_peak, hosts))
    )


def _hear(job: Job, ranks: Sequence[tuple[Connection, BaseProcess]]) -> list[Told] | None:
    heard: dict[int, Told] = {}
    ends = time.monotonic() + job.patience
    while len(heard) < len(ranks):
        silent = {answer: rank for rank, (answer, _) in enumerate(ranks) if rank not in heard}
        ready = wait(list(silent), max(0.0, ends - time.monotonic()))
        if not ready:
            raise Failed(f"{job.plan}: ranks {sorted(silent.values())} said nothing for {job.patience:g} s")
        for answer in ready:
            rank = silent[answer]
            try:
                told: Told = json.loads(ranks[rank][0].recv_bytes())
            except EOFError:
                told = Told(failed="it ended")
            if "failed" in told:
                if _killed(ranks):
                    return None
                raise Failed(f"{job.plan}: rank {rank} failed: {told['failed']}")
            heard[rank] = told
    return [heard[rank] for rank in sorted(heard)]


def _killed(ranks: Sequence[tuple[Connection, BaseProcess]]) -> bool:
    """Has the kernel killed one? The others may have said first that they miss it."""
    ends = time.monotonic() + 3
    while time.monotonic() < ends:
        if any(process.exitcode == -signal.SIGKILL for _, process in ranks):
            return True
        time.sleep(0.05)
    return False


def cgroup_peak(host: Host) -> int:
    """Bytes that all processes of a host together had at most since it was made; 0 if its memory has no limit."""
    for group in host.groups:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):  # version 1, version 2
            if (group / name).exists():
                return int((group / name).read_text())
    return 0
