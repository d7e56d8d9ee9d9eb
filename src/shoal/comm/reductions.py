"""The backends' own collectives, whose sums have an order of their own: not for exact numerics."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from shoal.comm import compat
from shoal.comm.group import Pending, Strips
from shoal.comm.rounds import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, count
from shoal.comm.waiter import Lost

if TYPE_CHECKING:  # which makes them
    from shoal.comm.pairwise import Gloo


class Reductions:
    """What all ranks of a process group do at once. Every rank must start them in the same order.

    Args:
        lives: knows who has died and says why the job ends.
        group: a process group of one backend.
        ranks: world ranks, in the order of the group.
        streams: it works on streams of a device: who waits is the current stream, not this thread.
    """

    def __init__(self, lives: Gloo, group: compat.Backend, ranks: Sequence[int], *, streams: bool) -> None:
        self.lives, self.group, self.ranks, self.streams = lives, group, tuple(ranks), streams
        self.scatters = streams  # gloo's takes twice as long as its all-reduce

    def all_reduce(self, label: str, tensor: Tensor) -> Pending:
        """Sum `tensor` over all ranks, in place."""
        return self._started(label, ALL_REDUCE, tensor, compat.all_reduce(self.group, tensor), tensor, tensor)

    def reduce_scatter(self, label: str, whole: Tensor) -> Pending:
        """Sum `whole` over all ranks; this one gets its equal share of it."""
        part = whole.new_empty(whole.numel() // len(self.ranks))
        work = compat.reduce_scatter(self.group, part, whole)
        return self._started(label, REDUCE_SCATTER, whole, work, part, whole)

    def all_gather(self, label: str, part: Tensor) -> Pending:
        """Every rank's `part`, in the order of ranks."""
        whole = part.new_empty(part.numel() * len(self.ranks))
        return self._started(label, ALL_GATHER, whole, compat.all_gather(self.group, whole, part), whole, part)

    def _started(
        self, label: str, rounds: int, whole: Tensor, work: dist.Work, result: Tensor, given: Tensor
    ) -> Pending:  # fmt: skip
        self.lives.watch.at(label)
        count(self.lives.sent, label, rounds, len(self.ranks), whole)
        return Reduced(self, label, work, (result, given))


class Reduced:
    """A collective under way."""

    def __init__(self, of: Reductions, label: str, work: dist.Work, held: tuple[Tensor, Tensor]) -> None:
        self.of, self.label, self.work, self.held = of, label, work, held
        self.outcome: SimpleQueue[Lost | None] | None = None
        self.over = False

    def ready(self) -> bool:
        return self.over or (self.work.is_completed() if self.of.streams else not self._waited_for().empty())

    def wait(self) -> Sequence[Strips]:
        if not self.over:
            lost = self._on_device() if self.of.streams else self._on_host()
            if lost is not None:
                raise self.of.lives.broken(self.label, self._gone(), lost)
            self.over = True
        return [[self.held[0]]]

    def _waited_for(self) -> SimpleQueue[Lost | None]:
        if self.outcome is None:
            self.outcome = self.of.lives.waiter.wait_for([(self.of.lives.rank, self.work)])
        return self.outcome

    def _on_device(self) -> Exception | None:
        """Let the current stream wait."""
        try:
            self.work.wait()
        except RuntimeError as e:
            return e
        return None

    def _on_host(self) -> Exception | None:
        lost = self.of.lives.heard(self.label, self._waited_for())
        return lost and lost[1]

    def _gone(self) -> int:
        """Some rank whose connection has failed. With several of them the first verdict on the job says who."""
        lives = self.of.lives
        others = [rank for rank in self.of.ranks if rank != lives.rank]
        return next((rank for rank in others if lives.severed(rank)), others[0])

    def release(self) -> None:
        return
