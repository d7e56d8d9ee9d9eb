"""Which ranks are on one host, and what they do for each other: what crosses to another host crosses once.

Note: who waits for whom. What has come to a rank and others need is passed on, whatever else that rank waits for: every
wait of a carrier looks after its `Levels.errands`. So no two ranks wait for each other's errands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Stage(Protocol):
    """A transfer under way; see `group.Pending`."""

    def ready(self) -> bool: ...

    def wait(self) -> object: ...


class Errand(Protocol):
    """What a rank has to do for others as soon as something has come."""

    def go_on(self) -> None:
        """Do what can be done without waiting. It may be called from within itself."""
        ...


@dataclass(frozen=True, slots=True)
class Hosts:
    """The members of a group by host. `of`: those of each; `home`: the host of each."""

    of: tuple[tuple[int, ...], ...]
    home: tuple[int, ...]

    @classmethod
    def among(cls, hosts: Sequence[int]) -> Hosts:
        """From any numbers that are equal for members of one host."""
        numbers = {host: n for n, host in enumerate(dict.fromkeys(hosts))}
        home = tuple(numbers[host] for host in hosts)
        return cls(tuple(tuple(m for m, h in enumerate(home) if h == n) for n in numbers.values()), home)

    @property
    def two_levels(self) -> bool:
        """Are there several hosts, and several members on one of them?"""
        return 1 < len(self.of) < len(self.home)

    def speaker(self, host: int, owner: int, turn: int) -> int:
        """The member on `host` that speaks for all of it to `owner` on another one: all get a share of the talking.

        Args:
            turn: moves the work on where hosts have unequal numbers of members.
        """
        members = self.of[host]
        return members[(self.of[self.home[owner]].index(owner) + turn) % len(members)]

    def spoken_to(self, member: int, turn: int) -> list[int]:
        """The owners on other hosts to which a member speaks for its own."""
        home = self.home[member]
        away = [owner for owner, host in enumerate(self.home) if host != home]
        return [owner for owner in away if self.speaker(home, owner, turn) == member]

    def received(self, member: int) -> float:
        """What a member receives at most while sums travel, in whole gradients: above 1 on large hosts beside small."""
        home = self.home[member]
        mates = len(self.of[home])
        owners = 1 + sum(-(-len(members) // mates) for host, members in enumerate(self.of) if host != home)
        return ((mates - 1) * owners + len(self.of) - 1) / len(self.home)

    def __str__(self) -> str:
        return f"{' + '.join(str(len(members)) for members in self.of)} ranks on {len(self.of)} hosts"


class Levels:
    """What one rank knows of the ways to the others.

    Args:
        hosts: of every rank of the job, as numbers.
        one_round: bytes up to which one round takes less time than two; None: that is measured. See `crossover`.
    """

    def __init__(self, hosts: Sequence[int], one_round: int | None = None) -> None:
        self.hosts, self.one_round = tuple(hosts), one_round
        self.asked: int | None = None  # what the job's settings say of it
        self.crossover: dict[tuple[tuple[int, ...], int], bool] = {}  # what was measured, by a group's ranks and bytes
        self.errands: list[Errand] = []
        self.crossed = Counter[str]()
        """Bytes that this rank has sent to other hosts, by verb, its sums by a backend left out."""

    @classmethod
    def one(cls, size: int) -> Levels:
        """All on one host, or nobody knows: one level."""
        return cls([0] * size)

    @classmethod
    def of(cls, size: int, ranks_per_host: Sequence[int]) -> Levels:
        """So many ranks on each host, in their order; empty: all on one. No time passes between them."""
        assert sum(ranks_per_host) in (0, size), f"{ranks_per_host} are not {size} ranks"
        return cls([host for host, count in enumerate(ranks_per_host or [size]) for _ in range(count)], one_round=0)

    def together(self, ranks: Sequence[int]) -> bool:
        """Are they all on one host?"""
        return len({self.hosts[r] for r in ranks}) == 1

    def go_on(self) -> None:
        """Do for others what can be done."""
        for errand in tuple(self.errands):
            errand.go_on()


class Relay:
    """A gather over several hosts: pieces come from afar, and go on to this host's other members.

    Args:
        far: brings this rank's pieces. Its `wait` must not block once it is ready.
        near: brings what the other members have of their own.
        then: passes the pieces on, and brings theirs.
    """

    def __init__(self, levels: Levels, far: Stage, near: Stage, then: Callable[[], Stage]) -> None:
        self.levels, self.far, self.near, self.then = levels, far, near, then
        self.passed: Stage | None = None
        levels.errands.append(self)

    def go_on(self) -> None:
        if self in self.levels.errands and self.far.ready():
            self._pass_on()

    def _pass_on(self) -> None:
        self.levels.errands.remove(self)  # first: waiting looks after errands
        self.far.wait()
        self.passed = self.then()

    def ready(self) -> bool:
        self.go_on()
        return self.passed is not None and self.passed.ready() and self.near.ready()

    def wait(self) -> tuple[()]:
        if self.passed is None:
            self._pass_on()
        assert self.passed is not None
        self.near.wait()
        self.passed.wait()
        return ()

    def release(self) -> None:
        return
