"""How a job finds its settings, its strategy and its place."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from shoal.bench.clock import clocked
from shoal.comm.group import Carrier, current
from shoal.comm.host import join_host
from shoal.comm.lanes import asked_interfaces
from shoal.comm.meter import Alone
from shoal.comm.mpi import Mpi
from shoal.comm.nccl import over_devices, own_device, uuid_of
from shoal.comm.pairwise import Gloo
from shoal.comm.rendezvous import Address
from shoal.launch.place import find_place
from shoal.logs import warn
from shoal.settings import Resolved, resolve
from shoal.strategy import Cut, Strategy


@dataclass(frozen=True, slots=True)
class Seat:
    """How many ranks share this host, and whether this rank is a process of its own (or a thread)."""

    local_world: int
    own_process: bool


def settle_settings(strategy: str | Strategy | None, given: Mapping[str, object]) -> Resolved:
    """Flags over environment over shoal.toml over code."""
    code = {k: v for k, v in given.items() if v is not None}
    if isinstance(strategy, Strategy):
        own = {
            "strategy": strategy.name, "leaves": strategy.leaves, "ranks_per_copy": strategy.ranks_per_copy,
            "precision": strategy.precision if strategy.precision != "float32" else None,
            "reduce": strategy.reduce if strategy.reduce != "float32" else None,
            "twig": strategy.twig if strategy.twig != 1 else None,
            "masters": False if not strategy.masters else None,
            "numerics": strategy.numerics if strategy.numerics != "exact" else None,
            "cut": strategy.cut.value if strategy.cut is not Cut.EVEN else None,
        }  # fmt: skip
        code = {k: v for k, v in own.items() if v is not None} | code
    elif strategy is not None:
        Strategy.named(strategy)
        code["strategy"] = strategy
    if current.get() is not None:  # a rank that is a thread, or a dry run: only the code speaks
        return resolve(code, environ={}, cwd=None)
    return resolve(code, environ=os.environ, cwd=Path.cwd())


def strategy_of(resolved: Resolved, given: str | Strategy | None) -> Strategy:
    """The strategy that the settings say; what no setting can say comes from `given`."""
    s = resolved.settings
    base = Strategy.named(s.strategy)
    ranks = s.ranks_per_copy
    if resolved.origins["strategy"] != "code" and resolved.origins["ranks_per_copy"] == "code":
        ranks = None  # the code's grid belonged to the code's strategy
    return replace(
        base,
        ranks_per_copy=base.ranks_per_copy if ranks is None else ranks,
        leaves=s.leaves,
        twig=s.twig,
        masters=s.masters,
        precision=s.precision,
        cut=Cut(s.cut),
        numerics=s.numerics,
        tensor=given.tensor if isinstance(given, Strategy) else base.tensor,
        reduce=s.reduce,
    )


def find_carrier(
    timeout: float, name: str = "auto", device: str | None = None, interface: str | None = None,
    environ: Mapping[str, str] = os.environ, one_round: int | None = None,
) -> tuple[Carrier, Seat]:  # fmt: skip
    """This rank's place and what connects it to the others.

    Args:
        timeout: seconds for the others to come, and of waits.
        name: of the carrier. "gloo": TCP alone; "shared": memory within hosts, TCP between them; "auto": that where it
            can be had, and NCCL for accelerators.
        device: where this rank's model will be; None: the host.
        interface: names of the network interfaces to use together; None: the one that leads to the others.
        environ: where the place is looked for.
        one_round: bytes that travel in one round; None: as many as that is faster for.
    """
    given = current.get()
    if given is not None:
        hosts, given.levels.asked = given.levels.hosts, one_round
        return given, Seat(hosts.count(hosts[given.rank]), own_process=False)
    place = find_place(environ)
    if place is None:
        return Alone(), Seat(1, own_process=True)
    seat = Seat(place.local_world, own_process=True)
    if place.world == 1:
        return Alone(), seat
    here = own_device(device, place.local_rank)
    address = Address(
        place.rank, place.world, place.host, place.port, place.agent_store, place.attempt, uuid_of(here),
        asked_interfaces(interface),
    )  # fmt: skip
    if name == "mpi":
        host: Carrier = Mpi(address, timeout=timeout, report=warn)
        lives = host.lives
    else:
        lives = Gloo(address, timeout=timeout, report=warn)
        host = lives if name == "gloo" else join_host(lives, wanted=name == "shared")
    host.levels.asked = one_round
    return clocked(over_devices(host, lives, here, name, address, timeout), environ), seat


def tell_of_failure(carrier: Carrier) -> Callable[[], None]:
    """Let the other ranks know why this one dies of an exception. Returns what puts the old hook back."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        carrier.fail(f"{kind.__name__}: {error}")

    sys.excepthook = hook

    def restore() -> None:
        if sys.excepthook is hook:
            sys.excepthook = before

    return restore
