"""Exchange between devices of CUDA: over NCCL, or through host memory where NCCL cannot. Only here are they named.

Note: order. NCCL matches what two ranks send each other by order alone, without labels or sizes. So every post also
sends each peer a few bytes over the host's carrier, under the same label: what does not match is never waited for on
the device, and is named. `wait` returns when all peers have posted, not when all has come: that only the current
stream waits for.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections import Counter, deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from shoal.comm.boxes import Boxes, Numbered, numbered
from shoal.comm.group import FAR, Box, Carrier, Common, Kept, MakeSums, Parcel, Pending, Strips, Sums
from shoal.comm.levels import Levels
from shoal.comm.pairwise import Gloo
from shoal.comm.pool import Pool
from shoal.comm.reductions import Reductions
from shoal.comm.rendezvous import MARGIN, Address, bounded
from shoal.comm.routed import Routed, off_host
from shoal.comm.staged import Staged
from shoal.comm.waiter import Lost
from shoal.comm.watch import TICK
from shoal.errors import DivergedError, EnvironmentFault, PeerError

_NEVER = timedelta(days=10)  # the watch ends waits, not NCCL's watchdog, which ends the process
_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_ORDER = struct.Struct("<qI")


# ---------------------------------------------------------------- which way


def over_devices(
    host: Carrier, lives: Gloo, device: torch.device, name: str, address: Address, timeout: float
) -> Carrier:
    """A carrier for this rank's device too. All ranks of the job must call it, those without a device as well.

    Args:
        host: for what lies in the host's memory.
        lives: the connections that show who lives, which know all ranks' devices; `host` itself, or what it stands on.
        device: where this rank's model will be.
        name: "auto": NCCL where it can be; "nccl": nothing else; any other: through the host's memory.
        address, timeout: see `Gloo`.

    Raises:
        EnvironmentFault: NCCL is asked for and cannot be, or its ranks do not come.
    """
    obstacle = against_nccl(lives.devices)
    if name == "nccl" and obstacle:
        raise EnvironmentFault(
            f"carrier=nccl, but {obstacle}", remedy="one device for each rank, or carrier=auto: through host memory"
        )
    if not off_host(device):
        return host
    if obstacle or name not in ("auto", "nccl"):
        return Routed(host, Staged(host, pinned=True))
    return Routed(host, Nccl(host, lives, device, address, timeout))


def against_nccl(devices: Sequence[str]) -> str:
    """Why these ranks cannot use NCCL, which wants a device of its own for each; "" if they can."""
    for rank, device in enumerate(devices):
        if not device:
            return f"rank {rank} computes on the host"
        if device in devices[:rank]:
            return f"ranks {devices.index(device)} and {rank} share a device ({device})"
    return ""


def own_device(asked: str | None, local_rank: int) -> torch.device:
    """The device of this rank; "cuda" alone is another one for each rank of a host, as far as there are enough."""
    device = torch.device(asked or "cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise EnvironmentFault(
            f"device={asked}, but torch finds no such device here",
            remedy="a build of torch for it and its driver, or device=cpu",
        )
    index = cast(int | None, device.index)  # torch says it is never None
    device = torch.device("cuda", local_rank % torch.cuda.device_count() if index is None else index)
    torch.cuda.set_device(device)  # what "cuda" means to the program
    return device


def uuid_of(device: torch.device) -> str:
    """Which device this is, of all in the world; "" for the host."""
    if device.type != "cuda":
        return ""
    return str(cast(Any, torch.cuda.get_device_properties(device)).uuid)


# ---------------------------------------------------------------- NCCL


class Nccl:
    """Carries what lies on this rank's device.

    Args:
        host: carries what makes sure of the order.
        lives, device, address, timeout: see `over_devices`.
    """

    ordered, plenty = True, FAR

    def __init__(self, host: Carrier, lives: Gloo, device: torch.device, address: Address, timeout: float) -> None:
        self.host, self.lives, self.spare = host, lives, Pool()
        self.rank, self.size, self.sent = host.rank, host.size, host.sent
        self.closed, self.failed = False, False
        self.on, self.address, self.timeout = device, address, timeout
        self.levels = Levels.one(self.size)  # NCCL knows hosts itself
        self.group = self._connected("nccl", range(self.size))
        self._sums: dict[str, Reductions] = {}
        self.order = Order(host)
        self.under_way: deque[Started] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._guard, name="shoal-nccl", daemon=True)
        self._thread.start()

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        self.sent[label.split(" ")[0]] += sum(t.nbytes for _, strips in sends for t in strips)
        boxes = Boxes(receives, self.spare)
        order = self.order.ask(label, sends, boxes.filled)
        work = self._start(label, numbered(boxes.filled), numbered(sends))
        if work is not None:
            self.under_way.append(Started(label, order.peers, work))
        return Launched(self, label, order, work, boxes, sends)

    def _start(self, label: str, receives: list[Numbered], sends: list[Numbered]) -> dist.Work | None:
        """All of it in one call of NCCL, so that no order of sends and receives can block."""
        if not (receives or sends):
            return None
        try:
            self.group._start_coalescing()
            for start, parcels in ((self.group.recv, receives), (self.group.send, sends)):
                for _, peer, tensor in parcels:
                    start([tensor], peer, 0)
            return self.group._end_coalescing()
        except RuntimeError:
            raise self.broken(label) from None

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        return None

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def idle(self, tensor: Tensor) -> bool:
        return True

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        return None

    def sums(self, device: torch.device) -> MakeSums | None:
        return self._reductions

    def _reductions(self, name: str, ranks: Sequence[int]) -> Sums:
        """Over a communicator of their own: what goes between two ranks has an order that they know nothing of."""
        if name not in self._sums:
            group = self._connected(f"sums/{name}/{ranks[0]}", ranks)
            self._sums[name] = Reductions(self.lives, group, ranks, streams=True)
        return self._sums[name]

    def _connected(self, name: str, ranks: Sequence[int]) -> Any:
        place = self.address._replace(rank=list(ranks).index(self.rank), size=len(ranks))
        return bounded(lambda: _connected(self.lives, name, place, self.on), self.timeout + MARGIN, self.address)

    def _groups(self) -> list[Any]:
        return [*(sums.group for sums in self._sums.values()), self.group]

    def note(self, mark: str) -> None:
        self.host.note(mark)

    def hold(self, reason: str) -> None:
        self.host.hold(reason)

    def rest(self) -> None:
        return

    def kept(self) -> Kept:
        return Kept(self.spare.out, self.spare.nbytes)

    def fail(self, why: str) -> None:
        self.failed = True
        self._stop.set()
        for group in self._groups():
            group.abort()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2 * TICK)
        if not self.closed:
            for group in self._groups():
                (group.abort if self.failed else group.shutdown)()
        self.closed = True

    def broken(self, label: str) -> PeerError:
        """Why what NCCL carried failed, when the watch knows it; else NCCL's word is all there is."""
        self.failed = True
        if self.lives.watch.verdict() is not None:
            return self.lives.ended(label)
        return self.lives.broken(label, (self.rank + 1) % self.size, RuntimeError(f"NCCL: {self.group.get_error()}"))

    def _guard(self) -> None:
        """Free a thread that waits for the device when a rank has died: on the device nothing would ever end."""
        missed = cast(Lost | None, None)
        while not self._stop.wait(TICK):
            while self.under_way and self.under_way[0].work.is_completed():
                self.under_way.popleft()
            before, missed = missed, self._missed()
            if before and missed and before[0] == missed[0]:
                self.lives.broken(self.under_way[0].label if self.under_way else "nccl", *missed)
            if self.lives.watch.ended is not None:
                for group in self._groups():
                    group.abort()
                return

    def _missed(self) -> Lost | None:
        peers = sorted({peer for started in self.under_way.copy() for peer in started.peers})
        return next((lost for peer in peers if (lost := self.lives.severed(peer))), None)


class Started(NamedTuple):
    """What the guard looks at: nothing that holds memory."""

    label: str
    peers: list[int]
    work: dist.Work


class Launched:
    """What the device exchanges now."""

    def __init__(
        self, carrier: Nccl, label: str, order: Asked, work: dist.Work | None, boxes: Boxes, sends: Sequence[Parcel]
    ) -> None:
        self.carrier, self.label, self.order, self.work, self.boxes = carrier, label, order, work, boxes
        self.waited = False
        self.sends = sends  # kept until the current stream waits: memory that is freed is filled by what comes next

    def ready(self) -> bool:
        return self.order.ready() and (self.work is None or self.work.is_completed())

    def wait(self) -> Sequence[Strips]:
        if not self.waited:
            self.order.wait()
            try:
                if self.work is not None:
                    self.work.wait()  # the current stream waits; this thread does not
            except RuntimeError:
                raise self.carrier.broken(self.label) from None
            self.waited, self.sends = True, ()
        return self.boxes.received()

    def release(self) -> None:
        self.boxes.release()


# ---------------------------------------------------------------- order


class Order:
    """Makes sure that two ranks do the same with each other, one after the other.

    Args:
        host: a carrier that knows labels.
    """

    def __init__(self, host: Carrier) -> None:
        self.host, self.count = host, Counter[int]()  # posts with each rank

    def ask(self, label: str, sends: Sequence[Parcel], receives: Sequence[tuple[int, Strips]]) -> Asked:
        """Tell each peer which post this is, and what it sends and expects."""
        peers = sorted({peer for peer, _ in (*sends, *receives)})
        self.count.update(peers)
        own = {peer: Said(self.count[peer], _shape(sends, peer)) for peer in peers}
        expected = {peer: Said(self.count[peer], _shape(receives, peer)) for peer in peers}
        boxes = {peer: torch.empty(_ORDER.size, dtype=torch.uint8) for peer in peers}
        pending = self.host.post(
            f"order {label}",
            [(peer, [torch.frombuffer(bytearray(_ORDER.pack(*own[peer])), dtype=torch.uint8)]) for peer in peers],
            [(peer, [boxes[peer]]) for peer in peers],
        )
        return Asked(label, self.host.rank, pending, boxes, expected)


class Said(NamedTuple):
    """The number of a post between two ranks, and a checksum of what goes one way."""

    number: int
    shape: int


def _shape(parcels: Sequence[tuple[int, Strips]], peer: int) -> int:
    sizes = [f"{t.numel()} {t.dtype}" for to, strips in parcels if to == peer for t in strips if t.numel()]
    return zlib.crc32("\n".join(sizes).encode())


class Asked:
    """What the peers of one post will say."""

    def __init__(
        self, label: str, rank: int, pending: Pending, boxes: dict[int, Tensor], expected: dict[int, Said]
    ) -> None:
        self.label, self.rank, self.pending, self.boxes, self.expected = label, rank, pending, boxes, expected
        self.peers = list(boxes)

    def ready(self) -> bool:
        return self.pending.ready()

    def wait(self) -> None:
        """Return when every peer has posted the same.

        Raises:
            DivergedError: one of them has posted it before or after something else, or with other sizes.
            PeerError: one of them does not come.
        """
        self.pending.wait()
        for peer, box in self.boxes.items():
            said, expected = Said(*_ORDER.unpack(box.numpy().tobytes())), self.expected[peer]
            if said != expected:
                what = (
                    f"is number {said.number} there and {expected.number} here"
                    if said.number != expected.number
                    else "has other sizes there than here"
                )
                raise DivergedError(
                    f"'{self.label}', of what rank {peer} and rank {self.rank} exchange, {what}",
                    cause="ranks started the same transfers in different orders",
                    remedy="overlap=False; and please report it: the plan should not allow this",
                )


# ---------------------------------------------------------------- how ranks connect


def _connected(lives: Gloo, name: str, address: Address, device: torch.device) -> Any:
    """A process group whose communicator is there: the first transfer, which not all may join, must not make it."""
    store = PrefixStore(name, cast(Any, lives.watch.store).clone())  # the watch's own may be busy
    with _unwatched():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        group = cast(Any, dist.ProcessGroupNCCL(store, address.rank, address.size, options))
    torch.cuda.set_device(device)  # in this thread
    group.allreduce([torch.ones(1, device=device)]).wait()
    torch.cuda.current_stream(device).synchronize()
    return group


@contextmanager
def _unwatched() -> Generator[None]:
    """Let NCCL's watchdog of the group that is made here not end the process: who has died is named by us."""
    before = {name: os.environ.get(name) for name in _WATCHDOG}
    os.environ.update({name: before[name] or value for name, value in _WATCHDOG.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
