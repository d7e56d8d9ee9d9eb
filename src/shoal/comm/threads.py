"""Ranks are threads of one process that pass a baton: one runs at a time.

For tests and debuggers, as MockTransport is for httpx. Generators change hands with the baton, so every rank has its
own random numbers; the order of ranks can be shuffled by a seed; a deadlock is seen at once.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import TypeVar

from torch import Tensor

from shoal.comm.group import Parcel, Pending, current
from shoal.errors import PeerError, PeerLost, StalledError
from shoal.random import get_states, set_states

T = TypeVar("T")
Key = tuple[int, int, str]


class Board:
    """Where ranks leave messages, and who has the baton."""

    def __init__(self, size: int, seed: int | None) -> None:
        self.size, self.order = size, random.Random(seed) if seed is not None else None
        self.changed = threading.Condition()
        self.mail: dict[Key, deque[Tensor]] = {}
        self.wants: dict[int, Key | None] = dict.fromkeys(range(size))  # of living ranks; None: can run
        self.where, self.doing = [""] * size, ["starts"] * size
        self.holder = 0
        self.gone: dict[int, str] = {}
        self.deadlock, self.lost = "", list[tuple[int, str]]()  # and who had left by then

    def pass_on(self, rank: int) -> None:
        """Give the baton to the next rank that can run; without one, it is a deadlock."""
        ready = [r for r in self.wants if self.wants[r] is None or self.mail.get(self.wants[r] or (0, 0, ""))]
        after = [r for r in ready if r > rank] + [r for r in ready if r <= rank]
        if after:
            self.holder = after[0] if self.order is None else self.order.choice(after)
        elif self.wants and not self.deadlock:
            self.lost = list(self.gone.items())
            marks = enumerate(zip(self.where, self.doing, strict=True))
            self.deadlock = "\n".join(f"    rank {r}: '{where}' ({doing})" for r, (where, doing) in marks)
        self.changed.notify_all()

    def receive(self, rank: int, key: Key) -> Tensor:
        with self.changed:
            if not self.mail.get(key):
                self.wants[rank] = key
                states = get_states()
                self.pass_on(rank)
                self.changed.wait_for(lambda: self.holder == rank or self.deadlock)
                set_states(states)
                self.wants[rank] = None
            if self.mail.get(key):
                return self.mail[key].popleft()
            if self.lost:
                lost, why = self.lost[0]
                raise PeerLost(f"rank {lost} left while rank {rank} waited in '{key[2]}'", cause=why)
            raise StalledError(
                f"all ranks wait for each other; rank {rank} in '{key[2]}'",
                cause="ranks do different things; their last marks:\n" + self.deadlock,
            )

    def start(self, rank: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.holder == rank or self.deadlock)

    def leave(self, rank: int, why: str) -> None:
        with self.changed:
            del self.wants[rank]
            self.gone[rank] = why
            self.pass_on(rank)


class Threads:
    """The carrier of one rank that is a thread."""

    def __init__(self, rank: int, board: Board) -> None:
        self.rank, self.size, self.board, self.sent = rank, board.size, board, Counter[str]()
        self.closed, self.failed = False, False

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Pending:
        self.board.where[self.rank] = label
        self.sent[label.split(" ")[0]] += sum(t.nbytes for _, t in sends)
        for peer, tensor in sends:
            key = (self.rank, peer, label)
            self.board.mail.setdefault(key, deque()).append(tensor.detach().clone())
        return Letters(self, label, receives)

    def note(self, mark: str) -> None:
        self.board.doing[self.rank] = mark

    def hold(self, reason: str) -> None:
        return

    def fail(self, why: str) -> None:
        self.failed = True

    def close(self) -> None:
        self.closed = True


class Letters:
    """What one transfer still has to receive."""

    def __init__(self, carrier: Threads, label: str, receives: Sequence[Parcel]) -> None:
        self.carrier, self.label, self.receives = carrier, label, receives

    def wait(self) -> None:
        for peer, box in self.receives:
            letter = self.carrier.board.receive(self.carrier.rank, (peer, self.carrier.rank, self.label))
            assert letter.shape == box.shape, f"{self.label}: {tuple(letter.shape)} came, {tuple(box.shape)} expected"
            assert letter.dtype == box.dtype, f"{self.label}: {letter.dtype} came, {box.dtype} expected"
            box.copy_(letter)
        self.receives = ()


def run(size: int, rank_main: Callable[[int], T], *, seed: int | None = None) -> list[T]:
    """Run `rank_main(rank)` in `size` threads, in each of which `shoal.init` finds its place.

    Args:
        size: number of ranks.
        rank_main: the program of one rank.
        seed: shuffle who runs next; None takes turns.

    Returns:
        What each rank returned.

    Raises:
        Exception: the first rank's own error; that a peer is lost or stuck counts only if nobody had another.
    """
    board, results, errors = Board(size, seed), dict[int, T](), dict[int, BaseException]()
    states = get_states()

    def body(rank: int) -> None:
        why = "it had returned"
        board.start(rank)
        try:
            current.set(Threads(rank, board))
            results[rank] = rank_main(rank)
        except BaseException as e:
            why = f"it raised {type(e).__name__}: {e}"
            errors[rank] = e
        finally:
            board.leave(rank, why)

    threads = [threading.Thread(target=copy_context().run, args=(body, r), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    set_states(states)
    if errors:
        raise next((e for e in errors.values() if not isinstance(e, PeerError)), errors[min(errors)])
    return [results[r] for r in range(size)]
