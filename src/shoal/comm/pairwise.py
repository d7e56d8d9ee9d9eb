"""Point-to-point exchange over gloo: every pair of ranks has its own connection, sums are never left to it.

A message's tag is a checksum of its label, size and dtype, so that messages of ranks that do different things never
match: both wait, and the watch names them.
"""

from __future__ import annotations

import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from shoal.comm.boxes import Boxes, numbered
from shoal.comm.group import FAR, Box, Common, Kept, MakeSums, Parcel, Pending, Strips, Sums
from shoal.comm.lanes import Lanes, Pairs, asked_interfaces
from shoal.comm.levels import Levels
from shoal.comm.pool import Pool
from shoal.comm.reductions import Reductions
from shoal.comm.rendezvous import MARGIN, Address, bounded, meet
from shoal.comm.sockets import Wires, all_open, apart_from, forget_in_children, lead_nowhere, shut, sockets, toward
from shoal.comm.waiter import Lost, Transfer, Waiter
from shoal.comm.watch import TICK, Verdict, Watch
from shoal.errors import PeerError, PeerLost

_MOMENT = 0.05  # seconds until a dead process has lost its last connection
_GLANCE = 0.001  # seconds between two looks at what others wait for


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
        self._expected = weakref.WeakValueDictionary[str, Works]()
        before = sockets()
        self.lanes = Lanes(address.interfaces or asked_interfaces(None), address.host, address.port)
        store, self.devices, self.group = bounded(lambda: meet(address, self.lanes, timeout), timeout + MARGIN, address)
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
        works = self._expected.pop(label, None) or Works(self, label, receives)
        assert works.boxes.are(receives), f"'{label}' was to come elsewhere"
        try:
            if not works.expected:
                self._start(works, works.boxes.filled, receive=True)
            self._start(works, sends, receive=False)
        except RuntimeError as e:
            raise self.broken(label, works.asked, e) from None
        return works

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        """gloo sends when it has heard of a receive: for one that it hears of early, nobody waits."""
        works = Works(self, label, receives)
        if receives and not self.failed:
            with suppress(RuntimeError):  # whoever has gone is missed when something should come
                self._start(works, works.boxes.filled, receive=True)
                self._expected[label], works.expected = works, True
        return works

    def _start(self, works: Works, parcels: Sequence[Parcel], *, receive: bool) -> None:
        assert self.group is not None
        start = self.group.recv if receive else self.group.send
        for index, works.asked, tensor in numbered(parcels):
            for tag, part in self.lanes.split(works.label, index, tensor):
                works.works.append((works.asked, start([part], works.asked, tag)))

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
        self.asked, self.expected = carrier.rank, False  # whom gloo was asked for last; are all receives under way?
        self.outcome: SimpleQueue[Lost | None] | None = None

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
