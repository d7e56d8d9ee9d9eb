"""The worker processes of one host. None of them outlives this object's `close`."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, NamedTuple

from shoal.errors import EnvironmentFault

LEAVE, TERMINATE, KILL = 2.0, 1.0, 10.0  # seconds given to workers: by themselves, after SIGTERM, after SIGKILL
_ORPHANS = 1.0  # seconds for what workers have started
_LONGEST = 4096  # bytes of a line that are looked at


class Exit(NamedTuple):
    """A worker has ended. `code`: its exit code, or minus a signal. `told`: when it had been told to go, if so."""

    rank: int
    code: int
    time: float
    told: float | None


class Asked(NamedTuple):
    """Somebody sent the launcher a signal."""

    signum: int


class Workers:
    """Processes, each in a process group of its own, whose ends and our own signals come in one queue.

    Args:
        heard: called, from a thread, with the rank and each line of its standard error that starts with "shoal", and
            the indented ones after it.
    """

    def __init__(self, heard: Callable[[int, str], None]) -> None:
        self._heard = heard
        self.exits: dict[int, Exit] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pumps: list[threading.Thread] = []
        self._happenings: SimpleQueue[Exit | Asked] = SimpleQueue()  # safe in signal handlers
        self._told: float | None = None

    def start(
        self, command: Sequence[str], environ: Mapping[str, str], *, log: Path | None, stdout: int | None
    ) -> None:
        """Start the next rank.

        Args:
            command, environ: what to run.
            log: where its standard output and error go; None: to ours.
            stdout: without a log, the descriptor for its standard output; None: ours.

        Raises:
            EnvironmentFault: the machine cannot start it, or the log cannot be written.
        """
        rank = len(self._processes)
        try:
            with open(os.devnull, "rb") if log is None else log.open("ab") as file:
                process = subprocess.Popen(
                    command,
                    env=environ,
                    stdin=subprocess.DEVNULL,  # a background process group that reads a terminal is stopped
                    stdout=stdout if log is None else file,
                    stderr=None if log is None else subprocess.PIPE,
                    process_group=0,
                )
        except OSError as error:
            what = f"worker {rank} could not be started: {error.strerror} ({error.filename})"
            raise EnvironmentFault(what, remedy="fewer --workers, or another --run-dir") from None
        self._processes.append(process)
        self._thread(self._wait, rank, process)
        if log is not None and process.stderr is not None:
            self._pumps.append(self._thread(self._pump, rank, process.stderr, log))

    def happening(self, patience: float | None = None) -> Exit | Asked | None:
        """What happens next; None if nothing does for `patience` seconds."""
        try:
            happening = self._happenings.get(timeout=None if patience is None else max(patience, 0.0))
        except Empty:
            return None
        if isinstance(happening, Exit):
            self.exits[happening.rank] = happening
        return happening

    @property
    def running(self) -> bool:
        """Whether any worker is left."""
        return len(self.exits) < len(self._processes)

    def end(self, first: int | None = None) -> None:
        """Wait a little (after the signal `first`, if given), then insist. A signal to us shortens the waiting."""
        for signum, patience in ((first, LEAVE), (signal.SIGTERM, TERMINATE), (signal.SIGKILL, KILL)):
            if signum is not None:
                self._send(signum)
            if self._gone_within(patience):
                return

    def close(self) -> None:
        """Leave nothing behind: neither workers nor what they have started."""
        self._send(signal.SIGKILL)
        self._gone_within(KILL)
        deadline = time.monotonic() + _ORPHANS
        for process in self._processes:
            _clear(process.pid, deadline)
        for pump in self._pumps:
            pump.join(timeout=_ORPHANS)

    @contextmanager
    def listening(self) -> Generator[None]:
        """Let SIGINT and SIGTERM come as `Asked` (where Python allows it: in the main thread)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._asked) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _asked(self, signum: int, _frame: object) -> None:
        self._happenings.put(Asked(signum))

    def _wait(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        self._happenings.put(Exit(rank, code, time.time(), self._told))

    def _send(self, signum: int) -> None:
        self._told = self._told or time.time()
        for rank, process in enumerate(self._processes):
            if rank not in self.exits:
                try:
                    os.killpg(process.pid, signum)
                except ProcessLookupError:  # it went into another group
                    process.send_signal(signum)

    def _gone_within(self, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while self.running:
            if not isinstance(self.happening(deadline - time.monotonic()), Exit):
                return False
        return True

    def _pump(self, rank: int, pipe: IO[bytes], log: Path) -> None:
        """Copy standard error to the log, listening for what is meant for everybody."""
        rest, speaking = b"", False
        with pipe, log.open("ab", buffering=0) as file:
            while chunk := os.read(pipe.fileno(), 1 << 16):
                file.write(chunk)
                *lines, rest = (rest + chunk.replace(b"\r", b"\n")).split(b"\n")
                rest = rest[:_LONGEST]
                for line in lines:
                    speaking = line.startswith(b"shoal") or (speaking and line.startswith(b"  "))
                    if speaking:
                        self._heard(rank, line.decode(errors="replace"))

    def _thread(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        return thread


def _clear(group: int, deadline: float) -> None:
    """See the process group empty: by itself (trackers of shared memory tidy up after a worker), or by force."""
    with suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.01)
        os.killpg(group, signal.SIGKILL)
