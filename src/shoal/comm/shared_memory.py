"""Ranks of one host exchange through memory that they share; with those of other hosts another carrier speaks for them.

What is sent is copied once, into memory of the sender that the receiver reads; not at all if it lies there already.
Waiting spins shortly, then yields the processor, then sleeps. A message holds its place among those under way until its
receiver has copied it or let go of it; so who waits also takes in all else that comes, or two ranks that wait for
different transfers could wait for each other.
"""

from __future__ import annotations

import os
import select
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.comm.arena import Arena, View
from shoal.comm.common import MARK, Lacks, Seen
from shoal.comm.group import FAR, NEAR, Box, Common, Done, Kept, Like, MakeSums, Parcel, Pending, Strips, new_strips
from shoal.comm.pairwise import Gloo
from shoal.comm.rings import CLOSED, FAILED, INLINE, Message, Ring
from shoal.comm.watch import TICK
from shoal.errors import PeerError

_SPINS = 200
_YIELD = 0.005
"""Seconds of a wait until it sleeps between two looks."""
_LONGER = 0.02
"""By what share of itself sleeping may prolong a wait."""
_SLEEP = 0.001
"""Seconds of the longest sleep."""
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

    ordered = False

    def __init__(self, far: Gloo, near: Mapping[int, Neighbour], arena: Arena) -> None:
        self.far, self.near, self.arena = far, near, arena
        self.rank, self.size, self.sent, self.watch = far.rank, far.size, far.sent, far.watch
        self.plenty = NEAR if len(near) == far.size - 1 else FAR
        self.readers: dict[int, list[tuple[Ring, int]]] = {}  # of arena memory that was sent, by its offset
        self.under_way: list[Letters] = []  # those for which something is still to come from this host
        self.levels = far.levels
        far.beside = self.look_after
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

    def rest(self) -> None:
        self.arena.rest()
        self.far.rest()

    def kept(self) -> Kept:
        arena = self.arena
        return self.far.kept() + Kept(arena.under_way, arena.waiting, arena.reserved)

    def fail(self, why: str) -> None:
        self.far.fail(why)
        self.arena.words[0] = FAILED

    def close(self) -> None:
        if not self.failed:
            with suppress(PeerError):  # they need it no more
                self.until(self._owes, "close")
            self.arena.words[0] = CLOSED
        self.far.close()
        self.arena.close()
        for neighbour in self.near.values():
            os.close(neighbour.life)

    def _owes(self) -> int | None:
        """A rank for which something still waits for room."""
        return next((rank for rank, (ring, _) in self.near.items() if ring.backlog), None)

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        return self.far.expect(label, [(peer, box) for peer, box in receives if peer not in self.near])

    # ---------------------------------------------------------------- memory

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu" or numel == 0:
            return torch.empty(numel, dtype=dtype, device=device)
        return self.arena.tensor(self.arena.take(numel * dtype.itemsize), numel, dtype)

    def idle(self, tensor: Tensor) -> bool:
        return self.reader(tensor) is None

    def reader(self, tensor: Tensor) -> int | None:
        """A rank that may still read some of it."""
        start = self.arena.offset_of(tensor) if tensor.device.type == "cpu" else None
        if start is None:
            return None
        for offset in [at for at in self.readers if start <= at < start + max(1, tensor.nbytes)]:
            left = [(ring, number) for ring, number in self.readers[offset] if not ring.done(number)]
            if left:
                self.readers[offset] = left
                return left[0][0].rank
            del self.readers[offset]
        return None

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        others = [r for r in ranks if r != self.rank]
        if device.type != "cpu" or any(r not in self.near for r in others):
            return None
        tag = zlib.crc32(f"{label}/{numel}/{dtype}".encode())
        if self.rank == ranks[0]:
            view: View = self.arena
            offset = self.arena.take(MARK * len(ranks) + numel * dtype.itemsize, fresh=True)
            for peer in others:
                self.near[peer].ring.send(tag, 8, offset.to_bytes(8, "little"))
        else:
            ring = self.near[ranks[0]].ring
            self.until(lambda: None if ring.has(tag) else ring.rank, label)
            message = ring.take(tag)
            view = ring.theirs
            offset = view.words[message.offset // 8]
            ring.done_with(message)
        own = self.rank == ranks[0]
        return Seen(
            self.rank, self.until, label, view, offset, ranks, (numel, dtype),
            give_back=lambda: self.arena.give(offset, lambda: True) if own else None,
        )  # fmt: skip

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
        if nbytes <= INLINE:
            ring.send(tag, nbytes, b"".join(map(_bytes, strips)))
            return
        offset = self.arena.offset_of(strips[0]) if len(strips) == 1 and strips[0].device.type == "cpu" else None
        if offset is None:
            key = tuple(x for t in strips for x in (t.data_ptr(), t.nbytes))
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

    def until(self, lacks: Lacks, label: str) -> None:
        """Return when nothing lacks.

        Raises:
            PeerError: something will.
        """
        for _ in range(_SPINS):
            if lacks() is None:
                return
        with self.watch.waiting(label):
            start = judged = lived = time.monotonic()
            while lacks() is not None:
                self.far.go_on()
                now = time.monotonic()
                if now - start < _YIELD:
                    os.sched_yield()
                    continue
                time.sleep(min(_SLEEP, _LONGER * (now - start)))
                self.take_in()
                if now - lived > _ALIVE:
                    lived = now
                    self._check_alive(lacks, label)
                if now - judged > TICK:
                    judged = now
                    self._check_job(lacks, label)

    def look_after(self) -> bool:
        """Do what others wait for; see `Gloo.beside`."""
        self.take_in()
        return self.far.go_on() or bool(self.under_way)

    def take_in(self) -> None:
        """What has come for other transfers, and hand over what waits for room."""
        for ring, _ in self.near.values():
            ring.flush()
        for letters in tuple(self.under_way):
            letters.lacks()

    def _check_alive(self, lacks: Lacks, label: str) -> None:
        gone = {fd for fd, _ in self._lives.poll(0)}
        said = {rank: ring.theirs.words[0] for rank, (ring, _) in self.near.items()}
        awaited = lacks()  # its last messages may have come just before
        if awaited is None:
            return
        for rank, (_, life) in self.near.items():
            if said[rank] == FAILED:
                raise self.far.broken(label, rank, RuntimeError("it has failed"))
            if life in gone and (said[rank] != CLOSED or rank == awaited):
                raise self.far.broken(label, rank, RuntimeError("its process has ended"))

    def _check_job(self, lacks: Lacks, label: str) -> None:
        """What another rank has said; or, where nobody can be heard any more, that the awaited one has hung up."""
        if self.watch.judge() is not None:
            raise self.far.ended(label)
        awaited = lacks()
        lost = None if awaited is None else self.far.severed(awaited)
        if lost is not None and lacks() is not None:
            raise self.far.broken(label, *lost)


class Awaited(NamedTuple):
    """What is to come: the place of its box, from where, under which tag."""

    place: int
    ring: Ring
    tag: int


class Letters:
    """The transfers of one post."""

    def __init__(self, carrier: Shared, label: str, far: Pending, receives: Sequence[Box]) -> None:
        self.carrier, self.label, self.far, self.receives = carrier, label, far, receives
        self.lent: list[Tensor] = []  # arena memory that was sent as it is
        self.read: list[tuple[Ring, Message]] = []
        self.filled: dict[int, Strips] = {}  # by the place of the box
        self.missing: list[Awaited] = []
        self.received: list[Strips] | None = None
        seen = Counter[int]()
        for place, (peer, box) in enumerate(receives):
            sizes, dtype = _about(box)
            nbytes = sum(sizes) * dtype.itemsize
            if peer in carrier.near and nbytes:
                self.missing.append(Awaited(place, carrier.near[peer].ring, _tag(label, seen[peer], dtype, nbytes)))
            elif peer in carrier.near:
                self.filled[place] = new_strips(box) if isinstance(box, Like) else box
            seen[peer] += 1
        if self.missing:
            carrier.under_way.append(self)

    def lacks(self) -> int | None:
        """Fill the boxes for which something has come. Whom the others wait for."""
        if not self.missing:
            return None
        self.missing = [m for m in self.missing if not self._filled(m)]
        if self.missing:
            return self.missing[0].ring.rank
        self.carrier.under_way.remove(self)
        return None

    def ready(self) -> bool:
        return self.lacks() is None and self.far.ready()

    def wait(self) -> Sequence[Strips]:
        if self.received is None:
            self.carrier.until(self.lacks, self.label)
            came = iter(self.far.wait())
            places = enumerate(self.receives)
            self.received = [self.filled[at] if peer in self.carrier.near else next(came) for at, (peer, _) in places]
            if not any(isinstance(box, Like) for _, box in self.receives):
                self.carrier.until(self._reader, self.label)
        return self.received

    def _reader(self) -> int | None:
        return next((r for t in self.lent if (r := self.carrier.reader(t)) is not None), None)

    def _filled(self, awaited: Awaited) -> bool:
        place, ring, tag = awaited
        if not ring.has(tag):
            return False
        message, box = ring.take(tag), self.receives[place][1]
        sizes, dtype = _about(box)
        parts = torch.split(ring.theirs.tensor(message.offset, sum(sizes), dtype), list(sizes))
        if isinstance(box, Like) and box.device.type == "cpu":
            self.read.append((ring, message))
            self.filled[place] = parts
            return True
        if isinstance(box, Like):
            box = new_strips(box)
        with torch.no_grad():
            for mine, theirs in zip(box, parts, strict=True):
                mine.copy_(theirs.view(mine.shape))
        ring.done_with(message)
        self.filled[place] = box
        return True

    def release(self) -> None:
        while self.read:
            ring, message = self.read.pop()
            ring.done_with(message)
        self.far.release()


def _about(box: Strips | Like) -> tuple[tuple[int, ...], torch.dtype]:
    if isinstance(box, Like):
        return box.sizes, box.dtype
    return tuple(t.numel() for t in box), box[0].dtype if box else torch.uint8


def _bytes(t: Tensor) -> bytes:
    copy = t.detach().cpu().view(-1).clone()  # a storage that numpy has seen can never be resized again
    return copy.view(torch.uint8).numpy().tobytes()


def _tag(label: str, index: int, dtype: torch.dtype, nbytes: int) -> int:
    return zlib.crc32(f"{label}/{index}/{dtype}/{nbytes}".encode())
