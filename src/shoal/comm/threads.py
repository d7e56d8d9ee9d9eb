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

import torch
from torch import Tensor

from shoal.comm.group import FAR, Box, Common, Kept, Like, MakeSums, Parcel, Pending, Strips, Sums, current
from shoal.comm.levels import Levels
from shoal.comm.rounds import ALL_REDUCE, REDUCE_SCATTER, count
from shoal.errors import PeerError, PeerLost, StalledError
from shoal.random import get_states, set_states

T = TypeVar("T")
Key = tuple[int, int, str]


class Board:
    """Where ranks leave messages, and who has the baton."""

    def __init__(
        self, size: int, seed: int | None, *, common: bool, scatters: bool, ranks_per_host: Sequence[int]
    ) -> None:  # fmt: skip
        self.common, self.scatters, self.ranks_per_host = common, scatters, ranks_per_host
        self.size, self.order = size, random.Random(seed) if seed is not None else None
        self.changed = threading.Condition()
        self.mail: dict[Key, deque[Strips]] = {}
        self.came = Counter[int]()  # letters so far, by receiver
        self.commons = 0
        self.wants: dict[int, Callable[[], bool] | None] = dict.fromkeys(range(size))  # of living ranks; None: can run
        self.where, self.doing = [""] * size, ["starts"] * size
        self.holder = 0
        self.gone: dict[int, str] = {}
        self.deadlock, self.lost = "", list[tuple[int, str]]()  # and who had left by then

    def pass_on(self, rank: int) -> None:
        """Give the baton to the next rank that can run; without one, it is a deadlock."""
        ready = [r for r, can_run in self.wants.items() if can_run is None or can_run()]
        after = [r for r in ready if r > rank] + [r for r in ready if r <= rank]
        if after:
            self.holder = after[0] if self.order is None else self.order.choice(after)
        elif self.wants and not self.deadlock:
            self.lost = list(self.gone.items())
            marks = enumerate(zip(self.where, self.doing, strict=True))
            self.deadlock = "\n".join(f"    rank {r}: '{where}' ({doing})" for r, (where, doing) in marks)
        self.changed.notify_all()

    def receive(self, rank: int, key: Key, levels: Levels) -> Strips:
        with self.changed:
            seen = self.came[rank]
            levels.go_on()
            while not self.mail.get(key) and not self.deadlock:
                self.wants[rank] = lambda seen=seen: bool(
                    self.mail.get(key) or (levels.errands and self.came[rank] > seen)
                )
                states = get_states()
                self.pass_on(rank)
                self.changed.wait_for(lambda: self.holder == rank or self.deadlock)
                set_states(states)
                self.wants[rank], seen = None, self.came[rank]
                levels.go_on()
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

    ordered, plenty = False, FAR

    def __init__(self, rank: int, board: Board) -> None:
        self.rank, self.size, self.board, self.sent = rank, board.size, board, Counter[str]()
        self.closed, self.failed = False, False
        self.levels = Levels.of(board.size, board.ranks_per_host)

    def receive(self, peer: int, label: str) -> Strips:
        return self.board.receive(self.rank, (peer, self.rank, label), self.levels)

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        self.board.where[self.rank] = label
        self.sent[label.split(" ")[0]] += sum(t.nbytes for _, strips in sends for t in strips)
        for peer, strips in sends:
            self.mail((peer, label), [t.detach().clone() for t in strips if t.numel()])
        return Letters(self, label, receives)

    def mail(self, to: tuple[int, str], strips: Strips) -> None:
        self.board.mail.setdefault((self.rank, *to), deque()).append(strips)
        self.board.came[to[0]] += 1

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        return None

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def idle(self, tensor: Tensor) -> bool:
        return True

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        if not (self.board.common and self.levels.together(ranks)):
            return None
        if self.rank == ranks[0]:
            self.board.commons += 1
            letter = [torch.zeros(numel, dtype=dtype, device=device), torch.tensor(self.board.commons)]
            for peer in ranks[1:]:
                self.mail((peer, label), letter)
        else:
            letter = self.receive(ranks[0], label)
        number = int(letter[1])  # a later job's labels are the same
        return Seen(self, f"common {number}", [r for r in ranks if r != self.rank], letter[0])

    def sums(self, device: torch.device) -> MakeSums | None:
        return None if self.board.common else self._sums

    def _sums(self, name: str, ranks: Sequence[int]) -> Sums:
        return Added(self, name, ranks)

    def note(self, mark: str) -> None:
        self.board.doing[self.rank] = mark

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


class Letters:
    """What one transfer still has to receive."""

    def __init__(self, carrier: Threads, label: str, receives: Sequence[Box]) -> None:
        self.carrier, self.label, self.receives = carrier, label, receives
        self.received: list[Strips] = []

    def ready(self) -> bool:
        mail, me = self.carrier.board.mail, self.carrier.rank
        wanted = Counter(peer for peer, _ in self.receives)
        return all(len(mail.get((peer, me, self.label), ())) >= count for peer, count in wanted.items())

    def wait(self) -> Sequence[Strips]:
        for peer, box in self.receives:
            letter = self.carrier.receive(peer, self.label)
            self._open(box, letter)
        self.receives = ()
        return self.received

    def _open(self, box: Strips | Like, letter: Strips) -> None:
        there = [(t.numel(), t.dtype) for t in letter]
        if isinstance(box, Like):
            here = [(n, box.dtype) for n in box.sizes if n]
        else:
            here = [(t.numel(), t.dtype) for t in box if t.numel()]
        assert there == here, f"{self.label}: {there} came, {here} expected"
        if isinstance(box, Like):
            waiting = iter(letter)
            nothing = torch.empty(0, dtype=box.dtype, device=box.device)
            self.received.append([next(waiting).view(-1) if n else nothing for n in box.sizes])
            return
        for mine, theirs in zip((t for t in box if t.numel()), letter, strict=True):
            mine.copy_(theirs.view(mine.shape))
        self.received.append(box)

    def release(self) -> None:
        return


class Added:
    """Stands for a backend that adds up: in the order of ranks, which is no tree's."""

    def __init__(self, carrier: Threads, name: str, ranks: Sequence[int]) -> None:
        self.carrier, self.name, self.ranks, self.calls = carrier, name, ranks, 0
        self.scatters = carrier.board.scatters

    def all_reduce(self, label: str, tensor: Tensor) -> Pending:
        count(self.carrier.sent, label, ALL_REDUCE, len(self.ranks), tensor)
        return Adding(self, self._send(label, tensor), tensor, tensor, slice(None))

    def reduce_scatter(self, label: str, whole: Tensor) -> Pending:
        count(self.carrier.sent, label, REDUCE_SCATTER, len(self.ranks), whole)
        share = whole.numel() // len(self.ranks)
        at = self.ranks.index(self.carrier.rank) * share
        return Adding(self, self._send(label, whole), whole.new_empty(share), whole, slice(at, at + share))

    def _send(self, label: str, tensor: Tensor) -> str:
        self.carrier.board.where[self.carrier.rank] = label
        self.calls += 1
        place = f"sum {self.name} {self.calls}"  # a backend knows calls by their order alone
        for peer in self.ranks:
            if peer != self.carrier.rank:
                self.carrier.mail((peer, place), [tensor.detach().clone()])
        return place


class Adding:
    """A sum over ranks that waits for theirs."""

    def __init__(self, of: Added, place: str, result: Tensor, mine: Tensor, part: slice) -> None:
        self.of, self.place, self.result, self.mine, self.part = of, place, result, mine.clone(), part
        self.over = False

    def ready(self) -> bool:
        carrier = self.of.carrier
        mail, me = carrier.board.mail, carrier.rank
        return self.over or all(mail.get((r, me, self.place)) for r in self.of.ranks if r != me)

    def wait(self) -> Sequence[Strips]:
        if not self.over:
            carrier = self.of.carrier
            me = carrier.rank
            all_of = [self.mine if r == me else carrier.receive(r, self.place)[0] for r in self.of.ranks]
            assert all(t.shape == self.mine.shape for t in all_of), self.place
            self.result.copy_(all_of[0][self.part])
            for t in all_of[1:]:
                self.result.add_(t[self.part])
            self.over = True
        return [[self.result]]

    def release(self) -> None:
        return


class Seen:
    """Memory that some ranks have in common. That a part is current travels as an empty letter."""

    def __init__(self, carrier: Threads, label: str, peers: Sequence[int], data: Tensor) -> None:
        self.carrier, self.label, self.data = carrier, label, data
        self.published, self.heard = 0, dict.fromkeys(peers, 0)

    def publish(self) -> None:
        self.published += 1
        for peer in self.heard:
            self.carrier.mail((peer, self.label), ())

    def current(self) -> Pending:
        return Currency(self)

    def release(self) -> None:
        self.data = torch.empty(0, dtype=self.data.dtype)


class Currency:
    """Until all have published as often as this rank."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.count = seen, seen.published

    def ready(self) -> bool:
        seen = self.seen
        mail, me = seen.carrier.board.mail, seen.carrier.rank
        return all(n + len(mail.get((r, me, seen.label), ())) >= self.count for r, n in seen.heard.items())

    def wait(self) -> Sequence[Strips]:
        seen = self.seen
        for peer in seen.heard:
            while seen.heard[peer] < self.count:
                seen.carrier.receive(peer, seen.label)
                seen.heard[peer] += 1
        return ()

    def release(self) -> None:
        return


def run(
    size: int, rank_main: Callable[[int], T], *, seed: int | None = None, common: bool = False, scatters: bool = False,
    ranks_per_host: Sequence[int] = (),
) -> list[T]:  # fmt: skip
    """Run `rank_main(rank)` in `size` threads, in each of which `shoal.init` finds its place.

    Args:
        size: number of ranks.
        rank_main: the program of one rank.
        seed: shuffle who runs next; None takes turns.
        common: have ranks of one host memory in common, as processes can?
        scatters: fast numerics play a backend whose reduce-scatter is fast (NCCL), not one that all-reduces (gloo).
        ranks_per_host: hosts to play, and how many ranks are on each; empty: all on one.

    Returns:
        What each rank returned.

    Raises:
        Exception: the first rank's own error; that a peer is lost or stuck counts only if nobody had another.
    """
    board = Board(size, seed, common=common, scatters=scatters, ranks_per_host=ranks_per_host)
    results, errors = dict[int, T](), dict[int, BaseException]()
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
