"""The backends' own collectives, whose sums have an order of their own: not for exact numerics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

import torch.distributed as dist
from torch import Tensor

from shoal.comm import compat
from shoal.comm.group import Pending, Strips
from shoal.comm.pairwise import Gloo
from shoal.comm.waiter import Lost
from shoal.comm.watch import TICK


class Reductions:
    """What all ranks of a process group do at once. Every rank must start them in the same order.

    Args:
        lives: knows who has died and says why the job ends.
        group: a process group of one backend, over the same ranks as `lives`.
        streams: it works on streams of a device: who waits is the current stream, not this thread.
    """

    def __init__(self, lives: Gloo, group: compat.Backend, *, streams: bool) -> None:
        self.lives, self.group, self.streams = lives, group, streams

    def all_reduce(self, label: str, tensor: Tensor) -> Pending:
        """Sum `tensor` over all ranks, in place."""
        return self._started(label, compat.all_reduce(self.group, tensor), tensor, tensor)

    def reduce_scatter(self, label: str, whole: Tensor) -> Pending:
        """Sum `whole` over all ranks; this one gets its equal share of it."""
        part = whole.new_empty(whole.numel() // self.lives.size)
        return self._started(label, compat.reduce_scatter(self.group, part, whole), part, whole)

    def all_gather(self, label: str, part: Tensor) -> Pending:
        """Every rank's `part`, in the order of ranks."""
        whole = part.new_empty(part.numel() * self.lives.size)
        return self._started(label, compat.all_gather(self.group, whole, part), whole, part)

    def _started(self, label: str, work: dist.Work, result: Tensor, sent: Tensor) -> Pending:
        self.lives.watch.at(label)
        self.lives.sent[label.split(" ")[0]] += sent.nbytes
        return Reduced(self, label, work, (result, sent))


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
        outcome, watch = self._waited_for(), self.of.lives.watch
        with watch.waiting(self.label):
            while True:
                with suppress(Empty):
                    lost = outcome.get(timeout=TICK)
                    return lost and lost[1]
                if watch.judge() is not None:
                    raise self.of.lives.ended(self.label)

    def _gone(self) -> int:
        """Some rank whose connection has failed. With several of them the first verdict on the job says who."""
        lives = self.of.lives
        others = [rank for rank in range(lives.size) if rank != lives.rank]
        return next((rank for rank in others if lives.severed(rank)), others[0])

    def release(self) -> None:
        return
