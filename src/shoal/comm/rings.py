"""Messages between two processes of a host, through memory that both see: no system call, no copy but the sender's.

Every rank has, in its own arena, a ring of slots for each other rank, and a word for every slot of the others' rings
towards it, in which it says which message of that slot it has done with. Nobody writes where another one writes.
"""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from typing import NamedTuple

from shoal.comm.arena import Arena, Fence, View

SLOTS = 4096
"""Messages from one rank to another that are not done with yet."""
_SLOT = 256
_HEAD = struct.Struct("<QQQQ")  # number, tag, bytes, offset in the arena (INLINE: in the slot)
INLINE = _SLOT - _HEAD.size
"""Bytes that travel in the slot itself."""
_HERE = 2**64 - 1
_HEADER = 4096
_PAIR = SLOTS * (_SLOT + 8)

ALIVE, FAILED, CLOSED = 1, 2, 3
"""What the first word of an arena says of its rank."""


def reserved(ranks: int) -> int:
    """Bytes of an arena that the rings of so many ranks take."""
    return _HEADER + ranks * _PAIR


class Message(NamedTuple):
    """What has come: `nbytes` at `offset` of the sender's arena."""

    slot: int
    number: int
    nbytes: int
    offset: int


class Ring:
    """This rank and one other: what goes there and what comes from there.

    Args:
        mine, theirs: the two arenas.
        me, other: their places among the ranks of the host.
        rank: the other's in the job.
    """

    def __init__(self, mine: Arena, theirs: View, me: int, other: int, rank: int) -> None:
        self.mine, self.theirs, self.rank, self.fence = mine, theirs, rank, Fence()
        self._out, self._out_done = _HEADER + other * _PAIR, (_HEADER + me * _PAIR + SLOTS * _SLOT) // 8
        self._in, self._in_done = _HEADER + me * _PAIR, (_HEADER + other * _PAIR + SLOTS * _SLOT) // 8
        self.sent, self.read = 0, 0
        self.backlog: deque[tuple[int, int, int, int | bytes]] = deque()  # sent, for which there is no slot yet
        self.waiting: defaultdict[int, deque[Message]] = defaultdict(deque)

    # ---------------------------------------------------------------- out

    def done(self, number: int) -> bool:
        """Has the other rank done with that message?"""
        return self.theirs.words[self._out_done + number % SLOTS] >= number

    def send(self, tag: int, nbytes: int, where: int | bytes) -> int:
        """Say that something lies at `where` of this rank's arena, or send the bytes themselves. Never waits."""
        self.sent += 1
        self.backlog.append((self.sent, tag, nbytes, where))
        self.flush()
        return self.sent

    def flush(self) -> None:
        """Hand over what was sent, as far as slots are done with."""
        while self.backlog and (self.backlog[0][0] <= SLOTS or self.done(self.backlog[0][0] - SLOTS)):
            self._put(*self.backlog.popleft())

    def _put(self, number: int, tag: int, nbytes: int, where: int | bytes) -> None:
        at = self._out + number % SLOTS * _SLOT
        if isinstance(where, bytes):
            self.mine.map[at + _HEAD.size : at + _HEAD.size + nbytes] = where
        _HEAD.pack_into(self.mine.map, at, 0, tag, nbytes, _HERE if isinstance(where, bytes) else where)
        self.fence()
        self.mine.words[at // 8] = number

    # ---------------------------------------------------------------- in

    def has(self, tag: int) -> bool:
        """Has such a message come?"""
        if not self.waiting.get(tag):
            self.look()
        return bool(self.waiting.get(tag))

    def look(self) -> None:
        """Take in what has come."""
        words = self.theirs.words
        while True:
            at = self._in + (self.read + 1) % SLOTS * _SLOT
            if words[at // 8] != self.read + 1:
                return
            self.fence()
            self.read += 1
            number, tag, nbytes, offset = _HEAD.unpack_from(self.theirs.map, at)
            if offset == _HERE:
                offset = at + _HEAD.size
            self.waiting[tag].append(Message(self.read % SLOTS, number, nbytes, offset))

    def take(self, tag: int) -> Message:
        """The oldest such message. There must be one."""
        message = self.waiting[tag].popleft()
        if not self.waiting[tag]:
            del self.waiting[tag]
        return message

    def done_with(self, message: Message) -> None:
        self.fence()
        self.mine.words[self._in_done + message.slot] = message.number
