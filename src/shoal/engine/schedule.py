"""In which order units are gathered and reduced in a leaf: recorded once, then followed by all ranks. No tensors.

In the first leaf ranks agree on every gather one by one, and each notes what it did itself. The fullest record becomes
the plan of all; units that it lacks get the place that their definition gives them. A later leaf may leave units out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, cast


class Act(Enum):
    GATHER = "gather"
    FREE = "free"
    REDUCE = "reduce"


class Entry(NamedTuple):
    """One collective of a leaf.

    `keep`: so many times what was gathered is used again without being freed in between. `at`: its place among the
    events that the plan was made of.
    """

    act: Act
    unit: int
    keep: int = 0
    at: int = 0


Plan = tuple[Entry, ...]
Event = tuple[Act, int]


@dataclass(slots=True)
class Record:
    """What one rank did in a leaf: when it needed and freed units, and when it had all gradients of one (so far).

    `times`: per end of a unit, how often its gradients were complete, those that `zero_grad()` dropped included.
    """

    events: list[Event] = field(default_factory=list[Event])
    times: Counter[int] = field(default_factory=Counter[int])

    def add(self, act: Act, unit: int, end: int | None = None) -> None:
        self.events.append((act, unit))
        if act is Act.REDUCE:
            self.times[unit if end is None else end] += 1

    def forget_gradients(self) -> None:
        self.events = [e for e in self.events if e[0] is not Act.REDUCE]

    def to_json(self) -> bytes:
        return json.dumps([[(act.value, unit) for act, unit in self.events], list((+self.times).items())]).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Record:
        events, times = cast(tuple[list[tuple[str, int]], list[tuple[int, int]]], json.loads(data))
        return cls([(Act(act), unit) for act, unit in events], Counter(dict(times)))


def fullest(records: Sequence[Record]) -> Record:
    """The record of the rank that had most gradients and used most; of the first of them."""
    return max(records, key=lambda r: (len(+r.times), len(r.events)))


def make_plan(
    record: Record, around: Mapping[int, Collection[int]], reduced: Collection[int],
    blocks: Collection[Collection[int]] = (),
) -> Plan:  # fmt: skip
    """The order of collectives for all later leaves, where units are freed after use. Arguments: see `in_order`."""
    events = in_order(record, around, reduced, blocks)
    return fold(events, near(events), {})


def in_order(
    record: Record, around: Mapping[int, Collection[int]], reduced: Collection[int],
    blocks: Collection[Collection[int]] = (),
) -> list[Event]:  # fmt: skip
    """What every leaf does from now on, all units in it.

    Args:
        record: what is repeated.
        around: every unit in definition order, and the units of the blocks that it lies in.
        reduced: units that have gradients.
        blocks: units that belong to one block, and are therefore always entered together.
    """
    last = {unit: i for i, (act, unit) in enumerate(record.events) if act is Act.REDUCE}
    events = [e for i, e in enumerate(record.events) if e[0] is not Act.REDUCE or last[e[1]] == i]
    _add_missing(events, around, {unit: block for block in blocks for unit in block})
    events += [(Act.REDUCE, unit) for unit in reversed(list(around)) if unit in reduced and unit not in last]
    return events


def _add_missing(
    events: list[Event], around: Mapping[int, Collection[int]], blocks: Mapping[int, Collection[int]]
) -> None:
    """Let units that were not entered be used beside their neighbours, going in and coming back."""
    for unit, outer in around.items():
        there = {u for act, u in events if act is Act.GATHER}
        if unit in there or not there:
            continue
        missing = [u for u in blocks.get(unit, (unit,)) if u not in there]
        before = [u for u in there if u < unit and u not in outer]
        after = [u for u in there if u > unit and u not in outer]
        beside = max(before) if before else min(after) if after else max(there, key=lambda u: len(around[u]))
        block = blocks.get(beside, (beside,))
        first, last = _places(events, block)
        if before:
            going = _used(events, first, block)
            coming = last if last > first else going
        elif after:
            going, coming = first, _used(events, last, block)
        else:
            going, coming = _entered(events, first, block), _entered(events, last, block)
        use = [(act, u) for act in (Act.GATHER, Act.FREE) for u in missing]
        events[coming:coming] = use
        events[going:going] = use


def _places(events: Sequence[Event], block: Collection[int]) -> tuple[int, int]:
    """Where the block is entered the first and the last time: where the first of its units is gathered."""
    opener = next(u for act, u in events if act is Act.GATHER and u in block)
    found = [i for i, e in enumerate(events) if e == (Act.GATHER, opener)]
    return found[0], found[-1]


def _entered(events: Sequence[Event], at: int, block: Collection[int]) -> int:
    """The place after the gathers of the block's units that begin at `at`."""
    while at < len(events) and events[at][0] is Act.GATHER and events[at][1] in block:
        at += 1
    return at


def _used(events: Sequence[Event], at: int, block: Collection[int]) -> int:
    """The place after the use that begins with the gathers at `at`: after its frees, if nothing is gathered before."""
    end = _entered(events, at, block)
    using = {unit for _, unit in events[at:end]}
    for i in range(end, len(events)):
        act, unit = events[i]
        if act is Act.GATHER:
            break
        if act is Act.FREE and unit in using:
            using.remove(unit)
            end = i + 1
            if not using:
                break
    return end


def near(events: Sequence[Event]) -> set[int]:
    """Uses of units that come so soon after the use before that freeing them in between does not pay.

    Returns:
        Places of gathers with at most one other between them and the unit's latest use.
    """
    found: set[int] = set()
    gathers = 0
    freed: dict[int, int] = {}  # unit -> how many gathers came before it was freed
    seen: set[int] = set()
    for at, (act, unit) in enumerate(events):
        if act is Act.FREE:
            freed[unit] = gathers
        elif act is Act.GATHER and unit in seen and gathers - freed.get(unit, gathers) <= 1:
            found.add(at)
        elif act is Act.GATHER:
            seen.add(unit)
            gathers += 1
    return found


def fold(events: Sequence[Event], stays: Collection[int], here: dict[int, int], later: Collection[int] = ()) -> Plan:
    """Leave out the gathers at `stays`: who gathered the unit before keeps it.

    Args:
        here: units that are whole when the leaf begins; filled in: how often they are used again after their first use.
        later: units that are kept when the leaf ends.
    """
    entries: list[Entry] = []
    latest = dict.fromkeys(here, -1)  # unit -> where its latest gather stands; -1: before the leaf

    def kept(unit: int) -> None:
        at = latest[unit]
        if at < 0:
            here[unit] += 1
        else:
            entries[at] = entries[at]._replace(keep=entries[at].keep + 1)

    for unit in here:
        here[unit] = -1  # the first use is none of them
    for at, (act, unit) in enumerate(events):
        if act is Act.GATHER and at in stays:
            kept(unit)
        elif act is not Act.FREE:
            latest |= {unit: len(entries)} if act is Act.GATHER else {}
            entries.append(Entry(act, unit, at=at))
    for unit in later:
        kept(unit)
    return tuple(entries)


class Cursor:
    """How far a rank has come in the plan of a leaf."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.at = plan, 0

    @property
    def next(self) -> Entry | None:
        return self.plan[self.at] if self.at < len(self.plan) else None

    def will_gather(self, unit: int) -> bool:
        return any(e.act is Act.GATHER and e.unit == unit for e in self.plan[self.at :])
