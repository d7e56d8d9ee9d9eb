"""Which samples an epoch has used: counted on every rank, added up, and held against what was planned."""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, cast

import numpy as np
from numpy.typing import NDArray

from shoal.errors import BatchError, DivergedError
from shoal.random import mix

Compare = Callable[[int, bytes, bytes, Callable[[], Exception]], list[bytes]]
"""See `Feed.compare`."""

_COUNTS = struct.Struct("<qqQ?")  # used, padded, marks, complete


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What an epoch has used. A line when printed.

    Attributes:
        epoch: from 0.
        used: samples whose gradients counted, over all ranks, a sample that was drawn twice counted twice.
        total: samples of the data set; None: it can only be read through.
        before: used before the checkpoint with which this job began.
        left: planned, and not used because the loop was left early.
        dropped: samples of the set that no step of this epoch has: a last one that is not full, or not drawn.
        doubled: what was planned beyond a sample's first use.
        padded: handed out once more to ranks that had no leaf; their gradients are dropped.
    """

    epoch: int
    used: int
    total: int | None
    before: int = 0
    left: int = 0
    dropped: int = 0
    doubled: int = 0
    padded: int = 0

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        text = f"epoch {self.epoch}: {self.used}{of} samples used"
        for name in ("before", "left", "dropped", "doubled", "padded"):
            number = cast(int, getattr(self, name))
            text += f", {number} {name}" if number else ""
        return text


class Tally:
    """What this rank has been handed in an epoch: how many samples, and a sum over them that hangs on no order.

    Args:
        start: the step with which it begins.
    """

    def __init__(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start
        self.used, self.padded, self.marks = 0, 0, 0
        self.complete = False

    def hand_out(self, indices: Sequence[object], *, used: bool) -> None:
        """A batch reaches the user."""
        if not used:
            self.padded += len(indices)
            return
        self.used += len(indices)
        self.marks = (self.marks + _marks(indices)) % 2**64

    def count(self, samples: int, *, used: bool) -> None:
        """The same for samples that have no numbers."""
        self.used += samples if used else 0
        self.padded += 0 if used else samples


def usage_of(tally: Tally, plan: Iterable[Sequence[Sequence[int]]], total: int, compare: Compare) -> Usage:
    """Add up all ranks' tallies and hold them against the plan, whose steps are lists of leaves. Collective.

    Raises:
        DivergedError: ranks have different plans, or not all of it was used.
    """
    before, want, marks = 0, 0, 0
    seen = [np.empty(0, dtype=np.uint64)]
    for step, leaves in enumerate(plan):
        for indices in leaves:
            seen.append(_keys(indices))
            if step < tally.start:
                before += len(indices)
            else:
                want += len(indices)
                marks = (marks + _marks(indices)) % 2**64
    used, padded, found, complete = _together(tally, marks, compare)
    if complete and (used, found) != (want, marks):
        raise DivergedError(
            f"epoch {tally.epoch}: {used} samples were used of {want} that were planned, or others than those",
            cause="a rank has left its loop over the loader earlier than others",
            remedy="leave it on all ranks in the same step",
        )
    distinct = len(np.unique(np.concatenate(seen)))
    return Usage(
        epoch=tally.epoch, used=used, total=total, before=before, left=want - used, padded=padded,
        dropped=max(total - distinct, 0), doubled=before + want - distinct,
    )  # fmt: skip


def usage_of_stream(tally: Tally, compare: Compare) -> Usage:
    """The same for a set that can only be read through. Collective."""
    used, padded, _, _ = _together(tally, 0, compare)
    return Usage(epoch=tally.epoch, used=used, total=None, padded=padded)


def check_once(epoch: int, batches: Iterable[tuple[int, int, Sequence[int]]]) -> None:
    """Raises `BatchError` where one of these (step, leaf, samples) has a sample that another has, or has it twice."""
    seen: dict[int, str] = {}
    for step, leaf, indices in batches:
        here = f"leaf {leaf} of step {step}"
        for index in indices:
            key = _key(index)
            if key in seen:
                raise BatchError(
                    f"epoch {epoch}: sample {index} is in {seen[key]} and in {here}",
                    cause="a sampler that draws with replacement, or a batch sampler whose batches overlap",
                    remedy="another sampler, or loader.once = False if that is meant",
                )
            seen[key] = here


def _together(tally: Tally, marks: int, compare: Compare) -> tuple[int, int, int, bool]:
    def differs() -> Exception:
        return DivergedError(
            f"epoch {tally.epoch}: the samplers of ranks draw different samples, or in another step",
            cause="a sampler that divides by rank, or draws its order from a generator of its own",
            remedy="the sampler of one process, whose order hangs on torch's generator or on set_epoch",
        )

    mark = mix(tally.epoch, tally.start, marks).to_bytes(8, "little")
    mine = _COUNTS.pack(tally.used, tally.padded, tally.marks, tally.complete)
    parts = [_COUNTS.unpack(part) for part in compare(tally.epoch, mark, mine, differs)]
    used, padded, found = (sum(part[n] for part in parts) for n in range(3))
    return used, padded, found % 2**64, any(part[3] for part in parts)


def _key(index: object) -> int:
    """A number of a sample, whatever a sampler calls it."""
    try:
        return operator.index(cast("SupportsIndex", index))
    except TypeError:
        return mix("sample", repr(index))


def _keys(indices: Sequence[object]) -> NDArray[np.uint64]:
    return np.asarray([_key(i) for i in indices], dtype=np.int64).astype(np.uint64)


def _marks(indices: Sequence[object]) -> int:
    """A sum of numbers that look random, one for each sample (splitmix64)."""
    x = _keys(indices) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))
