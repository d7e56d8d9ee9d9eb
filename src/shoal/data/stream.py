"""Loaders of data sets that can only be read through: every rank reads all batches and keeps those of its leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar, cast

from torch.utils.data import DataLoader, Dataset, IterableDataset

from shoal.checkpoint.tensors import raw_bytes
from shoal.comm.meet import Meeting, Want
from shoal.data.loader import Feed, Handed, Loader, kept_settings
from shoal.data.usage import Tally, Usage, usage_of_stream
from shoal.engine.precision import tensors
from shoal.errors import DivergedError
from shoal.logs import say
from shoal.random import everything, get_states, mix, set_states

T_co = TypeVar("T_co", covariant=True)


class StreamLoader(Loader[T_co]):
    """Batch k of an epoch is leaf k % leaves of step k // leaves; the last step may have fewer.

    What the data set draws while it is read is drawn alike on all ranks, from (job seed, epoch). It is read in one
    order by one process: several loader workers would each read all of it, or divide it in another order. A step's
    batches are in memory together. Going on after `job.load` reads over what was done.

    Args:
        feed, source: as in `Loader`.
        meeting: where ranks compare what they read, once an epoch.
    """

    def __init__(self, feed: Feed, source: DataLoader[T_co], meeting: Meeting) -> None:
        super().__init__(feed, source, lambda _epoch, _leaves: [])
        if source.num_workers > 1 and feed.cell == 0:
            say(f"a set that can only be read through is read by one loader worker, not {source.num_workers}")
        self.meeting = meeting

    def __len__(self) -> int:
        raise TypeError("a data set that can only be read through has no length")

    def __iter__(self) -> Iterator[T_co]:
        if self.begun:
            self.go_to(self.epoch + 1, 0)
        self.begun = True
        loop, start = self.feed.begin(), self.next_step
        self.tally = Tally(self.epoch, start)
        try:
            for number, batches in self._steps():
                if number < start:
                    continue
                if number == start:
                    _same_stream(self.meeting, batches)
                yield from self._hand_out(number, batches)
            self.tally.complete = True
            self.go_to(self.epoch + 1, 0)
        finally:
            self.feed.end(loop)

    def _steps(self) -> Iterator[tuple[int, list[T_co]]]:
        """All batches of every step."""
        set_epoch = cast("Callable[[int], None] | None", getattr(self.source.dataset, "set_epoch", None))
        if set_epoch is not None:
            set_epoch(self.epoch)
        stream = read_through(self.source, mix("order", self.feed.seed, self.epoch))
        number = 0
        while batches := list(islice(stream, self.feed.leaves)):
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
            self.tally.count(_samples(batches[leaf or 0]), used=leaf is not None)
            yield self.made(batches[leaf or 0])

    def report(self) -> Usage:
        """What the latest epoch has used. Collective, between steps."""
        return usage_of_stream(self.tally, self.feed.compare)


class _Seeded(IterableDataset[T_co]):
    """What the set draws while it is read does not depend on the process in which it is read."""

    def __init__(self, dataset: IterableDataset[T_co], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __iter__(self) -> Iterator[T_co]:
        everything(self.seed)
        yield from self.dataset


def read_through(source: DataLoader[T_co], seed: int) -> Iterator[T_co]:
    """All batches. While one is read the global generators are the set's own, and no concern of the user's."""
    users = get_states()
    stream = iter(_by_one(source, seed))
    own = get_states()
    set_states(users)
    while True:
        users = get_states()
        set_states(own)
        batch = list(islice(stream, 1))
        own = get_states()
        set_states(users)
        if not batch:
            return
        yield batch[0]


def _by_one(source: DataLoader[T_co], seed: int) -> DataLoader[T_co]:
    """The same loader with no more than one worker, which reads ahead as far as all of them would."""
    workers = min(source.num_workers, 1)
    return DataLoader(
        cast(Dataset[T_co], _Seeded(cast("IterableDataset[T_co]", source.dataset), seed)),
        batch_size=source.batch_size,
        drop_last=source.drop_last,
        **kept_settings(source, workers),
        prefetch_factor=(source.prefetch_factor or 2) * source.num_workers if workers else None,
    )


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
