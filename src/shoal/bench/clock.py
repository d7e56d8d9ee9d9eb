"""How long a rank waits for others: a carrier around the carrier, with a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from shoal.comm.group import Box, Carrier, Common, Kept, MakeSums, Parcel, Pending, Strips, Sums
from shoal.comm.levels import Levels
from shoal.settings import BENCH

T = TypeVar("T")


class Wait(NamedTuple):
    """One wait: its seconds, and the transfer."""

    seconds: float = 0.0
    label: str = ""


class Clock:
    """Seconds that this rank has waited, and the longest wait since it was looked at."""

    def __init__(self) -> None:
        self.waited, self._longest, self._running = 0.0, Wait(), False

    def during(self, label: str, wait: Callable[[], T]) -> T:
        """Wait. A wait inside another one is a part of it."""
        if self._running:
            return wait()
        self._running, start = True, time.perf_counter()
        try:
            return wait()
        finally:
            self._running = False
            took = time.perf_counter() - start
            self.waited += took
            if took > self._longest.seconds:
                self._longest = Wait(took, label)

    def longest(self) -> Wait:
        """The longest wait since the last call."""
        found, self._longest = self._longest, Wait()
        return found


def clocked(carrier: Carrier, environ: Mapping[str, str]) -> Carrier:
    """With a clock, if `shoal bench` asks for one; else as it is."""
    return Clocked(carrier, Clock()) if BENCH in environ else carrier


class Clocked:
    """A carrier whose waits are timed. What lies behind a stream of a device (NCCL) is waited for there, unseen."""

    def __init__(self, inner: Carrier, clock: Clock) -> None:
        self.inner, self.clock = inner, clock
        self.rank, self.size, self.sent = inner.rank, inner.size, inner.sent

    @property
    def levels(self) -> Levels:
        return self.inner.levels

    @property
    def plenty(self) -> int:
        return self.inner.plenty

    @property
    def ordered(self) -> bool:
        return self.inner.ordered

    @property
    def closed(self) -> bool:
        return self.inner.closed

    @property
    def failed(self) -> bool:
        return self.inner.failed

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        return _Timed(self.inner.post(label, sends, receives), label, self.clock)

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        return self.inner.expect(label, receives)

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.inner.empty(numel, dtype, device)

    def idle(self, tensor: Tensor) -> bool:
        return self.inner.idle(tensor)

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        found = self.inner.common(label, ranks, numel, dtype, device)
        return None if found is None else _TimedCommon(found, label, self.clock)

    def sums(self, device: torch.device) -> MakeSums | None:
        make = self.inner.sums(device)
        return None if make is None else lambda name, ranks: _TimedSums(make(name, ranks), self.clock)

    def note(self, mark: str) -> None:
        self.inner.note(mark)

    def hold(self, reason: str) -> None:
        self.inner.hold(reason)

    def rest(self) -> None:
        self.inner.rest()

    def kept(self) -> Kept:
        return self.inner.kept()

    def fail(self, why: str) -> None:
        self.inner.fail(why)

    def close(self) -> None:
        self.inner.close()


class _Timed:
    def __init__(self, inner: Pending, label: str, clock: Clock) -> None:
        self.inner, self.label, self.clock = inner, label, clock

    def ready(self) -> bool:
        return self.inner.ready()

    def wait(self) -> Sequence[Strips]:
        return self.clock.during(self.label, self.inner.wait)

    def release(self) -> None:
        self.inner.release()


class _TimedCommon:
    def __init__(self, inner: Common, label: str, clock: Clock) -> None:
        self.inner, self.label, self.clock = inner, label, clock
        self.data = inner.data

    def publish(self) -> None:
        self.inner.publish()

    def current(self) -> Pending:
        return _Timed(self.inner.current(), self.label, self.clock)

    def release(self) -> None:
        self.inner.release()


class _TimedSums:
    def __init__(self, inner: Sums, clock: Clock) -> None:
        self.inner, self.clock, self.scatters = inner, clock, inner.scatters

    def all_reduce(self, label: str, tensor: Tensor) -> Pending:
        return _Timed(self.inner.all_reduce(label, tensor), label, self.clock)

    def reduce_scatter(self, label: str, whole: Tensor) -> Pending:
        return _Timed(self.inner.reduce_scatter(label, whole), label, self.clock)
