"""The card: what the records of two runs say. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from shoal.bench.record import Bytes, Record, Step, Value

LEFT_OUT = 3
"""First steps of a run: plans are recorded, memory is taken for the first time."""
EVEN = 0.05
"""Ranks keep pace if the slowest computes so much of a step longer than the fastest, or less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast a run was.

    Args:
        steps: that were counted.
        aside: that were not, as an evaluation or a checkpoint lies in them.
        median, p90: seconds of a step; nine of ten steps took at most `p90`.
        samples, tokens: a second; None: not known.
    """

    workers: int
    steps: int
    aside: int
    median: float
    p90: float
    samples: float | None
    tokens: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """A number that the script has measured, the last time it did, in both runs.

    Args:
        origin: "job.evaluate", "job.log" or "job.mean".
        one, many: after `step_one` and `step_many` steps; None: that run has not measured it.
        same: all that was measured of this name had the same bits in both runs.
    """

    origin: str
    name: str
    step_one: int | None
    step_many: int | None
    one: float | None
    many: float | None
    same: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One rank of one run.

    Args:
        computing, waiting: median seconds of a step: all that is no waiting for others, and that.
        longest: seconds of the longest wait in a step that counts, `at_step`, in the transfer `at`.
        sent: bytes of parameters and gradients, median of a step; `formula`: by ZeRO's.
        starved: the share of its time in which it could have run and had no processor.
    """

    workers: int
    rank: int
    memory: Bytes
    computing: float
    waiting: float
    longest: float
    at_step: int
    at: str
    sent: float
    formula: float
    starved: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What `shoal bench` has found.

    Args:
        script: with its arguments.
        strategy: of the run with several workers.
        steps_one, steps_many: that the runs took; with fewer samples nothing about quality can be compared.
        first: steps that a checkpoint had brought.
        processors: that this process may use.
        speed_up: of medians; `efficiency`: divided by the workers.
        sha256: of parameters and buffers in the end, with one worker and with several.
        same_bits: are they equal?
        printed: the last line with a number that rank 0 printed in both runs before its job ended, or "".
        apart: median over steps of the longest computing of a rank minus the shortest, in seconds.
        slowest: the rank that computes longest; None: ranks keep pace.
    """

    script: str
    strategy: str
    workers: int
    leaves: int
    device: str
    steps_one: int
    steps_many: int
    left_out: int
    first: int
    processors: int
    one: Pace
    many: Pace
    speed_up: float
    efficiency: float
    quality: tuple[Quality, ...]
    sha256: tuple[str, str]
    same_bits: bool
    printed: str
    ranks: tuple[Rank, ...]
    apart: float
    slowest: int | None


def make_card(script: str, one: Sequence[Record], many: Sequence[Record], *, processors: int) -> Card:
    """The card of two runs, each its records by rank.

    Args:
        script: its name.
        one: of the run with one worker.
        many: of that with several.
        processors: that they had.
    """
    paces, first = [pace(run) for run in (one, many)], many[0]
    speed_up = paces[0].median / paces[1].median
    sums = (one[0].sha256, many[0].sha256)
    alike = [line for line in first.printed if line in set(one[0].printed)]
    ranks = tuple(_rank(record) for run in (one, many) for record in run)
    apart, slowest = skew(many)
    return Card(
        script=script, strategy=first.strategy, workers=first.world, leaves=first.leaves, device=first.device,
        steps_one=len(one[0].steps), steps_many=len(first.steps), left_out=LEFT_OUT, first=first.first,
        processors=processors, one=paces[0], many=paces[1], speed_up=speed_up, efficiency=speed_up / first.world,
        quality=tuple(qualities(one[0].values, first.values)), sha256=sums, same_bits=sums[0] == sums[1] != "",
        printed=alike[-1] if alike else "", ranks=ranks, apart=apart, slowest=slowest,
    )  # fmt: skip


def counted(steps: Sequence[Step]) -> list[tuple[int, Step]]:
    """Those that count, with their numbers from 1: neither the first nor those with something beside training.

    Where nothing would be left, those with something beside training count, too.
    """
    late = list(enumerate(steps, start=1))[LEFT_OUT:]
    return [(n, step) for n, step in late if not step.aside] or late


def pace(run: Sequence[Record]) -> Pace:
    """A step lasts until its last rank is through."""
    kept = [counted(record.steps) for record in run]
    seconds = sorted(max(step.seconds for _, step in ranks) for ranks in zip(*kept, strict=False))
    samples = sum(step.samples for steps in kept for _, step in steps)
    speeds = run[0].tokens_per_second
    return Pace(
        workers=run[0].world, steps=len(seconds), aside=len(run[0].steps) - LEFT_OUT - len(seconds),
        median=median(seconds), p90=seconds[math.ceil(0.9 * len(seconds)) - 1],
        samples=samples / len(seconds) / median(seconds) if samples else None,
        tokens=median(speeds) if speeds else None,
    )  # fmt: skip


def skew(run: Sequence[Record]) -> tuple[float, int | None]:
    """How far ranks' computing is apart in a step, and which rank computes longest if one stands out."""
    busy = [[step.seconds - step.waited for _, step in counted(record.steps)] for record in run]
    apart = median(max(ranks) - min(ranks) for ranks in zip(*busy, strict=False))
    usual = [median(rank) for rank in busy]
    stands_out = max(usual) - min(usual) > EVEN * pace(run).median
    return apart, usual.index(max(usual)) if stands_out else None


def qualities(one: Sequence[Value], many: Sequence[Value]) -> Iterator[Quality]:
    """What was measured, held-out metrics first; means of steps only if nothing with a name was logged."""
    mine, theirs = _series(one), _series(many)
    keys = sorted(
        dict.fromkeys([*mine, *theirs]), key=lambda key: ("job.evaluate", "job.log", "job.mean").index(key[0])
    )
    logged = any(origin == "job.log" for origin, _ in keys)
    for origin, name in keys:
        if origin == "job.mean" and logged:
            continue
        ours, others = mine.get((origin, name), []), theirs.get((origin, name), [])
        yield Quality(
            origin=origin, name=name, same=[*map(repr, ours)] == [*map(repr, others)],
            step_one=ours[-1][0] if ours else None, one=ours[-1][1] if ours else None,
            step_many=others[-1][0] if others else None, many=others[-1][1] if others else None,
        )  # fmt: skip


def _series(values: Sequence[Value]) -> Mapping[tuple[str, str], list[tuple[int, float]]]:
    """Steps and values by what measured them. What has one name is told apart by its place among a step's."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    seen: dict[tuple[str, str, int], int] = {}
    for origin, name, step, value in values:
        number = seen[origin, name, step] = seen.get((origin, name, step), 0) + 1
        told = name if number == 1 else f"{name} (call {number})".strip()
        found.setdefault((origin, told), []).append((step, value))
    return found


def _rank(record: Record) -> Rank:
    steps = counted(record.steps)
    number, worst = max(steps, key=lambda pair: pair[1].wait)
    return Rank(
        workers=record.world, rank=record.rank, memory=record.memory,
        computing=median(step.seconds - step.waited for _, step in steps),
        waiting=median(step.waited for _, step in steps), longest=worst.wait, at_step=record.first + number,
        at=worst.at, sent=median(step.sent for _, step in steps), formula=record.formula,
        starved=record.starved,
    )  # fmt: skip
