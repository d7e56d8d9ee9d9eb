"""One contender in processes of its own: every rank runs the same loop, tells what it saw, and is killed.

A visit either counts time or weighs: what looks at memory would disturb the clock.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypedDict, TypeVar

import measure
import torch
from contenders import Contender, Trained, plain
from models import Model
from networks import LOOPBACK, Place

WARM_UP = 2
"""Steps before those that count: shoal's first leaf and torch DDP's first step run without overlap."""
LOOK = 0.05
"""Seconds between two looks at the pages of a rank that is weighed."""

N = TypeVar("N", int, float)


class Told(TypedDict, total=False):
    """What a rank says; each list has an entry per step that counts. Bytes are above those before its model was made.

    `failed`: a traceback, and then nothing else. `before`: PSS before the model was made, said when that is to come.
    `machine`: seconds that all processors together were busy. `wire`, `payload`: bytes of a step. `events`: what
    `timeline.py` saw.
    """

    failed: str
    before: int | None
    seconds: list[float]
    cpu_seconds: list[float]
    machine: float | None
    wire: float | None
    payload: float | None
    loss: float
    at_rest: int | None
    peak: int | None
    pss: int | None
    events: list[tuple[float, str]]


class VisitFailed(Exception):
    """A rank failed, or was silent for too long; says all that is known."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all ranks of a visit do. `look`: instead of counting time or weighing."""

    contender: Contender
    model: Model
    steps: int
    weigh: bool = False
    patience: float = 120.0  # seconds that the visit may take
    look: Callable[[Task, int, Callable[[Told], None]], None] | None = None


# ---------------------------------------------------------------- a rank


def _since(now: N | None, before: N | None) -> N | None:
    return None if now is None or before is None else now - before


def _per(total: int | None, steps: int) -> float | None:
    return None if total is None else total / steps


def _one_step(trained: Trained, model: Model, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The loop's inside, the same for everybody."""
    inputs, targets = batch
    loss = model.loss(trained.model(inputs), targets)
    trained.backward(loss)
    trained.step()
    return loss.detach()


def clocked(task: Task, rank: int, interface: str, tell: Callable[[Told], None]) -> None:
    """Steps, each with its time."""
    seconds: list[float] = []
    cpu: list[float] = []
    with task.contender.open(task.model) as trained:
        for step in range(WARM_UP):
            loss = _one_step(trained, task.model, task.model.batch(step, rank))
        machine, wire = measure.machine_seconds(), measure.wire_bytes(interface)
        payload = trained.sent() if trained.sent else None
        for step in range(WARM_UP, WARM_UP + task.steps):
            batch = task.model.batch(step, rank)
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = _one_step(trained, task.model, batch)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
        told = Told(
            seconds=seconds,
            cpu_seconds=cpu,
            machine=_since(measure.machine_seconds(), machine),
            wire=_per(_since(measure.wire_bytes(interface), wire), task.steps),
            payload=_per(_since(trained.sent() if trained.sent else None, payload), task.steps),
            loss=loss.item(),
        )
        tell(told)


def weighed(task: Task, rank: int, tell: Callable[[Told], None]) -> None:
    """Steps to warm up, then one under observation.

    Note: what is above what. A step of the plain model comes first, so that what libraries load and keep for themselves
    (47 MiB of MKL's buffers with the large GPT) is there before the contender's model is.
    """
    with plain(task.model) as trained:
        _one_step(trained, task.model, task.model.batch(0, rank))
    del trained
    measure.trim()
    heap, shared = measure.heap(), measure.proportional(field="Pss_Shmem")
    tell(Told(before=measure.proportional()))
    with task.contender.open(task.model) as trained:
        for step in range(WARM_UP):
            _one_step(trained, task.model, task.model.batch(step, rank))
        measure.trim()
        mapped = _since(measure.proportional(field="Pss_Shmem"), shared) or 0
        rest = _since(measure.heap(), heap)
        with measure.Highest() as highest:
            _one_step(trained, task.model, task.model.batch(WARM_UP, rank))
        peak = _since(highest.bytes, heap)
        tell(Told(at_rest=None if rest is None else rest + mapped, peak=None if peak is None else peak + mapped))


def _rank_main(task: Task, place: Place, rank: int, port: int, log: int, answer: Connection) -> None:
    measure.die_with_parent(signal.SIGKILL)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        place.enter[rank]()
        interface = _join(task, place, rank, port)
        task.contender.load()

        def tell(told: Told) -> None:
            answer.send_bytes(json.dumps(told).encode())
            if "before" not in told:
                answer.poll(None)  # until it is killed: torch's process group now and then hangs when it is taken down

        if task.look is not None:
            task.look(task, rank, tell)
        elif task.weigh:
            weighed(task, rank, tell)
        else:
            clocked(task, rank, interface, tell)
    except BaseException:
        answer.send_bytes(json.dumps(Told(failed=traceback.format_exc())).encode())
        answer.poll(None)


def _join(task: Task, place: Place, rank: int, port: int) -> str:
    """The environment that launchers make; gives the interface that carries what is sent."""
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        del os.environ[name]  # settings of the environment would win over the contender's
    world = 1 if task.contender.alone else len(place.enter)
    here = world if place.addresses[rank] == LOOPBACK else 1
    numbers = {"RANK": rank, "LOCAL_RANK": rank % here, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": here}
    interface = measure.interface_of(place.addresses[rank])
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": place.addresses[0], "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": interface}
    torch.set_num_threads(1)
    return interface


# ---------------------------------------------------------------- all of them


@contextmanager
def _ranks(task: Task, place: Place, log: int) -> Iterator[list[tuple[Connection, BaseProcess]]]:
    """Processes that start as copies of this one (torch is imported already) and end with the visit in any case."""
    fork = multiprocessing.get_context("fork")
    port = _free_port()
    made: list[tuple[Connection, BaseProcess]] = []
    try:
        for rank in range(1 if task.contender.alone else len(place.enter)):
            answer, told = fork.Pipe()
            process = fork.Process(target=_rank_main, args=(task, place, rank, port, log, told), daemon=True)
            process.start()
            told.close()
            made.append((answer, process))
        yield made
    finally:
        for _, process in made:
            process.kill()
            process.join()


def visit(task: Task, place: Place) -> list[Told]:
    """Let one contender train.

    Returns:
        What each rank says.

    Raises:
        VisitFailed: with the traceback of the first rank that fails and the last lines that the ranks wrote.
    """
    with tempfile.TemporaryFile() as log, _ranks(task, place, log.fileno()) as ranks:
        try:
            return _hear(task, ranks)
        except VisitFailed as failed:
            written = _end_of(log.fileno())
            raise VisitFailed(f"{failed}\n{written}".rstrip()) from None


def _hear(task: Task, ranks: Sequence[tuple[Connection, BaseProcess]]) -> list[Told]:
    heard: dict[int, Told] = {}
    before: dict[int, int | None] = {}
    most = dict.fromkeys(range(len(ranks)), 0)
    ends = time.monotonic() + task.patience
    while len(heard) < len(ranks):
        left = ends - time.monotonic()
        silent = {answer: rank for rank, (answer, _) in enumerate(ranks) if rank not in heard}
        if left <= 0:
            raise VisitFailed(f"ranks {sorted(silent.values())} said nothing for {task.patience:g} s")
        for answer in wait(list(silent), min(left, LOOK) if task.weigh else left):
            rank = silent[answer]
            told = _receive(rank, *ranks[rank])
            if "before" in told:
                before[rank] = told["before"]
            else:
                heard[rank] = told
        for rank in before:
            most[rank] = max(most[rank], measure.proportional(ranks[rank][1].pid or 0) or 0)
    for rank, base in before.items():
        heard[rank]["pss"] = _since(most[rank] or None, base)
    return [heard[rank] for rank in sorted(heard)]


def _receive(rank: int, answer: Connection, process: BaseProcess) -> Told:
    try:
        told: Told = json.loads(answer.recv_bytes())
    except EOFError:
        process.join(5)
        raise VisitFailed(f"rank {rank} ended with exit status {process.exitcode}") from None
    if "failed" in told:
        raise VisitFailed(f"rank {rank} failed\n{told['failed'].rstrip()}")
    return told


def _end_of(log: int, lines: int = 12) -> str:
    text = os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
