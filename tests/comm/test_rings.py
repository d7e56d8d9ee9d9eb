"""Messages between two ends of a ring, both in this process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch

from shoal.comm import arena as arenas
from shoal.comm.arena import Arena, View
from shoal.comm.rings import INLINE, SLOTS, Message, Ring, reserved

TAG = 7


class Ends:
    """Two of three ranks of a host, and the ring between them as each of them sees it."""

    def __init__(self, one: int = 0, other: int = 2) -> None:
        self.arenas = {r: Arena(reserved(3)) for r in (one, other)}
        views = {r: View(a.fd, a.nbytes) for r, a in self.arenas.items()}
        self.here = Ring(self.arenas[one], views[other], one, other, 10 + other)
        self.there = Ring(self.arenas[other], views[one], other, one, 10 + one)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    for arena in made.arenas.values():
        arena.close()


def number(n: int) -> bytes:
    return n.to_bytes(8, "little")


def read(ring: Ring, message: Message) -> bytes:
    return bytes(ring.theirs.map[message.offset : message.offset + message.nbytes])


def test_nothing_has_come_before_it_is_sent(ends: Ends) -> None:
    assert not ends.there.has(TAG)
    assert not ends.there.waiting  # asking leaves nothing behind
    ends.here.send(TAG, 3, b"abc")
    assert ends.there.has(TAG)
    assert not ends.there.has(TAG + 1)
    assert not ends.here.has(TAG)
    assert read(ends.there, ends.there.take(TAG)) == b"abc"
    assert not ends.there.has(TAG)


def test_messages_of_a_tag_keep_their_order(ends: Ends) -> None:
    for n in range(10):
        ends.here.send(n % 2, 8, number(n))
    came = [[read(ends.there, ends.there.take(tag)) for _ in range(5) if ends.there.has(tag)] for tag in (1, 0)]
    assert came == [[number(n) for n in range(1, 10, 2)], [number(n) for n in range(0, 10, 2)]]


def test_large_ones_lie_where_the_sender_says(ends: Ends) -> None:
    arena = ends.here.mine
    at = arena.take(4000)
    arena.tensor(at, 1000, torch.int32).copy_(torch.arange(1000, dtype=torch.int32))
    ends.here.send(TAG, 4000, at)
    assert ends.there.has(TAG)
    message = ends.there.take(TAG)
    assert torch.equal(ends.there.theirs.tensor(message.offset, 1000, torch.int32), arena.tensor(at, 1000, torch.int32))


def test_the_longest_that_travels_in_its_slot_touches_no_other(ends: Ends) -> None:
    for n in range(3):
        ends.here.send(TAG, INLINE, bytes([n]) * INLINE)
    assert ends.there.has(TAG)
    assert [read(ends.there, ends.there.take(TAG)) for _ in range(3)] == [bytes([n]) * INLINE for n in range(3)]


def test_many_times_round(ends: Ends) -> None:
    """Both directions at once, released in any order."""
    shuffled, sent = random.Random(1), count(1)
    for _ in range(6):
        batch = [next(sent) for _ in range(SLOTS - 100)]
        for ring, sign in ((ends.here, 1), (ends.there, 3)):
            for n in batch:
                ring.send(TAG, 8, number(sign * n))
        for ring, sign in ((ends.there, 1), (ends.here, 3)):
            assert ring.has(TAG)
            came = [ring.take(TAG) for _ in batch]
            assert [read(ring, m) for m in came] == [number(sign * n) for n in batch]
            shuffled.shuffle(came)
            for message in came:
                ring.done_with(message)
    assert ends.here.read > 5 * SLOTS


def test_a_message_is_done_when_its_reader_says_so(ends: Ends) -> None:
    numbers = [ends.here.send(TAG, 8, number(n)) for n in range(3)]
    assert ends.there.has(TAG)
    came = [ends.there.take(TAG) for _ in range(3)]
    assert [ends.here.done(n) for n in numbers] == [False] * 3
    ends.there.done_with(came[1])
    assert [ends.here.done(n) for n in numbers] == [False, True, False]


def test_a_full_ring_keeps_the_rest_for_later(ends: Ends) -> None:
    """Nothing is overwritten that is not done with; who sends never waits."""
    for n in range(SLOTS + 50):
        ends.here.send(TAG, 8, number(n))
    assert len(ends.here.backlog) == 50
    assert ends.there.has(TAG)
    came = [ends.there.take(TAG) for _ in range(SLOTS)]
    assert not ends.there.has(TAG)
    assert [read(ends.there, m) for m in came] == [number(n) for n in range(SLOTS)]
    ends.there.done_with(came[1])  # the oldest one still holds its place
    ends.here.flush()
    assert not ends.there.has(TAG)
    for message in came:
        ends.there.done_with(message)
    last = ends.here.send(TAG, 8, number(SLOTS + 50))  # not before those that wait
    assert not ends.here.backlog
    assert ends.there.has(TAG)
    rest = [ends.there.take(TAG) for _ in range(51)]
    assert [read(ends.there, m) for m in rest] == [number(n) for n in range(SLOTS, SLOTS + 51)]
    assert not ends.here.done(last)


def test_pairs_of_three_do_not_mix() -> None:
    made = {r: Arena(reserved(3)) for r in range(3)}
    views = {r: View(a.fd, a.nbytes) for r, a in made.items()}
    rings = {(a, b): Ring(made[a], views[b], a, b, b) for a in range(3) for b in range(3) if a != b}
    for (a, b), ring in rings.items():
        ring.send(TAG, 2, bytes([a, b]))
    for (a, b), ring in rings.items():
        assert ring.has(TAG)
        assert read(ring, ring.take(TAG)) == bytes([b, a])
    for arena in made.values():
        arena.close()


# ---------------------------------------------------------------- where the processor reorders stores


class Noting:
    """Memory that notes what of it is written or read, and in which order."""

    def __init__(self, memory: object, name: str, notes: list[str]) -> None:
        self.memory, self.name, self.notes = memory, name, notes

    def __getitem__(self, at: object) -> object:
        self.notes.append(f"read {self.name}")
        return self.memory[at]

    def __setitem__(self, at: object, value: object) -> None:
        self.notes.append(f"write {self.name}")
        self.memory[at] = value


def test_fences_stand_between_data_and_flag(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "_ORDERED", False)
    notes: list[str] = []

    def fence(name: str) -> Callable[[], None]:
        return lambda: notes.append(f"fence {name}")

    here, there = ends.here, ends.there
    here.fence, there.fence = fence("here"), fence("there")
    arena, view = here.mine, there.theirs
    data = arena.map
    arena.map, arena.words = Noting(data, "data", notes), Noting(arena.words, "flag", notes)
    monkeypatch.setattr("shoal.comm.rings._HEAD", Head(notes, data))
    here.send(TAG, 8, number(5))
    assert notes == ["write data", "write head", "fence here", "write flag"]
    notes.clear()
    view.words = Noting(view.words, "flag", notes)
    there.look()
    assert notes == ["read flag", "fence there", "read head", "read flag"]
    notes.clear()
    there.mine.words = Noting(there.mine.words, "flag", notes)
    there.done_with(there.take(TAG))
    assert notes == ["fence there", "write flag"]


class Head:
    """The head of a slot, in memory that is noted."""

    def __init__(self, notes: list[str], memory: object) -> None:
        from shoal.comm.rings import _HEAD

        self.real, self.notes, self.memory, self.size = _HEAD, notes, memory, _HEAD.size

    def pack_into(self, _memory: object, at: int, *values: int) -> None:
        self.notes.append("write head")
        self.real.pack_into(self.memory, at, *values)

    def unpack_from(self, memory: object, at: int) -> tuple[int, ...]:
        self.notes.append("read head")
        return self.real.unpack_from(memory, at)
