"""Where every element of the state lives. Arithmetic only: no tensors.

State is a space of named intervals: `(parameter name, box, start, stop) -> owner`. A flat buffer is a transport
detail: parameters lie in it one after the other, each at a multiple of `ALIGN` elements, and every owner holds one
contiguous run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

ALIGN = 64
"""Elements. Parameters start at multiples of it in every strategy: kernels are picked by alignment."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular piece of a parameter: the whole of it, or what one tensor-parallel rank holds."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def runs(self, shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut `start:stop` of this box (row-major) into runs that are contiguous in the parameter too.

        Yields `(at, local, numel)`: `at` counts in the parameter of `shape`, `local` in the box.
        """
        inner = len(shape)  # dimensions from here on are complete, so they form one run
        while inner > 0 and (inner == len(shape) or self.size[inner] == shape[inner]):
            inner -= 1
        length = math.prod(self.size[inner:])
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        base = sum(o * s for o, s in zip(self.offset, strides, strict=True))
        for row, index in enumerate(product(*(range(n) for n in self.size[:inner]))):
            local = row * length
            first, last = max(start, local), min(stop, local + length)
            if first < last:
                at = base + sum(i * s for i, s in zip(index, strides, strict=False)) + (first - local)
                yield at, first, last - first


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements `start:stop` of one parameter's box, held by `owner` from position `at` of its shard."""

    name: str
    shape: tuple[int, ...]
    box: Box
    start: int
    stop: int
    owner: int
    at: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def complete(self) -> bool:
        """Is this all of the box?"""
        return self.numel == self.box.numel


@dataclass(frozen=True, slots=True)
class Span:
    """Where one parameter lies in its unit's flat buffer. `granule`: it may be cut at multiples of so many elements."""

    name: str
    shape: tuple[int, ...]
    start: int
    granule: int = ALIGN
    box: Box = Box((), ())

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.numel


class Item(NamedTuple):
    """What a layout is made from: a parameter's name, shape and granule (0: it must stay whole)."""

    name: str
    shape: tuple[int, ...]
    granule: int = ALIGN


@dataclass(frozen=True, slots=True)
class Layout:
    """A flat buffer of parameters and its cuts. Owner r holds `bounds[r]:bounds[r + 1]`, which may be empty."""

    spans: tuple[Span, ...]
    bounds: tuple[int, ...]

    @classmethod
    def even(cls, items: Iterable[Item], owners: int, shares: Sequence[float] = ()) -> Layout:
        """Cut as evenly (or as near to `shares`) as the granules allow, ignoring where parameters end.

        Args:
            items: the parameters, in the order of the buffer.
            owners: into how many shards.
            shares: relative sizes of the shards; empty means equal.

        Raises:
            ValueError: shares that are not one non-negative number per owner, with a positive sum.
        """
        spans = _line_up(items)
        total = _padded(spans)
        weights = list(shares) or [1.0] * owners
        if len(weights) != owners or not all(w >= 0 for w in weights) or not 0 < sum(weights) < math.inf:
            raise ValueError(f"shares={list(shares)} for {owners} owners: give {owners} numbers >= 0, not all 0")
        bounds, taken = [0], 0.0
        for weight in weights[:-1]:
            taken += weight
            bounds.append(max(bounds[-1], _cut_near(spans, round(total * taken / sum(weights)), total)))
        return cls(tuple(spans), (*bounds, total))

    @classmethod
    def by_parameter(cls, items: Iterable[Item], owners: int, loads: list[int] | None = None) -> Layout:
        """Never cut a parameter. The largest goes first, to the owner with the least so far.

        Args:
            items: the parameters. Their order in the buffer becomes: owner by owner.
            owners: among how many.
            loads: elements that each owner has already (of other buffers); added to in place.
        """
        loads = [0] * owners if loads is None else loads
        order = list(items)
        parts: list[list[int]] = [[] for _ in range(owners)]
        for i in sorted(range(len(order)), key=lambda i: (-math.prod(order[i].shape), i)):
            owner = min(range(owners), key=lambda r: (loads[r], r))
            parts[owner].append(i)
            loads[owner] += math.prod(order[i].shape)
        spans = _line_up(order[i] for part in parts for i in sorted(part))
        bounds, done = [0], 0
        for part in parts:
            done += len(part)
            bounds.append(spans[done].start if done < len(spans) else _padded(spans))
        return cls(tuple(spans), tuple(bounds))

    @property
    def owners(self) -> int:
        return len(self.bounds) - 1

    @property
    def numel(self) -> int:
        """Length of the flat buffer in elements, padding included."""
        return self.bounds[-1]

    @property
    def used(self) -> int:
        """Elements of parameters, padding left out."""
        return sum(s.numel for s in self.spans)

    def shard(self, owner: int) -> slice:
        return slice(self.bounds[owner], self.bounds[owner + 1])

    def shard_numel(self, owner: int) -> int:
        return self.bounds[owner + 1] - self.bounds[owner]

    def pieces(self, owner: int) -> Iterator[Interval]:
        """The parts of parameters that `owner` holds. Empty parameters belong to owner 0."""
        low, high = self.bounds[owner], self.bounds[owner + 1]
        for s in self.spans:
            start, stop = max(s.start, low), min(s.stop, high)
            if start < stop or (s.numel == 0 and owner == 0):
                start, stop = (start, stop) if start < stop else (s.start, s.start)
                yield Interval(s.name, s.shape, s.box, start - s.start, stop - s.start, owner, start - low)

    def __iter__(self) -> Iterator[Interval]:
        for owner in range(self.owners):
            yield from self.pieces(owner)


class Move(NamedTuple):
    """Copy `numel` elements: from `src_at` in owner `src`'s shard to `dst_at` in owner `dst`'s."""

    src: int
    src_at: int
    dst: int
    dst_at: int
    numel: int


def moves(old: Iterable[Interval], new: Iterable[Interval]) -> Iterator[Move]:
    """How to re-cut a space. One function for checkpoint load, resize and change of strategy.

    Args:
        old: where everything is now.
        new: where it has to be; any part of it, in any order. Boxes may differ from those of `old`.

    Raises:
        ValueError: something in `new` that is nowhere in `old`, or has another shape there.
    """
    have: dict[str, list[tuple[int, int, int, int]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in old:
        shapes[piece.name] = piece.shape
        runs = piece.box.runs(piece.shape, piece.start, piece.stop)
        have.setdefault(piece.name, []).extend(
            (at, at + n, piece.owner, piece.at + local - piece.start) for at, local, n in runs
        )
    for runs in have.values():
        runs.sort()
    for want in new:
        if shapes.get(want.name, want.shape) != want.shape:
            raise ValueError(f"{want.name} has shape {shapes[want.name]} in the old space and {want.shape} in the new")
        for at, local, n in want.box.runs(want.shape, want.start, want.stop):
            yield from _cover(have.get(want.name, []), want, at, want.at + local - want.start, n)


def _cover(runs: list[tuple[int, int, int, int]], want: Interval, at: int, dst_at: int, numel: int) -> Iterator[Move]:
    done = at
    for start, stop, src, src_at in runs:
        if start <= done < stop and done < at + numel:
            n = min(stop, at + numel) - done
            yield Move(src, src_at + done - start, want.owner, dst_at + done - at, n)
            done += n
    if done < at + numel:
        raise ValueError(f"elements {done}:{at + numel} of {want.name} are nowhere in the old space")


def _line_up(items: Iterable[Item]) -> list[Span]:
    spans: list[Span] = []
    at = 0
    for name, shape, granule in items:
        spans.append(Span(name, shape, at, granule, Box.whole(shape)))
        at = _up(spans[-1].stop)
    return spans


def _padded(spans: Sequence[Span]) -> int:
    return _up(spans[-1].stop) if spans else 0


def _up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def _cut_near(spans: Sequence[Span], target: int, total: int) -> int:
    """The allowed cut nearest to `target`."""
    ends = [*(s.start for s in spans), total][1:]
    for span, end in zip(spans, ends, strict=True):
        if target < end:
            if span.granule == 0:
                return span.start if target - span.start <= end - target else end
            cut = span.start + round((target - span.start) / span.granule) * span.granule
            return min(cut, end)
    return total
