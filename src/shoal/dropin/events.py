"""What ranks tell each other before they do something together, so that a wrong program is an error, never a hang."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from shoal.comm.group import Group
from shoal.errors import DivergedError, OrderError

_HEAD = struct.Struct("<BBBq8s8s")


class Event(IntEnum):
    """What a rank does next with its wrapped model."""

    BACKWARD = 0
    FORWARD = 1
    DONE = 2  # it has no more data, and joins in what the others do
    LEFT = 3  # its program is over


_WORDS = {
    Event.BACKWARD: "ends a backward",
    Event.FORWARD: "begins a forward and sends buffers",
    Event.DONE: "is out of data",
    Event.LEFT: "has come to the end of its program",
}


class Told(NamedTuple):
    """What one rank has said. `batch`: a digest of its inputs; `state`: of its parameters; empty: not taken."""

    event: Event
    joins: bool  # is it inside `join`?
    strict: bool  # does one rank without data end it for all?
    steps: int
    batch: bytes
    state: bytes
    touched: int  # a bit for every parameter that has a gradient
    late: int  # a bit for every bucket that got gradients when it was under way


class Events:
    """Where the ranks of one model meet.

    Args:
        group: the ranks.
        params, buckets: how many there are.
        of: what is between the model and its program.
        remedy: where ranks do different things.
    """

    def __init__(
        self, group: Group, params: int, buckets: int, of: str = "a DistributedDataParallel",
        remedy: str = "`with model.join():` around the loop for unequal data; model.module(x) for one rank alone",
    ) -> None:  # fmt: skip
        self.group, self.params, self.size = group, params, (params + buckets) // 8 + 1
        self.of, self.remedy = of, remedy

    def tell(
        self, event: Event, *, steps: int = 0, touched: int = 0, late: int = 0, batch: bytes = b"",
        state: bytes = b"", joins: bool = False, strict: bool = False,
    ) -> list[Told]:  # fmt: skip
        """What every rank says, in their order. Ranks that are out of data agree with whatever the others do.

        Raises:
            DivergedError: ranks that have data do different things.
            OrderError: `strict`, and some rank is out of data.
        """
        head = _HEAD.pack(event, joins, strict, steps, batch.ljust(8, b"\0"), state.ljust(8, b"\0"))
        mine = touched | late << self.params
        told: list[Told] = []
        for data in self.group.share("events", head + mine.to_bytes(self.size, "little")):
            kind, inside, hard, number, inputs, params = _HEAD.unpack_from(data)
            bits = int.from_bytes(data[_HEAD.size :], "little")
            told.append(
                Told(
                    Event(kind), bool(inside), bool(hard), number, inputs.rstrip(b"\0"), params.rstrip(b"\0"),
                    bits & ((1 << self.params) - 1), bits >> self.params,
                )
            )  # fmt: skip
        busy = {t.event for t in told if t.event is not Event.DONE}
        if len(busy) > 1:
            what = "; ".join(f"rank {r} {_WORDS[t.event]}" for r, t in zip(self.group.ranks, told, strict=True))
            raise DivergedError(
                f"ranks do different things with {self.of}: {what}",
                cause="unequal numbers of batches, or a branch that only some ranks take",
                remedy=self.remedy,
            )
        if busy and len({t.joins for t in told}) > 1:
            inside = ", ".join(str(r) for r, t in zip(self.group.ranks, told, strict=True) if t.joins)
            raise DivergedError(
                f"rank {inside} is inside `with model.join():`, and others are not",
                remedy="join() around the loop on all ranks; those with data for longer need it, too",
            )
        out = [str(r) for r, t in zip(self.group.ranks, told, strict=True) if t.event is Event.DONE]
        if out and busy and any(t.strict for t in told):
            raise OrderError(
                f"rank {', '.join(out)} ran out of data, with join(throw_on_early_termination=True)",
                remedy="join() without it goes on with the others' data",
            )
        return told
