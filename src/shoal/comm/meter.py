"""A carrier that moves nothing and counts. Give it meta tensors and any engine becomes its own planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import copy_context

from shoal.comm.group import Done, Parcel, Pending, current
from shoal.random import get_states, set_states


class Meter:
    """Stands for `size` ranks that all do what this one does.

    Args:
        rank, size: whose bytes are counted, and among how many.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.sent = rank, size, Counter[str]()
        self.closed, self.failed = False, False

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        self.sent[label.split(" ")[0]] += sum(t.nbytes for _, t in sends)
        echo = dict(sends)
        for peer, box in receives:
            mine = echo.get(peer)
            if not box.is_meta and mine is not None and mine.nbytes == box.nbytes:
                box.copy_(mine)  # so that everybody seems to agree with us
        return Done()

    def note(self, mark: str) -> None:
        return

    def hold(self, reason: str) -> None:
        return

    def fail(self, why: str) -> None:
        self.failed = True

    def close(self) -> None:
        self.closed = True


def dry_run(rank: int, size: int, rank_main: Callable[[int], object]) -> dict[str, int]:
    """Count what a program would send, by verb, without a network or values.

    Args:
        rank, size: whose bytes, and among how many ranks.
        rank_main: the program of one rank, as for `threads.run`. In it `job.device` is "meta": models and batches that
            are moved there have shapes and no values.
    """
    meter = Meter(rank, size)
    context = copy_context()
    context.run(current.set, meter)
    states = get_states()
    context.run(rank_main, rank)
    set_states(states)
    return dict(meter.sent)


class Alone(Meter):
    """A world of one."""

    def __init__(self) -> None:
        super().__init__(0, 1)
