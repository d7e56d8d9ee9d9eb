"""Ranks say what they want next before they do it together. A wrong program is a named error here, never a hang.

What is overlapped (a planned leaf) does not meet at every unit: its order was fixed when the plan was made.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

from shoal.comm.group import LAST_DOING, Ahead, Group, Sharing, Strips
from shoal.errors import DivergedError

_GLANCE = 0.0002
"""Seconds between two looks at whether the others have come."""


class Want(IntEnum):
    """What a rank can want of all ranks."""

    PREPARE = 1
    GATHER = 2  # a unit's parameters; the only one that others grant whatever they want themselves
    LEAF = 3
    LEAF_END = 4
    REDUCE = 5
    STEP = 6
    CLIP = 7
    MEAN = 8
    WHOLE = 9
    STATE = 10
    SAVE = 11
    LOAD = 12
    LOADER = 13
    CLOSE = 14
    ASIDE = 15  # what a model did for another one's sake is over
    GRADIENTS = 16
    REDUCE_VALUES = 17
    GATHER_VALUES = 18
    BROADCAST = 19
    BARRIER = 20
    ONCE = 21
    EVALUATE = 22
    PRETRAINED = 23
    REPORT = 24
    CHANGE = 25


_WORDS = {
    Want.PREPARE: "prepares a model",
    Want.GATHER: "needs the parameters of unit {}",
    Want.LEAF: "begins leaf turn {}",
    Want.LEAF_END: "ends leaf turn {}",
    Want.REDUCE: "reduces gradients of leaf turn {}",
    Want.STEP: "ends step {}",
    Want.CLIP: "is in clip_grad_norm of step {}",
    Want.MEAN: "is in job.mean of step {}",
    Want.WHOLE: "is in job.whole",
    Want.STATE: "is in job.state_dict",
    Want.SAVE: "is in job.save at step {}",
    Want.LOAD: "is in job.load",
    Want.LOADER: "starts a loader with fingerprint {}",
    Want.CLOSE: LAST_DOING,
    Want.ASIDE: "goes on after step {}",
    Want.GRADIENTS: "is in job.gradients of step {}",
    Want.REDUCE_VALUES: "is in job.reduce",
    Want.GATHER_VALUES: "is in job.gather",
    Want.BROADCAST: "is in job.broadcast",
    Want.BARRIER: "is in job.barrier",
    Want.ONCE: "is in job.once",
    Want.EVALUATE: "is in job.evaluate",
    Want.PRETRAINED: "is in job.load_pretrained",
    Want.CHANGE: "is in job.change",
    Want.REPORT: "is in loader.report of epoch {}",
}


class Intent(NamedTuple):
    """What a rank wants, of which (unit, turn, step), and for which of the job's models."""

    want: Want
    number: int = 0
    model: int = 0

    def __str__(self) -> str:
        return _WORDS[self.want].format(self.number) + (f" of model {self.model}" if self.model else "")


_HEAD = struct.Struct("<qii")


class Meeting:
    """Where all ranks compare what they want.

    Args:
        world: all ranks.
    """

    def __init__(self, world: Group) -> None:
        self.world, self.room = world, 0
        self.count = 0
        self._ahead: Ahead | None = None  # of the next one
        self.latest: Met | None = None  # to which not all have come, as far as this rank knows
        self.granters: list[Callable[[int], None]] = []  # each takes part in gathering units of one model

    def make_room(self, nbytes: int) -> None:
        """Messages of up to `nbytes` travel with the wish, from the same call on for all ranks."""
        if nbytes > self.room:
            self.room, self._ahead = nbytes, None  # shorter ones were expected

    def meet(self, want: Want, number: int = 0, payload: bytes = b"", *, model: int = 0) -> list[bytes]:
        """Return the payloads of all ranks when all want the same; until then, grant gathers.

        Raises:
            DivergedError: ranks want different things, with what each of them wants.
        """
        return self.begin(want, number, payload, model=model).answers()

    def begin(self, want: Want, number: int = 0, payload: bytes = b"", *, model: int = 0) -> Met:
        """Say it, and do something else until the others have said theirs. The next meeting waits for this one."""
        mine = Intent(want, number, model)
        assert len(payload) <= self.room, f"{mine}: {len(payload)} bytes do not fit into {self.room}"
        if self.latest is not None:
            self.latest.answers()
        self.world.carrier.note(str(mine))
        self.latest = Met(self, mine, payload)
        return self.latest

    def say(self, intent: Intent, payload: bytes) -> Sharing:
        data = _HEAD.pack(intent.number, intent.want, intent.model) + payload.ljust(self.room, b"\0")
        sharing = self.world.begin_share("meet", data, self._ahead, f"#{self.count}")
        self.count += 1
        self._ahead = self.world.expect_share("meet", len(data), f"#{self.count}")
        return sharing


class Met:
    """One meeting; all ranks have come to it when `answers` returns."""

    def __init__(self, meeting: Meeting, intent: Intent, payload: bytes) -> None:
        self.meeting, self.intent, self.payload = meeting, intent, payload
        self._sharing = meeting.say(intent, payload)
        self._answers: list[bytes] | None = None
        self._asking = False

    def ready(self) -> bool:
        """Have all come to it? Not for others, while somebody waits for them."""
        return self._answers is not None or (not self._asking and self._sharing.pending.ready())

    def ready_within(self, seconds: float) -> bool:
        """Have all come to it, now or so much later?"""
        ends = time.monotonic() + seconds
        while not self.ready() and time.monotonic() < ends:
            time.sleep(_GLANCE)
        return self.ready()

    def wait(self) -> Sequence[Strips]:
        self.answers()
        return ()

    def release(self) -> None:
        return

    def answers(self) -> list[bytes]:
        """The payloads of all ranks. See `Meeting.meet`."""
        self._asking = True
        while self._answers is None:
            heads = self._sharing.bytes()
            intents = [Intent(Want(w), n, m) for n, w, m in (_HEAD.unpack_from(h) for h in heads)]
            needed = [i.number for i in intents if i.want is Want.GATHER]
            if needed:
                self._grant(min(needed))
            elif all(i == self.intent for i in intents):
                self._end([h[_HEAD.size : _HEAD.size + len(self.payload)] for h in heads])
            else:
                raise DivergedError(
                    "ranks do different things: " + "; ".join(f"rank {r} {i}" for r, i in enumerate(intents)),
                    cause="different numbers of batches, or a branch that only some ranks take",
                    remedy="let job.loader or a prepared loader hand out batches; keep calls of the job out of "
                    "`if job.rank == 0`",
                )
        return self._answers

    def _grant(self, unit: int) -> None:
        """Take part in gathering a unit, and come back; but for who has come for just that."""
        for grant in self.meeting.granters:
            grant(unit)
        if self.intent[:2] == (Want.GATHER, unit):
            self._end([])
        else:
            self._sharing = self.meeting.say(self.intent, self.payload)

    def _end(self, answers: list[bytes]) -> None:
        self._answers, self.meeting.latest = answers, None
