"""A carrier that moves nothing and counts. Give it meta tensors and any engine becomes its own planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import copy_context

import torch
from torch import Tensor

from shoal.comm.group import (
    FAR,
    NEAR,
    Box,
    Common,
    Done,
    Kept,
    Like,
    MakeSums,
    Parcel,
    Pending,
    Sums,
    current,
    new_strips,
)
from shoal.comm.levels import Levels
from shoal.comm.rounds import ALL_REDUCE, REDUCE_SCATTER, count
from shoal.random import get_states, set_states


class Meter:
    """Stands for `size` ranks that all do what this one does.

    Args:
        rank, size: whose bytes are counted, and among how many.
        shared: do ranks of one host share its memory?
        ranks_per_host: how many are on each host, in their order; empty: all on one.
    """

    ordered = False

    def __init__(self, rank: int, size: int, *, shared: bool = False, ranks_per_host: Sequence[int] = ()) -> None:
        self.shared, self.levels = shared, Levels.of(size, ranks_per_host)
        self.plenty = NEAR if shared and len(set(self.levels.hosts)) == 1 else FAR
        self.rank, self.size, self.sent = rank, size, Counter[str]()
        self.transfers = Counter[str]()  # how many were begun, by verb
        self.closed, self.failed = False, False

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        verb = label.split(" ")[0]
        self.transfers[verb] += 1
        self.sent[verb] += sum(t.nbytes for _, strips in sends for t in strips)
        echo = dict(sends)
        boxes = [(peer, new_strips(box) if isinstance(box, Like) else box) for peer, box in receives]
        for peer, strips in boxes:
            for box, mine in zip(strips, echo.get(peer, ()), strict=False):
                if not box.is_meta and mine.nbytes == box.nbytes:
                    box.copy_(mine)  # so that everybody seems to agree with us
        return Done([strips for _, strips in boxes])

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        return None

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def idle(self, tensor: Tensor) -> bool:
        return True

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        return Imagined(numel, dtype, device) if self.shared and self.levels.together(ranks) else None

    def sums(self, device: torch.device) -> MakeSums | None:
        return None if self.shared else self._sums

    def _sums(self, _name: str, ranks: Sequence[int]) -> Sums:
        return Counted(self.sent, len(ranks))

    def note(self, mark: str) -> None:
        return

    def hold(self, reason: str) -> None:
        return

    def rest(self) -> None:
        return

    def kept(self) -> Kept:
        return Kept(stages=False)

    def fail(self, why: str) -> None:
        self.failed = True

    def close(self) -> None:
        self.closed = True


class Imagined:
    """Memory that all ranks see, if there were any others."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(numel, dtype=dtype, device=device)

    def publish(self) -> None:
        return

    def current(self) -> Pending:
        return Done()

    def release(self) -> None:
        return


class Counted:
    """What a backend that all-reduces would send."""

    scatters = False

    def __init__(self, sent: Counter[str], size: int) -> None:
        self.sent, self.size = sent, size

    def all_reduce(self, label: str, tensor: Tensor) -> Pending:
        count(self.sent, label, ALL_REDUCE, self.size, tensor)
        return Done([[tensor]])

    def reduce_scatter(self, label: str, whole: Tensor) -> Pending:
        count(self.sent, label, REDUCE_SCATTER, self.size, whole)
        return Done([[whole[: whole.numel() // self.size]]])


def dry_run(
    rank: int, size: int, rank_main: Callable[[int], object], *, shared: bool = False,
    ranks_per_host: Sequence[int] = (), crossing: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Count what a program would send, by verb, without a network or values.

    Args:
        rank, size: whose bytes, and among how many ranks.
        rank_main: the program of one rank, as for `threads.run`. In it `job.device` is "meta": models and batches that
            are moved there have shapes and no values.
        shared, ranks_per_host: see `Meter`.
        crossing: count only what goes to other hosts.
    """
    meter = Meter(rank, size, shared=shared, ranks_per_host=ranks_per_host)
    context = copy_context()
    context.run(current.set, meter)
    states = get_states()
    context.run(rank_main, rank)
    set_states(states)
    return dict(meter.levels.crossed if crossing else meter.sent)


class Alone(Meter):
    """A world of one."""

    def __init__(self) -> None:
        super().__init__(0, 1)
