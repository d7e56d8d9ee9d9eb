"""Which leaf a sample belongs to: cut out of one order (rows), or by the file or the key that it shares with others."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from shoal.data.loader import LeafBatch, Planned, Steps, check_batch, steps_of_dataset
from shoal.errors import BatchError, nearest
from shoal.random import mix

PARTITIONS = ("row", "file", "key")
Key = Callable[[int], Hashable] | Sequence[Hashable]
"""What samples have in common: a function of a sample's number, or one value for every sample."""


def steps_of(
    dataset: Dataset[object], seed: int, global_batch: int, leaves: int, *,
    shuffle: bool, drop_last: bool, partition: str, key: Key | None,
) -> Steps:  # fmt: skip
    """See `Job.loader`.

    Raises:
        BatchError: leaves, global batch, partition and data set do not fit together.
    """
    check_batch(global_batch, leaves)
    if partition not in PARTITIONS:
        raise BatchError(f"partition={partition!r} is not known", remedy=nearest(partition, PARTITIONS))
    if (partition == "key") != (key is not None):
        here = 'partition="key" without key=' if key is None else f"key= with partition={partition!r}"
        raise BatchError(here, remedy='partition="key", key=lambda n: users[n]; or a list, one value for every sample')
    rows = steps_of_dataset(dataset, seed, global_batch, shuffle=shuffle, drop_last=drop_last)
    if partition == "row":
        return rows
    parts = _files(dataset) if partition == "file" else _keys(len(cast(Sized, dataset)), cast(Key, key))
    _deal(parts, leaves, partition)

    def steps(epoch: int, leaves: int) -> Planned:
        check_batch(global_batch, leaves)
        orders: list[NDArray[np.int64]] = []
        for leaf, mine in enumerate(_deal(parts, leaves, partition)):
            draw = torch.Generator().manual_seed(mix("order", seed, epoch, leaf)) if shuffle else None
            orders.append(_order(mine, draw, together=partition == "file"))
        return ByLeaf(orders, global_batch // leaves, drop_last=drop_last)

    return steps


class ByLeaf:
    """Every leaf has an order of its own; where that has ended the leaf is empty, and weighs nothing."""

    def __init__(self, orders: Sequence[NDArray[np.int64]], full: int, *, drop_last: bool) -> None:
        self.orders, self.full = orders, full
        sizes = [len(order) for order in orders]
        self.count = min(sizes) // full if drop_last else -(-max(sizes) // full)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> list[LeafBatch]:
        span = slice(step * self.full, (step + 1) * self.full)
        batches = [cast("list[int]", order[span].tolist()) for order in self.orders]
        return [LeafBatch(batch, len(batch) / self.full) for batch in batches]

    def __iter__(self) -> Iterator[list[LeafBatch]]:
        return (self[step] for step in range(len(self)))


def _files(dataset: Dataset[object]) -> list[NDArray[np.int64]]:
    """The samples of every file that is not empty."""
    ends = cast("Sequence[int] | None", getattr(dataset, "cumulative_sizes", None))
    if ends is None:
        raise BatchError(
            f'partition="file" of a {type(dataset).__name__}, which does not say where its files end',
            remedy="shoal.data.FileShards, torch's ConcatDataset of one set for every file, or an attribute "
            "cumulative_sizes: up to each file, how many samples there are",
        )
    return [np.arange(first, last) for first, last in zip([0, *ends], ends, strict=False) if last > first]


def _keys(total: int, key: Key) -> list[NDArray[np.int64]]:
    """The samples of every key, in the order in which keys are met first."""
    if not callable(key) and len(key) != total:
        raise BatchError(f"key= has {len(key)} values for {total} samples", remedy="one value for every sample")
    plain = cast("Sequence[Hashable]", key.tolist()) if isinstance(key, np.ndarray | torch.Tensor) else key
    numbers: dict[Hashable, int] = {}
    codes = np.empty(total, dtype=np.int64)
    for n in range(total):
        value = plain(n) if callable(plain) else plain[n]
        codes[n] = numbers.setdefault(value, len(numbers))
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes, minlength=len(numbers)))[:-1]) if total else []


def _deal(parts: Sequence[NDArray[np.int64]], leaves: int, partition: str) -> list[list[NDArray[np.int64]]]:
    """The parts of every leaf: the largest first, each to the leaf that has the fewest samples so far.

    Raises:
        BatchError: there are fewer parts than leaves.
    """
    if len(parts) < leaves:
        raise BatchError(
            f'partition="{partition}": {len(parts)} {partition}s for leaves={leaves}',
            cause="a leaf without any would never have data",
            remedy=f"shoal.init(leaves={max(len(parts), 1)}) or fewer, or more {partition}s",
        )
    heap = [(0, leaf) for leaf in range(leaves)]
    found: list[list[int]] = [[] for _ in range(leaves)]
    for part in sorted(range(len(parts)), key=lambda n: -len(parts[n])):
        size, leaf = heapq.heappop(heap)
        found[leaf].append(part)
        heapq.heappush(heap, (size + len(parts[part]), leaf))
    return [[parts[n] for n in sorted(mine)] for mine in found]


def _order(parts: Sequence[NDArray[np.int64]], draw: torch.Generator | None, *, together: bool) -> NDArray[np.int64]:
    """The samples of one leaf in an order. `together`: those of a part follow each other, so that it is read once."""
    if draw is None:
        return np.concatenate(parts) if together else np.sort(np.concatenate(parts))
    if not together:
        return _shuffled(np.concatenate(parts), draw)
    order = cast("list[int]", torch.randperm(len(parts), generator=draw).tolist())
    return np.concatenate([_shuffled(parts[n], draw) for n in order])


def _shuffled(numbers: NDArray[np.int64], draw: torch.Generator) -> NDArray[np.int64]:
    return numbers[torch.randperm(len(numbers), generator=draw).numpy()]
