"""Where ranks run: all on this host, or each on a host of its own, which is a network namespace with a shaped link."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from measure import stream

LOOPBACK = "127.0.0.1"
ROOT = str(Path(__file__).parents[1])


class Unavailable(Exception):
    """This network cannot be made here; says why."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where each rank belongs: what it does first, and its address. `goodput` is in bytes a second."""

    enter: Sequence[Callable[[], None]]
    addresses: Sequence[str]
    goodput: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """`ranks` on one host, or with `rate` (bit/s each way) or `delay` (seconds one way) each on its own."""

    name: str
    ranks: int
    rate: float | None = None
    delay: float = 0.0

    @contextmanager
    def opened(self) -> Iterator[Place]:
        """There while this is open.

        Raises:
            Unavailable: no root, no `ip`, no `tc`, ...
        """
        if ROOT not in sys.path:
            sys.path.append(ROOT)
        from tests import hosts  # of this repository

        why = hosts.available()
        if self.rate is None:
            # Where it can be, a host of their own: its loopback interface counts nobody else's bytes.
            with nullcontext(()) if why else hosts.hosts(1) as made:
                enter = [host.enter for host in made] or [lambda: None]
                yield Place(enter=enter * self.ranks, addresses=[LOOPBACK] * self.ranks, goodput=stream())
            return
        if why:
            raise Unavailable(why)
        with hosts.hosts(self.ranks, hosts.Link(rate=self.rate, delay=self.delay)) as made:
            yield Place(
                enter=[host.enter for host in made],
                addresses=[host.address for host in made],
                goodput=hosts.goodput(made[0], made[1]),
            )


def _apart(words: str, rate: float, delay: float = 0.0) -> list[Network]:
    return [Network(name=f"{words}-{ranks}", ranks=ranks, rate=rate, delay=delay) for ranks in (2, 3, 4)]


NETWORKS = (
    Network(name="loopback-2", ranks=2),
    Network(name="loopback-4", ranks=4),
    *_apart("10gbit", 10e9),
    *_apart("1gbit", 1e9),
    *_apart("200mbit", 200e6),
    *_apart("100mbit", 100e6),
    *_apart("200mbit-20ms", 200e6, 0.02),
    *_apart("100mbit-20ms", 100e6, 0.02),
)
