"""Loaders: which samples make which leaf depends on seed, epoch, step and leaf, never on ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from shoal.data.usage import Tally, Usage, check_once, usage_of
from shoal.engine.turns import Turns
from shoal.errors import BatchError
from shoal.random import everything, get_states, mix, set_states

T_co = TypeVar("T_co", covariant=True)


class Feed(Protocol):
    """What a loader needs of the job."""

    @property
    def cell(self) -> int:
        """Whose leaves this rank computes."""
        ...

    @property
    def leaves(self) -> int: ...
    @property
    def seed(self) -> int: ...
    def new_turns(self, present: int) -> Turns:
        """The leaves of a step of which the first `present` have data."""
        ...

    def begin(self) -> object:
        """A loop over batches begins, perhaps inside another. Returns what `end` wants."""
        ...

    def hand_out(self, handed: Handed) -> None:
        """A batch is about to reach the user."""
        ...

    def end(self, loop: object) -> None:
        """A loop is over, or was left."""
        ...

    def compare(self, epoch: int, mark: bytes, data: bytes, error: Callable[[], Exception]) -> list[bytes]:
        """The data of all ranks that have leaves of their own. Raises `error()` if their marks differ. Collective."""
        ...


class Handed(NamedTuple):
    """Which leaf a batch is. `leaf` None: real data, so that user code runs, but nobody needs its gradient.

    `samples`: of a full batch; 0: not known.
    """

    leaf: int | None
    weight: float
    turn: int
    turns: Turns
    samples: int = 0


class LeafBatch(NamedTuple):
    """The samples of one leaf, and its weight relative to a full one."""

    indices: Sequence[int]
    weight: float


class Planned(Protocol):
    """The leaves of every step of an epoch. A list, or something that makes a step when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int, /) -> list[LeafBatch]: ...
    def __iter__(self) -> Iterator[list[LeafBatch]]: ...


Steps = Callable[[int, int], Planned]
"""`steps(epoch, leaves)`: the leaves of every step of an epoch."""


class Loader(Generic[T_co]):
    """Hands out this rank's leaves, step after step. Iterate it like a DataLoader, once per epoch.

    Args:
        feed: the job.
        source: dataset, workers, collation; its own batches are ignored.
        steps: which samples make which leaf.

    After `job.load` the next iteration goes on where the checkpoint was made; `epoch` is then the epoch to go on with.
    An iteration that was left early is over: the next one begins the next epoch. `len()` counts the batches of this
    rank, so it depends on the world size: do not derive numbers of steps from it, such as a schedule's.

    Attributes:
        once: raise `BatchError` where an epoch begins in which a sampler draws a sample twice. Default False.
    """

    once = False

    def __init__(self, feed: Feed, source: DataLoader[T_co], steps: Steps) -> None:
        self.feed, self.source, self.steps = feed, source, steps
        self.epoch, self.next_step = 0, 0
        self.begun = False
        self.made: Callable[[T_co], T_co] = lambda batch: batch  # what is handed out in a batch's place
        self.tally = Tally(self.epoch, 0)
        self.plan: Planned = []

    @property
    def dataset(self) -> Dataset[T_co]:
        return self.source.dataset

    @property
    def batch_size(self) -> int | None:
        """The DataLoader's own, as is `sampler`: for scripts that look at them. What they say changes no leaf."""
        return self.source.batch_size

    @property
    def sampler(self) -> object:
        return cast(object, self.source.sampler)

    def __len__(self) -> int:
        """Batches that this rank is handed in a whole epoch: fewer where more ranks share a step's leaves."""
        run: dict[int, int] = {}  # by how many leaves a step has
        total = 0
        for leaves in self.steps(self.epoch, self.feed.leaves):
            if len(leaves) not in run:
                run[len(leaves)] = self.feed.new_turns(len(leaves)).run_by(self.feed.cell)
            total += run[len(leaves)]
        return total

    def __iter__(self) -> Iterator[T_co]:
        if self.begun:
            self.go_to(self.epoch + 1, 0)
        self.begun = True
        self.plan = self.steps(self.epoch, self.feed.leaves)
        if self.once:
            check_once(self.epoch, ((s, n, b.indices) for s, step in enumerate(self.plan) for n, b in enumerate(step)))
        self.tally = Tally(self.epoch, self.next_step)
        ahead: deque[tuple[int, Handed, SeededBatch]] = deque()  # what loader workers already know of
        loop = self.feed.begin()
        try:
            for batch in remake(self.source, self._batches(ahead)):
                step, handed, indices = ahead.popleft()
                self.next_step = step + 1
                self.feed.hand_out(handed)
                self.tally.hand_out(indices, used=handed.leaf is not None and handed.weight > 0)
                yield self.made(batch)
            self.tally.complete = True
            self.go_to(self.epoch + 1, 0)
        finally:
            self.feed.end(loop)

    def _batches(self, ahead: deque[tuple[int, Handed, SeededBatch]]) -> Iterator[SeededBatch]:
        epoch = self.epoch
        for number in range(self.next_step, len(self.plan)):
            leaves = self.plan[number]
            turns = self.feed.new_turns(len(leaves))
            turns.learn({leaf: batch.weight for leaf, batch in enumerate(leaves)})
            full = next(round(len(b.indices) / b.weight) for b in leaves if b.indices)
            for turn in range(turns.run_by(self.feed.cell)):
                leaf = turns.leaf(self.feed.cell, turn)
                batch = leaves[leaf or 0]
                indices = batch.indices or next(b.indices for b in leaves if b.indices)  # a real one, of no weight
                handed = Handed(leaf, 0.0 if leaf is None else batch.weight, turn, turns, full)
                made = SeededBatch(indices, mix("data", self.feed.seed, epoch, number, str(leaf)))
                ahead.append((number, handed, made))
                yield made

    def report(self) -> Usage:
        """What the latest epoch has used: counted, and compared with what was planned. Collective, between steps.

        Raises:
            DivergedError: samplers of ranks draw different samples, or not all that was planned was used.
        """
        size = len(cast(Sized, self.dataset))
        return usage_of(self.tally, ([b.indices for b in step] for step in self.plan), size, self.feed.compare)

    def position(self) -> dict[str, int]:
        """Where the next step begins, for a checkpoint."""
        return {"epoch": self.epoch, "step": self.next_step}

    def go_to(self, epoch: int, step: int) -> None:
        self.epoch, self.next_step, self.begun = epoch, step, False


def steps_of_dataset(
    dataset: Dataset[object], seed: int, global_batch: int, *, shuffle: bool, drop_last: bool
) -> Steps:
    """Every step takes the next `global_batch` samples, cut into equal leaves; the last ones may be short or missing.

    Raises:
        BatchError: the leaves do not divide the global batch, or samples have no numbers.
    """
    if isinstance(dataset, IterableDataset):
        raise BatchError(
            "job.loader reads an IterableDataset, whose samples have no numbers to count out",
            remedy="pass a DataLoader of it to job.prepare; or a map-style dataset (with __len__ and __getitem__)",
        )
    total = len(cast(Sized, dataset))

    def steps(epoch: int, leaves: int) -> Planned:
        check_batch(global_batch, leaves)
        order = np.arange(total)
        if shuffle:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(mix("order", seed, epoch))).numpy()
        return ByRow(order[: total - total % global_batch if drop_last else total], global_batch, leaves)

    return steps


class ByRow:
    """Steps that are cut out of an order when they are asked for: 8 bytes a sample, however long the epoch."""

    def __init__(self, order: NDArray[np.int64], global_batch: int, leaves: int) -> None:
        self.order, self.global_batch, self.full = order, global_batch, global_batch // leaves

    def __len__(self) -> int:
        return -(-len(self.order) // self.global_batch)

    def __getitem__(self, step: int) -> list[LeafBatch]:
        start = step * self.global_batch
        batch = cast("list[int]", self.order[start : start + self.global_batch].tolist())
        cuts = [batch[i : i + self.full] for i in range(0, len(batch), self.full)]
        return [LeafBatch(c, len(c) / self.full) for c in cuts]

    def __iter__(self) -> Iterator[list[LeafBatch]]:
        return (self[step] for step in range(len(self)))


def check_batch(global_batch: int, leaves: int) -> None:
    """Raises `BatchError` unless `leaves` equal micro-batches make `global_batch`."""
    if global_batch < 1 or global_batch % leaves:
        low, high = max(global_batch // leaves, 1) * leaves, (global_batch // leaves + 1) * leaves
        raise BatchError(
            f"global_batch={global_batch} does not divide into leaves={leaves} equal micro-batches",
            cause=f"leaves={leaves} is the strategy's, or the world at first start",
            remedy=f"global_batch={low} or {high}, or leaves= a divisor of {global_batch}",
        )


def steps_of_loader(loader: DataLoader[object], seed: int, say: Callable[[str], None]) -> Steps:
    """A step takes as many of the loader's own batches as there are leaves.

    Raises:
        BatchError: a loader whose batches cannot be counted out, as batch_size=None.
    """
    sampler = cast("Iterable[Sequence[int]] | None", loader.batch_sampler)
    if sampler is None:
        raise BatchError("the loader has batch_size=None", remedy="give the DataLoader a batch_size")
    inner = cast(object, getattr(sampler, "sampler", None))
    full_size = cast("int | None", getattr(sampler, "batch_size", None))
    if isinstance(inner, DistributedSampler):
        data = cast(Sized, loader.dataset)
        inner = RandomSampler(data) if inner.shuffle else SequentialSampler(data)
        drop_last = bool(getattr(sampler, "drop_last", False))
        sampler = torch.utils.data.BatchSampler(inner, full_size or 1, drop_last)
        say("took the DistributedSampler out of the loader: batches are counted out by leaf")
    _check_undivided(sampler, inner)

    def steps(epoch: int, leaves: int) -> list[list[LeafBatch]]:
        states = get_states()
        everything(mix("order", seed, epoch))
        generator = getattr(inner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(mix("order", seed, epoch))
        set_epoch = cast("Callable[[int], None] | None", getattr(inner, "set_epoch", None))
        if set_epoch is not None:
            set_epoch(epoch)
        batches = [list(b) for b in sampler]
        set_states(states)
        full = loader.batch_size or full_size or max((len(b) for b in batches), default=1)
        return [[LeafBatch(b, len(b) / full) for b in batches[i : i + leaves]] for i in range(0, len(batches), leaves)]

    return steps


def _check_undivided(*samplers: object) -> None:
    """Samplers of other libraries that divide by rank would lose most of every rank's samples."""
    for sampler in samplers:
        parts = cast(object, getattr(sampler, "num_replicas", 1))
        if isinstance(parts, int) and parts > 1:
            raise BatchError(
                f"the loader's {type(sampler).__name__} divides the samples by num_replicas={parts}",
                cause="shoal counts out batches itself: together most samples would never be used",
                remedy="give the DataLoader the sampler that one process would have",
            )


class SeededBatch(list[int]):
    """The sample numbers of one batch, and the seed with which it is made."""

    def __init__(self, indices: Sequence[int], seed: int) -> None:
        super().__init__(indices)
        self.seed = seed


@dataclass(frozen=True, slots=True)
class SeededDataset:
    """Seeds the process that makes a batch, so that the number of loader workers changes nothing."""

    dataset: Dataset[object]

    def __getitems__(self, batch: SeededBatch) -> list[object]:
        everything(batch.seed)
        many = getattr(self.dataset, "__getitems__", None)
        return many(list(batch)) if many is not None else [self.dataset[i] for i in batch]

    def __getitem__(self, index: int) -> object:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))


def kept_settings(source: DataLoader[T_co], workers: int) -> dict[str, Any]:
    """What a loader that is made in place of another one keeps of it, whatever it reads."""
    return {
        "num_workers": workers, "collate_fn": source.collate_fn, "pin_memory": source.pin_memory,
        "timeout": source.timeout, "worker_init_fn": source.worker_init_fn,
        "multiprocessing_context": source.multiprocessing_context if workers else None,
    }  # fmt: skip


def remake(source: DataLoader[T_co], batches: Iterable[SeededBatch]) -> DataLoader[T_co]:
    """The same loader, with these batches. Its workers live for one epoch."""
    workers = source.num_workers
    return DataLoader(
        cast(Dataset[T_co], SeededDataset(cast(Dataset[object], source.dataset))),
        batch_sampler=cast("Iterable[list[int]]", batches),
        **kept_settings(source, workers),
        prefetch_factor=source.prefetch_factor if workers else None,
    )
