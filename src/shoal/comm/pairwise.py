"""Point-to-point exchange over gloo: every pair of ranks has its own connection, sums are never left to it.

A message's tag is a checksum of its label, size and dtype, so that messages of ranks that do different things never
match: both wait, and the watch names them.
"""

from __future__ import annotations

import re
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from shoal.comm.boxes import Boxes, numbered
from shoal.comm.group import FAR, Box, Common, Kept, MakeSums, Parcel, Pending, Strips, Sums
from shoal.comm.lanes import NEVER, Lanes, Pairs, asked_interfaces
from shoal.comm.levels import Levels
from shoal.comm.pool import Pool
from shoal.comm.reductions import Reductions
from shoal.comm.sockets import Wires, all_open, apart_from, forget_in_children, lead_nowhere, shut, sockets, toward
from shoal.comm.waiter import Lost, Transfer, Waiter
from shoal.comm.watch import TICK, Verdict, Watch
from shoal.errors import EnvironmentFault, PeerError, PeerLost

T = TypeVar("T")

_served: dict[int, Store] = {}  # by port, for this process's life: the ranks of a next job may have come already
_MOMENT = 0.05  # seconds until a dead process has lost its last connection
_GLANCE = 0.001  # seconds between two looks at what others wait for
MARGIN = 0.5  # seconds beyond `timeout` for what torch does not let us stop while ranks meet


class Address(NamedTuple):
    """Where the ranks of a job find each other.

    `attempt`: how often a launcher has restarted all of them. `device`: which in all the world this rank computes on;
    "" is the host. `interfaces`: the names of those to use; none: the one towards `host`.
    """

    rank: int
    size: int
    host: str
    port: int
    agent_store: bool  # a launcher holds the store already
    attempt: int = 0
    device: str = ""
    interfaces: tuple[str, ...] = ()


class Gloo:
    """The carrier of one rank that is a process.

    Args:
        address: this rank's place and the common store.
        timeout: seconds without a change anywhere until a wait ends; also for the other ranks to come.
        report: called once with a text when a wait takes long.

    Raises:
        EnvironmentFault: the other ranks do not come.
    """

    ordered, plenty = False, FAR

    def __init__(self, address: Address, *, timeout: float, report: Callable[[str], None]) -> None:
        self.rank, self.size, self.sent = address.rank, address.size, Counter[str]()
        self.closed, self.failed = False, False
        self.group: Pairs | None
        self.waiter, self.spare, self.levels = Waiter(), Pool(), Levels.one(self.size)
        self.beside: Callable[[], bool] = self.go_on  # do what others wait for; is there more of it to come?
        self.address, self.timeout = address, timeout
        self._sums: dict[str, Reductions] = {}
        before = sockets()
        self.lanes = Lanes(address.interfaces or asked_interfaces(None), address.host, address.port)
        store, self.devices, self.group = bounded(
            lambda: _meet(address, self.lanes, timeout), timeout + MARGIN, address
        )
        wires = self._take(before)
        to_store, self._wires = toward(address.port, wires), apart_from(address.port, wires)
        self.watch = Watch(
            store, self.rank, self.size, timeout=timeout, report=report,
            alive=lambda: not lead_nowhere(to_store), server=None if address.agent_store else 0,
        )  # fmt: skip

    def _take(self, before: Wires) -> Wires:
        """The connections that have come since: they are this carrier's."""
        wires = {fd: inode for fd, inode in sockets().items() if before.get(fd) != inode}
        forget_in_children(wires, weakref.ref(self))
        return wires

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        self.sent[label.split(" ")[0]] += sum(t.nbytes for _, strips in sends for t in strips)
        self.watch.at(label)
        works = Works(self, label, receives)
        assert self.group is not None
        for start, parcels in ((self.group.recv, works.boxes.filled), (self.group.send, sends)):
            for index, peer, tensor in numbered(parcels):
                try:
                    for tag, part in self.lanes.split(label, index, tensor):
                        works.add(peer, start([part], peer, tag))
                except RuntimeError as e:
                    raise self.broken(label, peer, e) from None
        return works

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def idle(self, tensor: Tensor) -> bool:
        return True

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        return None

    def sums(self, device: torch.device) -> MakeSums | None:
        return self._reductions if device.type == "cpu" else None

    def _reductions(self, name: str, ranks: Sequence[int]) -> Sums:
        """Over connections of their own, as gloo knows what belongs together by its order."""
        if name not in self._sums:
            before, place = sockets(), self.address._replace(rank=list(ranks).index(self.rank), size=len(ranks))
            store = PrefixStore(f"sums/{name}/{ranks[0]}", cast(Any, self.watch.store).clone())  # the own may be busy
            group = bounded(
                lambda: self.lanes.together(store, place.rank, place.size), self.timeout + MARGIN, self.address
            )
            self._wires = {**self._wires, **apart_from(self.address.port, self._take(before))}
            self._sums[name] = Reductions(self, group, ranks, streams=False)
        return self._sums[name]

    def go_on(self) -> bool:
        """Do what others wait for, and what this rank waits for stays on its mark. Is there more of it to come?"""
        where = self.watch.where
        self.levels.go_on()
        self.watch.where = where
        return bool(self.levels.errands)

    def note(self, mark: str) -> None:
        self.watch.note(mark)

    def hold(self, reason: str) -> None:
        self.watch.hold(reason)

    def rest(self) -> None:
        return

    def kept(self) -> Kept:
        return Kept(self.spare.out, self.spare.nbytes)

    def fail(self, why: str) -> None:
        self.failed = True
        rank = f"rank {self.rank}"
        self.watch.end(Verdict(PeerLost.code, f"{rank} failed", why, f"see {rank}'s own traceback or log"))
        shut(self._wires)

    def close(self) -> None:
        if self.failed:
            self.watch.linger()
        self.watch.close()
        self.waiter.close()
        self.group, self.closed = None, True  # its connections end with it
        self._sums.clear()

    def broken(self, label: str, peer: int, error: Exception) -> PeerError:
        """Why the transfer `label` with `peer` failed, by name; the other ranks are told."""
        if peer == self.watch.server:
            time.sleep(_MOMENT)
        if self.watch.verdict() is None:
            lost = self.watch.server if self.watch.deaf and self.watch.server is not None else peer
            why = f"it was killed, ended early or lost its network ({_plainly(error)})"
            help = f"see the log of rank {lost}"
            self.watch.end(Verdict(PeerLost.code, f"rank {lost} is gone", why, help, deaf=1))
        return self.ended(label)

    def missed(self) -> Lost | None:
        """The rank that is waited for, if its connection has failed without gloo's saying so (see `Waiter`)."""
        peers = self.waiter.peers
        if self.rank in peers:  # a sum waits for all
            peers = set(range(self.size))
        return next((lost for peer in sorted(peers) if peer != self.rank and (lost := self.severed(peer))), None)

    def severed(self, peer: int) -> Lost | None:
        """This rank, if its connection has failed."""
        if self.group is None or all_open(self._wires):
            return None
        try:
            for tag in self.lanes.probes:
                self.group.recv([torch.empty(1)], peer, tag)
        except RuntimeError as e:
            return peer, e
        return None

    def heard(self, label: str, outcome: SimpleQueue[Lost | None]) -> Lost | None:
        """What the waiter says about the transfer `label`, as soon as it does; or what it has missed."""
        with self.watch.waiting(label):
            missed = cast(Lost | None, None)
            while True:
                with suppress(Empty):
                    return self._within(TICK, outcome)
                if self.watch.judge() is not None:
                    raise self.ended(label)
                before, missed = missed, self.missed()
                if before and missed and before[0] == missed[0]:
                    return missed

    def _within(self, seconds: float, outcome: SimpleQueue[Lost | None]) -> Lost | None:
        """Raises `Empty` if nothing comes within so many seconds."""
        ends = time.monotonic() + seconds
        while self.beside() and time.monotonic() < ends:
            with suppress(Empty):
                return outcome.get(timeout=_GLANCE)
        return outcome.get(timeout=max(0.0, ends - time.monotonic()))

    def ended(self, label: str) -> PeerError:
        """Why the job is over, for who was in the transfer `label`."""
        self.failed = True
        shut(self._wires)
        assert self.watch.ended is not None
        return self.watch.ended.error(self.rank, label)


class Works:
    """The transfers of one post."""

    def __init__(self, carrier: Gloo, label: str, receives: Sequence[Box]) -> None:
        self.carrier, self.label = carrier, label
        self.boxes = Boxes(receives, carrier.spare)
        self.works: list[Transfer] = []
        self.outcome: SimpleQueue[Lost | None] | None = None

    def add(self, peer: int, work: dist.Work) -> None:
        self.works.append((peer, work))

    def _waited_for(self) -> SimpleQueue[Lost | None]:
        if self.outcome is None:
            self.outcome = self.carrier.waiter.wait_for(self.works)
        return self.outcome

    def ready(self) -> bool:
        return not self.works or not self._waited_for().empty()

    def wait(self) -> Sequence[Strips]:
        if self.works:
            self._wait()
        return self.boxes.received()

    def _wait(self) -> None:
        lost = self.carrier.heard(self.label, self._waited_for())
        if lost is not None:
            raise self.carrier.broken(self.label, *lost)
        self.works = []

    def release(self) -> None:
        self.boxes.release()


def _plainly(error: Exception) -> str:
    """What gloo says, without the file it says it from and its guesses."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]


# ---------------------------------------------------------------- how ranks meet


def bounded(work: Callable[[], T], seconds: float, address: Address) -> T:
    """Do it in a thread: what waits for the process of another rank inside torch cannot be stopped."""
    done: list[T] = []
    failed: list[Exception] = []

    def body() -> None:
        try:
            done.append(work())
        except Exception as e:
            failed.append(e)

    thread = threading.Thread(target=body, name="shoal-meet", daemon=True)
    thread.start()
    thread.join(seconds)
    if done:
        return done[0]
    if failed and isinstance(failed[0], EnvironmentFault):
        raise failed[0]
    raise _nobody(address, f"({str(failed[0]).splitlines()[0]})" if failed else "(one of them does not answer)")


def _nobody(address: Address, which: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"rank {address.rank} of {address.size} could not meet the others at {address.host}:{address.port} {which}",
        cause="a rank that did not start, another WORLD_SIZE, or an address that cannot be reached",
        remedy="start all ranks with `shoal run` or torchrun; check MASTER_ADDR and MASTER_PORT; or raise timeout=",
    )


def _meet(address: Address, lanes: Lanes, timeout: float) -> tuple[Store, list[str], Pairs]:
    """Wait for all ranks, then connect. Returns a store for this job alone, and the ranks' devices."""
    deadline = time.monotonic() + timeout
    store = PrefixStore(f"shoal/{address.attempt}", _open_store(address, timeout, deadline))
    jobs = int(store.add(f"starts/{address.rank}", 1))  # several jobs may follow each other over one store
    own = PrefixStore(str(jobs), store)
    Watch.enter(own, address.rank)
    own.set(f"device/{address.rank}", address.device)
    own.set(f"lanes/{address.rank}", str(len(lanes.interfaces)))
    own.set(f"here/{address.rank}", str(address.size))
    for rank in range(address.size):
        while not own.check([f"here/{rank}"]):
            if time.monotonic() > deadline:
                absent = [str(r) for r in range(address.size) if not own.check([f"here/{r}"])]
                raise _nobody(address, f"within {timeout:g} s: rank {', '.join(absent)} did not come")
            time.sleep(0.01)
    devices = [own.get(f"device/{rank}").decode() for rank in range(address.size)]
    counts = [int(own.get(f"lanes/{rank}")) for rank in range(address.size)]
    if len(set(counts)) > 1:
        raise _unequal(counts)
    return own, devices, lanes.pairs(PrefixStore("gloo", own), address.rank, address.size)


def _unequal(counts: Sequence[int]) -> EnvironmentFault:
    other = next(rank for rank, count in enumerate(counts) if count != counts[0])
    return EnvironmentFault(
        f"rank 0 uses {counts[0]} network interfaces and rank {other} uses {counts[other]}",
        cause="interface= or GLOO_SOCKET_IFNAME differs between hosts",
        remedy="as many names on every host, in the order in which they are connected",
    )


def _open_store(address: Address, timeout: float, deadline: float) -> Store:
    serves = address.rank == 0 and not address.agent_store
    if not serves:
        _listened_at(address, timeout, deadline)
    patience = timedelta(seconds=max(timeout, 1.0))
    try:
        store = TCPStore(
            address.host, address.port, address.size, serves, patience, wait_for_workers=False, multi_tenant=True
        )
        store.set_timeout(NEVER)  # or it prints when rank 0 is stopped
        if serves:
            _served.setdefault(address.port, store)
        return store
    except RuntimeError as e:  # torch's DistError classes are RuntimeErrors
        if not (serves and "EADDRINUSE" in str(e)):
            raise
        if dist.is_available() and dist.is_initialized():  # by a store of the user's own
            return _open_store(address._replace(agent_store=True), timeout, deadline)
        raise EnvironmentFault(
            f"rank 0 cannot listen at {address.host}:{address.port}: another program does",
            remedy="another MASTER_PORT",
        ) from None


def _listened_at(address: Address, timeout: float, deadline: float) -> None:
    """Wait for rank 0's store. Torch's own waiting prints traces and overstays."""
    while True:
        try:
            socket.create_connection(address[2:4], timeout=max(0.01, deadline - time.monotonic())).close()
            return
        except OSError as e:
            if time.monotonic() > deadline:
                raise _nobody(address, f"within {timeout:g} s: {e}") from None
            time.sleep(0.05)
