"""Ranks of one host exchange through memory that they share; with those of other hosts another carrier speaks for them.

What is sent is copied once, into memory of the sender that the receiver reads; not at all if it lies there already.
Waiting spins shortly, then yields the processor, then sleeps.
"""

from __future__ import annotations

import os
import select
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.comm.arena import Arena, Fence, View
from shoal.comm.group import Box, Common, Done, Like, MakeSums, Parcel, Pending, Strips, new_strips
from shoal.comm.pairwise import Gloo
from shoal.comm.rings import FAILED, INLINE, Message, Ring
from shoal.comm.watch import TICK

_SPINS = 200
_YIELD = 0.005
"""Seconds of a wait until it sleeps between two looks."""
_SLEEP = 0.0002
_MARK = 64
"""Bytes of a word that one rank writes and others read: a line of the cache."""
_ALIVE = 0.02
"""Seconds between two looks at whether the others live."""


class Neighbour(NamedTuple):
    """Another rank of this host. `life`: a file descriptor that can be read when its process has ended."""

    ring: Ring
    life: int


class Shared:
    """The carrier of one rank that is a process, with neighbours on its host.

    Args:
        far: to all ranks; asked for those of other hosts, and for what ranks do and why they fail.
        near: the other ranks of this host.
        arena: this rank's own, which they have mapped.
    """

    def __init__(self, far: Gloo, near: Mapping[int, Neighbour], arena: Arena) -> None:
        self.far, self.near, self.arena = far, near, arena
        self.rank, self.size, self.sent, self.watch = far.rank, far.size, far.sent, far.watch
        self.readers: dict[int, list[tuple[Ring, int]]] = {}  # of arena memory that was sent as it is, by its offset
        self._lives = select.poll()
        for neighbour in near.values():
            self._lives.register(neighbour.life, select.POLLIN)

    @property
    def closed(self) -> bool:
        return self.far.closed

    @property
    def failed(self) -> bool:
        return self.far.failed

    def note(self, mark: str) -> None:
        self.far.note(mark)

    def hold(self, reason: str) -> None:
        self.far.hold(reason)

    def fail(self, why: str) -> None:
        self.far.fail(why)
        self.arena.words[0] = FAILED

    def close(self) -> None:
        self.far.close()
        self.arena.close()
        for neighbour in self.near.values():
            os.close(neighbour.life)

    # ---------------------------------------------------------------- memory

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu" or numel == 0:
            return torch.empty(numel, dtype=dtype, device=device)
        return self.arena.tensor(self.arena.take(numel * dtype.itemsize), numel, dtype)

    def idle(self, tensor: Tensor) -> bool:
        offset = self.arena.offset_of(tensor) if tensor.device.type == "cpu" else None
        if offset is None or offset not in self.readers:
            return True
        self.readers[offset] = [(ring, n) for ring, n in self.readers[offset] if not ring.done(n)]
        return not self.readers[offset]

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        others = [r for r in ranks if r != self.rank]
        if device.type != "cpu" or any(r not in self.near for r in others):
            return None
        tag = zlib.crc32(f"{label}/{numel}/{dtype}".encode())
        if self.rank == ranks[0]:
            view: View = self.arena
            offset = self.arena.take(_MARK * len(ranks) + numel * dtype.itemsize, fresh=True)
            for peer in others:
                self.near[peer].ring.send(tag, 8, offset.to_bytes(8, "little"))
        else:
            ring = self.near[ranks[0]].ring
            self.until(lambda: self._has(ring, tag, 1), label)
            message = ring.waiting[tag].popleft()
            view = ring.theirs
            offset = view.words[message.offset // 8]
            ring.done_with(message)
        return Seen(self, label, view, offset, ranks.index(self.rank), len(ranks), (numel, dtype))

    # ---------------------------------------------------------------- transfers

    def sums(self, device: torch.device) -> MakeSums | None:
        return None  # nothing of gloo's comes near an ordered sum in memory that neighbours see

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        away = [parcel for parcel in sends if parcel[0] not in self.near]
        coming = [box for box in receives if box[0] not in self.near]
        far = self.far.post(label, away, coming) if away or coming else Done()
        self.watch.at(label)
        letters = Letters(self, label, far, receives)
        staged: dict[tuple[int, ...], int] = {}
        seen = Counter[int]()
        for peer, strips in sends:
            nbytes = sum(t.nbytes for t in strips)
            if peer in self.near and nbytes:
                self.sent[label.split(" ")[0]] += nbytes
                tag = _tag(label, seen[peer], strips[0].dtype, nbytes)
                self._send(letters, self.near[peer].ring, tag, [t for t in strips if t.numel()], nbytes, staged)
            seen[peer] += 1
        for offset in staged.values():
            self.arena.give(offset, self._given_back(offset))
        return letters

    def _send(
        self, letters: Letters, ring: Ring, tag: int, strips: Strips, nbytes: int, staged: dict[tuple[int, ...], int]
    ) -> None:  # fmt: skip
        if not ring.room():
            self.until(ring.room, letters.label)
        if nbytes <= INLINE:
            ring.send(tag, nbytes, b"".join(map(_bytes, strips)))
            return
        offset = self.arena.offset_of(strips[0]) if len(strips) == 1 and strips[0].device.type == "cpu" else None
        if offset is None:
            key = tuple(t.data_ptr() for t in strips)
            if key not in staged:
                staged[key] = self._stage(strips, nbytes)
            offset = staged[key]
        else:
            letters.lent.append(strips[0])
        self.readers.setdefault(offset, []).append((ring, ring.send(tag, nbytes, offset)))

    def _stage(self, strips: Strips, nbytes: int) -> int:
        """Copy them side by side into the arena."""
        offset = self.arena.take(nbytes)
        at = offset
        with torch.no_grad():
            for t in strips:
                self.arena.tensor(at, t.numel(), t.dtype).copy_(t.view(-1))
                at += t.nbytes
        return offset

    def _given_back(self, offset: int) -> Callable[[], bool]:
        readers = self.readers.pop(offset)
        return lambda: all(ring.done(number) for ring, number in readers)

    # ---------------------------------------------------------------- waiting

    def _has(self, ring: Ring, tag: int, count: int) -> bool:
        if len(ring.waiting[tag]) < count:
            ring.look()
        return len(ring.waiting[tag]) >= count

    def until(self, done: Callable[[], bool], label: str) -> None:
        """Return when it is done.

        Raises:
            PeerError: it will not be.
        """
        for _ in range(_SPINS):
            if done():
                return
        with self.watch.waiting(label):
            start = judged = lived = time.monotonic()
            while not done():
                now = time.monotonic()
                if now - start < _YIELD:
                    os.sched_yield()
                else:
                    time.sleep(_SLEEP)
                if now - lived > _ALIVE:
                    lived = now
                    self._check_alive(label)
                if now - judged > TICK:
                    judged = now
                    if self.watch.judge() is not None:
                        raise self.far.ended(label)

    def _check_alive(self, label: str) -> None:
        gone = {fd for fd, _ in self._lives.poll(0)}
        for rank, (ring, life) in self.near.items():
            if life in gone:
                raise self.far.broken(label, rank, RuntimeError("its process has ended"))
            if ring.theirs.words[0] == FAILED:
                raise self.far.broken(label, rank, RuntimeError("it has failed"))


class Letters:
    """The transfers of one post."""

    def __init__(self, carrier: Shared, label: str, far: Pending, receives: Sequence[Box]) -> None:
        self.carrier, self.label, self.far, self.receives = carrier, label, far, receives
        self.expected: list[tuple[Ring, int] | None] = []  # per box, if something comes for it from this host
        self.lent: list[Tensor] = []  # arena memory that was sent as it is
        self.read: list[tuple[Ring, Message]] = []
        self.received: list[Strips] | None = None
        seen = Counter[int]()
        for peer, box in receives:
            sizes, dtype = _about(box)
            nbytes = sum(sizes) * dtype.itemsize
            near = peer in carrier.near and nbytes > 0
            tag = _tag(label, seen[peer], dtype, nbytes)
            self.expected.append((carrier.near[peer].ring, tag) if near else None)
            seen[peer] += 1
        self.missing = [e for e in self.expected if e is not None]

    def _here(self) -> bool:
        while self.missing:
            ring, tag = self.missing[-1]
            if not ring.waiting[tag]:
                ring.look()
                if not ring.waiting[tag]:
                    return False
            self.missing.pop()
        return True

    def ready(self) -> bool:
        return self._here() and self.far.ready()

    def wait(self) -> Sequence[Strips]:
        if self.received is None:
            self.carrier.until(self._here, self.label)
            came = iter(self.far.wait())
            boxes = zip(self.receives, self.expected, strict=True)
            self.received = [self._open(peer, box, at, came) for (peer, box), at in boxes]
            if not self.read:
                for tensor in self.lent:
                    self.carrier.until(lambda tensor=tensor: self.carrier.idle(tensor), self.label)
        return self.received

    def _open(self, peer: int, box: Strips | Like, at: tuple[Ring, int] | None, far: Iterator[Strips]) -> Strips:
        if at is None:
            if peer not in self.carrier.near:
                return next(far)
            return new_strips(box) if isinstance(box, Like) else box
        ring, tag = at
        message = ring.waiting[tag].popleft()
        if not ring.waiting[tag]:
            del ring.waiting[tag]
        sizes, dtype = _about(box)
        parts = torch.split(ring.theirs.tensor(message.offset, sum(sizes), dtype), list(sizes))
        if isinstance(box, Like) and box.device.type == "cpu":
            self.read.append((ring, message))
            return parts
        if isinstance(box, Like):
            box = new_strips(box)
        with torch.no_grad():
            for mine, theirs in zip(box, parts, strict=True):
                mine.copy_(theirs.view(mine.shape))
        ring.done_with(message)
        return box

    def release(self) -> None:
        while self.read:
            ring, message = self.read.pop()
            ring.done_with(message)
        self.far.release()


class Seen:
    """Memory that ranks of this host have in common: a word for each that counts what it published, then the data."""

    def __init__(
        self, carrier: Shared, label: str, view: View, offset: int, me: int, size: int, about: tuple[int, torch.dtype]
    ) -> None:
        self.carrier, self.label, self.words, self.fence = carrier, label, view.words, Fence()
        self._marks = [(offset + r * _MARK) // 8 for r in range(size)]
        self._mine, self.count = self._marks[me], 0
        self.data = view.tensor(offset + size * _MARK, *about)

    def publish(self) -> None:
        self.count += 1
        self.fence()
        self.words[self._mine] = self.count

    def current(self) -> Pending:
        return Currency(self, self.count)


class Currency:
    """Until all members have published `count` times."""

    def __init__(self, seen: Seen, count: int) -> None:
        self.seen, self.count = seen, count

    def ready(self) -> bool:
        words, count = self.seen.words, self.count
        return all(words[mark] >= count for mark in self.seen._marks)  # pyright: ignore[reportPrivateUsage]

    def wait(self) -> Sequence[Strips]:
        self.seen.carrier.until(self.ready, self.seen.label)
        self.seen.fence()
        return ()

    def release(self) -> None:
        return


def _about(box: Strips | Like) -> tuple[tuple[int, ...], torch.dtype]:
    if isinstance(box, Like):
        return box.sizes, box.dtype
    return tuple(t.numel() for t in box), box[0].dtype if box else torch.uint8


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().view(-1).view(torch.uint8).numpy().tobytes()


def _tag(label: str, index: int, dtype: torch.dtype, nbytes: int) -> int:
    return zlib.crc32(f"{label}/{index}/{dtype}/{nbytes}".encode())
