"""Worker processes that stay alive between tests.

    def add(a, b):                                        # at the top of a test module
        return a + b + int(os.environ["RANK"])

    def test_add(pool):
        assert pool.run(add, 1, 2, world=3) == [3, 4, 5]

Each rank is a process of its own with torch imported; a call costs milliseconds. A worker serves again only if its last
call returned a value: one that raised, died, was killed or outlasted its timeout is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds that `run` leaves the others after a first rank failed


class WorkerError(Exception):
    """What the failed ranks of a call said or did."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one rank."""

    value: Any = None
    error: str | None = None  # the text of its traceback, or how it ended without one
    exception: BaseException | None = None  # None if it could not travel
    exit_code: int | None = None  # of a process that ended; -n if by signal n

    @property
    def signal(self) -> int | None:
        return -self.exit_code if self.exit_code is not None and self.exit_code < 0 else None


@dataclass(frozen=True)
class Worker:
    pid: int
    link: Connection


class Nursery:
    """The process that forks workers. See `pool_worker.py`."""

    def __init__(self) -> None:
        self.orders, theirs = Pipe()
        command = [sys.executable, "-Pu", str(Path(__file__).with_name("pool_worker.py"))]
        self.process = subprocess.Popen(
            [*command, str(theirs.fileno()), json.dumps(sys.path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # numpy's threads would not survive the fork either
            start_new_session=True,  # an interrupt from the keyboard is for pytest alone
        )
        theirs.close()

    def fork(self) -> Worker:
        ours, theirs = Pipe()
        try:
            self.orders.send(None)
            send_handle(self.orders, theirs.fileno(), self.process.pid)
            return Worker(self.orders.recv(), ours)
        except (EOFError, OSError) as error:
            ours.close()
            raise RuntimeError(f"the nursery of workers ended with status {self.process.wait(10)}") from error
        finally:
            theirs.close()

    def end(self, worker: Worker) -> int:
        """Kill a worker, unless it has ended. Returns its exit code."""
        os.kill(worker.pid, signal.SIGKILL)  # its pid stays taken until the nursery waits for it
        self.orders.send(worker.pid)
        worker.link.close()
        return self.orders.recv()

    def close(self) -> None:
        self.orders.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Running:
    """A call that several ranks are at."""

    def __init__(self, pool: Pool, workers: list[Worker]) -> None:
        self._pool = pool
        self._workers = workers
        self._busy = {worker.link: rank for rank, worker in enumerate(workers)}
        self._results: dict[int, Result] = {}
        self.pids = [worker.pid for worker in workers]

    @property
    def failed(self) -> list[int]:
        """The ranks that are known to have failed, in the order in which they did."""
        return [rank for rank, result in self._results.items() if result.error is not None]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank. Nothing happens if its result has been taken already."""
        if rank in self._busy.values():
            os.kill(self.pids[rank], number)

    def results(self, timeout: float = 60.0, *, grace: float | None = None) -> list[Result]:
        """What became of every rank, rank by rank. Raises nothing.

        Args:
            timeout: seconds after which ranks without a result are killed.
            grace: seconds that the others have once one rank has failed; None: all that is left of `timeout`.
        """
        deadline = time.monotonic() + timeout
        while self._busy:
            ready = wait(list(self._busy), max(0.0, deadline - time.monotonic()))
            for link in ready:
                self._settle(self._busy.pop(link))
            if not ready:
                self.stop(f"no result in time (timeout {timeout:g} s, grace {grace} s): killed")
            if self.failed and grace is not None:
                deadline = min(deadline, time.monotonic() + grace)
                grace = None
        return [self._results[rank] for rank in range(len(self._workers))]

    def stop(self, why: str) -> None:
        """Kill the ranks that have no result yet, with a traceback of theirs on stderr."""
        if not self._busy:
            return
        for rank in self._busy.values():
            os.kill(self.pids[rank], signal.SIGUSR1)
        wait(list(self._busy), 0.2)
        for rank in self._busy.values():
            self._results[rank] = Result(error=why, exit_code=self._pool.nursery.end(self._workers[rank]))
        self._busy.clear()

    def _settle(self, rank: int) -> None:
        worker = self._workers[rank]
        try:
            good, *said = pickle.loads(worker.link.recv_bytes())
        except (EOFError, OSError):
            code = self._pool.nursery.end(worker)
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"
            self._results[rank] = Result(error=how, exit_code=code)
            return
        if good:
            self._results[rank] = Result(value=said[0])
            self._pool.idle.append(worker)
        else:
            self._results[rank] = Result(error=said[0], exception=_exception(said[1]))
            self._pool.nursery.end(worker)


class Pool:
    """Worker processes for calls of `world` ranks each."""

    def __init__(self) -> None:
        self.nursery = Nursery()
        self.idle: list[Worker] = []
        self._running: list[Running] = []

    def run(
        self,
        function: Callable[..., Any] | str,
        *arguments: Any,
        world: int = 2,
        timeout: float = 60.0,
        ranks_per_host: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Call a function on every rank. Returns its values, rank by rank.

        Args:
            function: a function at the top of its module, or "module:function".
            arguments: the same for every rank; they and the value travel as pickles.
            world: number of ranks.
            timeout: seconds until ranks without a value are killed.
            ranks_per_host: what LOCAL_WORLD_SIZE says; None: the world.
            env: variables beside this process's own and the rank's.

        Raises:
            WorkerError: a rank died or was too slow.
            BaseException: what the first rank to fail raised; its cause is a WorkerError with all tracebacks.
        """
        running = self.start(function, *arguments, world=world, ranks_per_host=ranks_per_host, env=env)
        results = running.results(timeout, grace=GRACE)
        if not running.failed:
            return [result.value for result in results]
        what = WorkerError("\n".join(f"rank {rank}: {results[rank].error}" for rank in running.failed))
        first = results[running.failed[0]].exception
        if first is None:
            raise what
        raise first from what

    def start(
        self,
        function: Callable[..., Any] | str,
        *arguments: Any,
        world: int = 2,
        ranks_per_host: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Running:
        """Like `run`, but come back at once: for ranks that are to be killed or watched."""
        target, payload = _target(function), pickle.dumps(arguments)
        local = ranks_per_host or world
        shared = os.environ | {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        workers = [self._worker() for _ in range(world)]
        running = Running(self, workers)
        self._running.append(running)
        for rank, worker in enumerate(workers):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % local)}
            worker.link.send_bytes(pickle.dumps((target, payload, {**shared, **own, **(env or {})}, str(Path.cwd()))))
        return running

    def end_running(self) -> None:
        """Kill the ranks of calls whose results nobody took."""
        for running in self._running:
            running.stop("its results were never taken")
        self._running.clear()

    def close(self) -> None:
        """End every process."""
        with contextlib.suppress(EOFError, OSError):  # a nursery that died took its workers along
            self.end_running()
            for worker in self.idle:
                self.nursery.end(worker)
        self.nursery.close()

    def _worker(self) -> Worker:
        while self.idle:
            worker = self.idle.pop()
            if not worker.link.poll():
                return worker
            self.nursery.end(worker)  # an idle worker has nothing to say: it died
        return self.nursery.fork()


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _target(function: Callable[..., Any] | str) -> str:
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier():
        raise ValueError(f"{function!r} is not at the top of a module: workers could not find it")
    return f"{function.__module__}:{name}"


def _exception(pickled: bytes | None) -> BaseException | None:
    if pickled is None:
        return None
    kind, arguments, attributes = pickle.loads(pickled)
    error = kind.__new__(kind, *arguments)
    vars(error).update(attributes)
    return error
