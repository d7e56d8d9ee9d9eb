"""Which units stay whole between two uses, and how early they are gathered: arithmetic over a leaf's order. No tensors.

All ranks come to the same answer, as they start from the same order, sizes and room. What stays is chosen as Belady's
rule says: under pressure the unit that is needed latest goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from shoal.engine.schedule import Act, Entry, Event, Plan, fold, near

AHEAD = 2**25
"""Bytes that are gathered ahead of their use; two units, if that is more."""


class Room(NamedTuple):
    """Bytes for wholes: before the first backward of a leaf, and from there on."""

    going: int
    coming: int


class Use(NamedTuple):
    """A unit is needed from one event on and let go at another."""

    unit: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What one leaf does.

    Args:
        entries: its collectives.
        here: units that are whole when it begins, and how often they are used again after their first use.
        stay: units that are kept for the next leaf.
        most: bytes of units that are kept while nobody uses them.
    """

    entries: Plan
    here: Mapping[int, int]
    stay: frozenset[int]
    most: int


@dataclass(frozen=True, kw_only=True)
class Residence:
    """What leaves do, by whether another of the same step comes before them and after them.

    Args:
        events: of every leaf.
        sizes: bytes that a unit takes while it is whole, beyond what rests.
        room: for wholes; None: units are freed after use.
        carry: may units stay from one leaf to the next?
    """

    events: Sequence[Event]
    sizes: Mapping[int, int]
    room: Room | None = None
    carry: bool = True

    @cached_property
    def uses(self) -> list[Use]:
        """In the order of their beginning. A unit that is never let go is needed to the end, or to its next use."""
        found: list[Use] = []
        under_way: dict[int, int] = {}
        for at, (act, unit) in enumerate(self.events):
            if act is not Act.REDUCE and unit in under_way:
                place = under_way.pop(unit)
                found[place] = found[place]._replace(stop=at)
            if act is Act.GATHER:
                under_way[unit] = len(found)
                found.append(Use(unit, at, len(self.events)))
        return found

    @cached_property
    def active(self) -> list[int]:
        """Bytes of units in use, at every event."""
        return self._profile([(use.start, use.stop, self.sizes[use.unit]) for use in self.uses])

    @cached_property
    def total(self) -> int:
        return sum(self.sizes[unit] for unit in {use.unit for use in self.uses})

    @cached_property
    def rooms(self) -> list[int]:
        """At every event. Before a unit is used again, or gradients are complete, there are no gradients."""
        assert self.room is not None
        seen: set[int] = set()
        rooms: list[int] = []
        for act, unit in self.events:
            back = rooms[-1:] == [self.room.coming] or act is Act.REDUCE or (act is Act.GATHER and unit in seen)
            seen |= {unit} if act is Act.GATHER else set()
            rooms.append(self.room.coming if back else self.room.going)
        return rooms

    @cached_property
    def ahead(self) -> int:
        """Bytes that may be gathered ahead of their use."""
        largest = max(self.sizes.values(), default=0)
        if self.room is None:
            return max(AHEAD, 2 * largest)
        if self.total <= min(self.room):
            return largest
        left = min((room - used for room, used in zip(self.rooms, self.active, strict=True)), default=0)
        return max(0, min(largest, left))  # room for more is better used by keeping what is here

    @cached_property
    def in_use(self) -> int:
        """Bytes at most of units that are used, or gathered ahead."""
        return min(self.total, max(self.active, default=0) + self.ahead)

    @cached_property
    def most(self) -> int:
        """Bytes at most of units that are kept while nobody uses them, in any leaf."""
        kinds = [(False, False), (True, False), (False, True), (True, True)] if self.carried else [(False, False)]
        return max(self.course(before=before, after=after).most for before, after in kinds)

    @cached_property
    def _courses(self) -> dict[tuple[bool, bool], Course]:
        return {}

    def course(self, *, before: bool, after: bool) -> Course:
        """What a leaf does.

        Args:
            before: does another leaf of the step come before it, whose units are still here?
            after: and one after it?
        """
        if (before, after) not in self._courses:
            self._courses[before, after] = self._course(before=before, after=after)
        return self._courses[before, after]

    def _course(self, *, before: bool, after: bool) -> Course:
        into, out = (self.carried if yes else frozenset[int]() for yes in (before, after))
        stays = near(self.events) if self.room is None else self._stays(into, out)
        here = dict.fromkeys(into, 0)
        entries = fold(self.events, stays, here, out)
        return Course(entries=self._earlier(entries), here=here, stay=out, most=self._most(stays, into, out))

    def __str__(self) -> str:
        gathers = sum(act is Act.GATHER for act, _ in self.events)
        course = self.course(before=bool(self.carried), after=bool(self.carried))
        made = sum(entry.act is Act.GATHER for entry in course.entries)
        used, kept = (f"{nbytes / 2**20:.4g} MiB" for nbytes in (self.in_use, self.most))
        return (
            f"memory: {made} gathers for {gathers} uses of units in a leaf; at most {used} in use or gathered ahead, "
            f"{kept} kept"
        )

    # ---------------------------------------------------------------- what stays

    def _profile(self, spans: Sequence[tuple[int, int, int]]) -> list[int]:
        """The sum of what lasts from a start to a stop, at every event."""
        steps = [0] * (len(self.events) + 1)
        for start, stop, size in spans:
            steps[start] += size
            steps[stop] -= size
        return list(accumulate(steps))[:-1]

    def _fits(self, at: int, nbytes: int) -> bool:
        """Is there room for so much, and what is gathered ahead?"""
        return min(nbytes + self.ahead, self.total) <= self.rooms[at]

    @cached_property
    def carried(self) -> frozenset[int]:
        """Units that stay from one leaf to the next: those with the shortest way come first."""
        if self.room is None or not self.carry or not self.events:
            return frozenset()
        first = {use.unit: use.start for use in reversed(self.uses)}
        last = {use.unit: use.stop for use in self.uses}
        end = len(self.events)
        chosen: set[int] = set()
        used = list(self.active)
        for unit in sorted(first, key=lambda u: (first[u] + end - last[u], u)):
            size = self.sizes[unit]
            places = [*range(first[unit]), *range(last[unit], end)]
            if all(self._fits(at, used[at] + size) for at in places) and self._between(chosen, size):
                chosen.add(unit)
                for at in places:
                    used[at] += size
        return frozenset(chosen)

    def _between(self, chosen: set[int], size: int) -> bool:
        assert self.room is not None
        return sum(self.sizes[unit] for unit in chosen) + size <= min(self.room)

    def _stays(self, into: frozenset[int], out: frozenset[int]) -> set[int]:
        """Gathers that find their unit here."""
        following: dict[int, int] = {}  # where a unit is used the next time, by where it was let go
        starts = {use.unit: use.start for use in reversed(self.uses)}
        stays = {starts[unit] for unit in into}
        carried = self._profile(self._carried_spans(into, out))
        bound = [a + b for a, b in zip(self.active, carried, strict=True)]
        stops: dict[int, list[Use]] = {}
        for use, after in self._gaps():
            stops.setdefault(use.stop, []).append(use)
            following[use.start] = after
        idle: dict[int, int] = {}  # unit -> its next use
        for at, (act, unit) in enumerate(self.events):
            idle |= {use.unit: following[use.start] for use in stops.get(at, ())}
            if act is Act.GATHER and idle.pop(unit, None) is not None:
                stays.add(at)
            while not self._fits(at, bound[at] + sum(self.sizes[u] for u in idle)):
                large = [u for u in idle if self.sizes[u]]
                if not large:
                    break
                del idle[max(large, key=lambda u: (idle[u], u))]
        return stays

    def _gaps(self) -> list[tuple[Use, int]]:
        """Every use that another of the same unit follows, with where that begins."""
        found: list[tuple[Use, int]] = []
        after: dict[int, int] = {}
        for use in reversed(self.uses):
            found += [(use, after[use.unit])] if use.unit in after else []
            after[use.unit] = use.start
        return found

    def _carried_spans(self, into: frozenset[int], out: frozenset[int]) -> list[tuple[int, int, int]]:
        first = {use.unit: use.start for use in reversed(self.uses)}
        last = {use.unit: use.stop for use in self.uses}
        spans = [(0, first[unit], self.sizes[unit]) for unit in into]
        return spans + [(last[unit], len(self.events), self.sizes[unit]) for unit in out]

    def _most(self, stays: set[int], into: frozenset[int], out: frozenset[int]) -> int:
        spans = [(use.stop, after, self.sizes[use.unit]) for use, after in self._gaps() if after in stays]
        between = sum(self.sizes[unit] for unit in out)
        return max(between, *self._profile(spans + self._carried_spans(into, out)), 0)

    # ---------------------------------------------------------------- gathered ahead

    def _earlier(self, entries: Plan) -> Plan:
        """Let gathers begin before reductions that end later: else each would wait for the backward before it.

        All gathers keep their order among each other. No unit is gathered again before it is let go, and those that
        are early take no more than `ahead`.
        """
        gathers = [entry for entry in entries if entry.act is Act.GATHER]
        let_go = {after: use.stop for use, after in self._gaps()}
        order: list[Entry] = []
        done, lead = 0, 0
        passed = 0
        for entry in entries:
            if entry.act is Act.GATHER:
                passed += 1
                if passed <= done:
                    lead -= self.sizes[entry.unit]
                    continue
                done += 1
            else:
                while done < len(gathers):
                    size = self.sizes[gathers[done].unit]
                    if not size or lead + size > self.ahead or let_go.get(gathers[done].at, 0) > entry.at:
                        break
                    order.append(gathers[done])
                    lead += size
                    done += 1
            order.append(entry)
        return tuple(order)
