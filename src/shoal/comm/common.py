"""Memory that ranks of one host have in common, and how they tell each other that what is in it is current."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shoal.comm.arena import Fence, View
from shoal.comm.group import Pending, Strips

MARK = 64
"""Bytes of a word that one rank writes and others read: a line of the cache."""

Lacks = Callable[[], int | None]
"""The rank for which something waits; None: for nobody any more."""


class Seen:
    """Memory that ranks of this host have in common: a word for each that counts what it published, then the data."""

    def __init__(
        self, rank: int, until: Callable[[Lacks, str], None], label: str, view: View, offset: int,
        ranks: Sequence[int], about: tuple[int, torch.dtype], give_back: Callable[[], None],
    ) -> None:  # fmt: skip
        self.rank, self.until, self.label, self.words, self.fence = rank, until, label, view.words, Fence()
        self.marks = {rank: (offset + n * MARK) // 8 for n, rank in enumerate(ranks)}
        self.count, self.give_back = 0, give_back
        self.data = view.tensor(offset + len(ranks) * MARK, *about)

    def publish(self) -> None:
        self.count += 1
        self.fence()
        self.words[self.marks[self.rank]] = self.count

    def current(self) -> Pending:
        return Currency(self, self.count)

    def release(self) -> None:
        self.give_back()


class Currency:
    """Until all members have published `count` times."""

    def __init__(self, seen: Seen, count: int) -> None:
        self.seen, self.count = seen, count

    def lacks(self) -> int | None:
        """A member that has not yet."""
        words, count = self.seen.words, self.count
        return next((rank for rank, mark in self.seen.marks.items() if words[mark] < count), None)

    def ready(self) -> bool:
        return self.lacks() is None

    def wait(self) -> Sequence[Strips]:
        self.seen.until(self.lacks, self.seen.label)
        self.seen.fence()
        return ()

    def release(self) -> None:
        return
