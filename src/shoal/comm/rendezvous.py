"""How the ranks of a job find each other: a store that one of them serves, then connections between all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from shoal.comm.lanes import NEVER, Lanes, Pairs
from shoal.comm.watch import Watch
from shoal.errors import EnvironmentFault

T = TypeVar("T")

_served: dict[int, Store] = {}  # by port, for this process's life: the ranks of a next job may have come already
MARGIN = 0.5  # seconds beyond `timeout` for what torch does not let us stop while ranks meet


class Address(NamedTuple):
    """Where the ranks of a job find each other.

    `attempt`: how often a launcher has restarted all of them. `device`: which in all the world this rank computes on;
    "" is the host. `interfaces`: the names of those to use; none: the one towards `host`.
    """

    rank: int
    size: int
    host: str
    port: int
    agent_store: bool  # a launcher holds the store already
    attempt: int = 0
    device: str = ""
    interfaces: tuple[str, ...] = ()


def bounded(work: Callable[[], T], seconds: float, address: Address) -> T:
    """Do it in a thread: what waits for the process of another rank inside torch cannot be stopped."""
    done: list[T] = []
    failed: list[Exception] = []

    def body() -> None:
        try:
            done.append(work())
        except Exception as e:
            failed.append(e)

    thread = threading.Thread(target=body, name="shoal-meet", daemon=True)
    thread.start()
    thread.join(seconds)
    if done:
        return done[0]
    if failed and isinstance(failed[0], EnvironmentFault):
        raise failed[0]
    raise _nobody(address, f"({str(failed[0]).splitlines()[0]})" if failed else "(one of them does not answer)")


def _nobody(address: Address, which: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"rank {address.rank} of {address.size} could not meet the others at {address.host}:{address.port} {which}",
        cause="a rank that did not start, another WORLD_SIZE, or an address that cannot be reached",
        remedy="start all ranks with `shoal run` or torchrun; check MASTER_ADDR and MASTER_PORT; or raise timeout=",
    )


def meet(address: Address, lanes: Lanes, timeout: float) -> tuple[Store, list[str], Pairs]:
    """Wait for all ranks, then connect. Returns a store for this job alone, and the ranks' devices."""
    deadline = time.monotonic() + timeout
    store = PrefixStore(f"shoal/{address.attempt}", _open_store(address, timeout, deadline))
    jobs = int(store.add(f"starts/{address.rank}", 1))  # several jobs may follow each other over one store
    own = PrefixStore(str(jobs), store)
    Watch.enter(own, address.rank)
    own.set(f"device/{address.rank}", address.device)
    own.set(f"lanes/{address.rank}", str(len(lanes.interfaces)))
    own.set(f"here/{address.rank}", str(address.size))
    for rank in range(address.size):
        while not own.check([f"here/{rank}"]):
            if time.monotonic() > deadline:
                absent = [str(r) for r in range(address.size) if not own.check([f"here/{r}"])]
                raise _nobody(address, f"within {timeout:g} s: rank {', '.join(absent)} did not come")
            time.sleep(0.01)
    devices = [own.get(f"device/{rank}").decode() for rank in range(address.size)]
    counts = [int(own.get(f"lanes/{rank}")) for rank in range(address.size)]
    if len(set(counts)) > 1:
        raise _unequal(counts)
    return own, devices, lanes.pairs(PrefixStore("gloo", own), address.rank, address.size)


def _unequal(counts: Sequence[int]) -> EnvironmentFault:
    other = next(rank for rank, count in enumerate(counts) if count != counts[0])
    return EnvironmentFault(
        f"rank 0 uses {counts[0]} network interfaces and rank {other} uses {counts[other]}",
        cause="interface= or GLOO_SOCKET_IFNAME differs between hosts",
        remedy="as many names on every host, in the order in which they are connected",
    )


def _open_store(address: Address, timeout: float, deadline: float) -> Store:
    serves = address.rank == 0 and not address.agent_store
    if not serves:
        _listened_at(address, timeout, deadline)
    patience = timedelta(seconds=max(timeout, 1.0))
    try:
        store = TCPStore(
            address.host, address.port, address.size, serves, patience, wait_for_workers=False, multi_tenant=True
        )
        store.set_timeout(NEVER)  # or it prints when rank 0 is stopped
        if serves:
            _served.setdefault(address.port, store)
        return store
    except RuntimeError as e:  # torch's DistError classes are RuntimeErrors
        if not (serves and "EADDRINUSE" in str(e)):
            raise
        if dist.is_available() and dist.is_initialized():  # by a store of the user's own
            return _open_store(address._replace(agent_store=True), timeout, deadline)
        raise EnvironmentFault(
            f"rank 0 cannot listen at {address.host}:{address.port}: another program does",
            remedy="another MASTER_PORT",
        ) from None


def _listened_at(address: Address, timeout: float, deadline: float) -> None:
    """Wait for rank 0's store. Torch's own waiting prints traces and overstays."""
    while True:
        try:
            socket.create_connection(address[2:4], timeout=max(0.01, deadline - time.monotonic())).close()
            return
        except OSError as e:
            if time.monotonic() > deadline:
                raise _nobody(address, f"within {timeout:g} s: {e}") from None
            time.sleep(0.05)
