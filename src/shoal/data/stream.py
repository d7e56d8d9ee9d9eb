"""Loaders of data sets that can only be read through: every rank reads all batches and keeps those of its leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar, cast

from torch.utils.data import DataLoader

from shoal.checkpoint.tensors import raw_bytes
from shoal.comm.meet import Meeting, Want
from shoal.data.loader import Feed, Handed, Loader
from shoal.engine.precision import tensors
from shoal.errors import DivergedError
from shoal.random import everything, get_states, mix, set_states

T_co = TypeVar("T_co", covariant=True)


class StreamLoader(Loader[T_co]):
    """Batch k of an epoch is leaf k % leaves of step k // leaves; the last step may have fewer.

    What the data set draws while it is read is drawn alike on all ranks, from (job seed, epoch). A step's batches are
    in memory together. Going on after `job.load` reads over what was done.

    Args:
        feed, source: as in `Loader`.
        meeting: where ranks compare what they read, once an epoch.
    """

    def __init__(self, feed: Feed, source: DataLoader[T_co], meeting: Meeting) -> None:
        super().__init__(feed, source, lambda _epoch, _leaves: [])
        self.meeting = meeting

    def __len__(self) -> int:
        raise TypeError("a data set that can only be read through has no length")

    def __iter__(self) -> Iterator[T_co]:
        if self.begun:
            self.go_to(self.epoch + 1, 0)
        self.begun = True
        loop, start = self.feed.begin(), self.next_step
        try:
            for number, batches in self._steps():
                if number < start:
                    continue
                if number == start:
                    _same_stream(self.meeting, batches)
                yield from self._hand_out(number, batches)
            self.go_to(self.epoch + 1, 0)
        finally:
            self.feed.end(loop)

    def _steps(self) -> Iterator[tuple[int, list[T_co]]]:
        """All batches of every step. The generators are the stream's own while it is read."""
        everything(mix("order", self.feed.seed, self.epoch))
        set_epoch = cast("Callable[[int], None] | None", getattr(self.source.dataset, "set_epoch", None))
        if set_epoch is not None:
            set_epoch(self.epoch)
        stream = iter(self.source)
        own = get_states()
        number = 0
        while True:
            users = get_states()
            set_states(own)
            batches = list(islice(stream, self.feed.leaves))
            own = get_states()
            set_states(users)
            if not batches:
                return
            yield number, batches
            number += 1

    def _hand_out(self, number: int, batches: list[T_co]) -> Iterator[T_co]:
        full = self.source.batch_size or max(map(_samples, batches))
        turns = self.feed.new_turns(len(batches))
        turns.learn({leaf: _samples(batch) / full for leaf, batch in enumerate(batches)})
        for turn in range(turns.run_by(self.feed.cell)):
            leaf = turns.leaf(self.feed.cell, turn)
            weight = _samples(batches[leaf]) / full if leaf is not None else 0.0
            self.next_step = number + 1
            self.feed.hand_out(Handed(leaf, weight, turn, turns))
            yield batches[leaf or 0]


def _samples(batch: object) -> int:
    """How many samples a batch has: the length of its first tensor."""
    found = tensors(batch)
    return len(found[0]) if found and found[0].dim() else 1


def _same_stream(meeting: Meeting, batches: list[T_co]) -> None:
    """A data set that divides itself by rank would lose most of every rank's samples here."""
    digest = hashlib.sha256()
    for tensor in tensors(list(batches)):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    marks = meeting.meet(Want.LOADER, 0, digest.digest()[:16])
    if len(set(marks)) > 1:
        raise DivergedError(
            "ranks read different batches from a data set that can only be read through",
            cause="it divides itself by rank, or draws its order from a generator of its own",
            remedy="read everything on every rank, in one order: shoal counts out the batches",
        )
