"""Several connections between the same two ranks: small messages pass by large ones; several interfaces work together.

Note: how gloo picks one. A process group has one connection between two ranks for each of its devices, and takes the
one whose number is the tag's remainder. So the tag says where a message goes.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from shoal.errors import EnvironmentFault

NEVER = timedelta(days=10)  # the watch ends waits, not gloo: its time-out knows nothing of other ranks
SMALL = 4096
"""Bytes of a message that has the first connection, so that no vote waits behind gradients."""
STRIPE = 2**16
"""Bytes of a message from which on it is spread over all interfaces."""


class Pairs(Protocol):
    """What we use of a process group."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work: ...
    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work: ...


def tag_of(label: str, index: int, tensor: Tensor) -> int:
    return zlib.crc32(f"{label}/{index}/{tensor.dtype}/{tensor.nbytes}".encode()) & 0x7FFFFFFF or 1


class Lanes:
    """The connections of a rank to each other one.

    Args:
        interfaces: their names, at least one; "" is the one towards `host`.
        host, port: where the ranks meet.

    Raises:
        EnvironmentFault: there is no such interface, or it has no address.
    """

    def __init__(self, interfaces: Sequence[str], host: str, port: int) -> None:
        self.interfaces, self.host, self.port = tuple(interfaces) or ("",), host, port
        self.count = 1 + len(self.interfaces)
        known = [name for _, name in socket.if_nameindex()]
        for name in self.interfaces:
            if name and name not in known:
                raise EnvironmentFault(
                    f"there is no interface '{name}' on this host", remedy=f"interface= one of {', '.join(known)}"
                )
        self._named = {name: _named(name) for name in self.interfaces if name}

    def pairs(self, store: Store, rank: int, size: int) -> Pairs:
        """A process group for messages between two ranks: every tag must come from `tags` or `probes`."""
        return cast(Pairs, self._group(store, rank, size, [self.interfaces[0], *self.interfaces]))

    def together(self, store: Store, rank: int, size: int) -> Any:
        """A process group for sums over all of its ranks."""
        return self._group(store, rank, size, self.interfaces)

    def _group(self, store: Store, rank: int, size: int, names: Sequence[str]) -> Any:
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore
        options._timeout = NEVER
        options._devices = [self._device(name) for name in names]
        return dist.ProcessGroupGloo(store, rank, size, options)  # pyright: ignore

    def _device(self, name: str) -> object:
        return self._named[name] if name else dist.ProcessGroupGloo.create_device(hostname=self._own_address())

    def _own_address(self) -> str:
        """Of the interface through which the system would go to where ranks meet."""
        family, kind, _, _, place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing: only asks the system
            return str(probe.getsockname()[0])

    def split(self, label: str, index: int, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """A message as parts and their tags, each for one of the connections."""
        tag = tag_of(label, index, tensor)
        large = self.count - 1
        if tensor.nbytes <= SMALL:
            yield self._tag(tag, 0), tensor
        elif tensor.nbytes < STRIPE or large == 1:
            yield self._tag(tag, 1 + tag % large), tensor
        else:
            for lane, part in enumerate(torch.tensor_split(tensor.view(-1), large), start=1):
                yield self._tag(tag, lane), part

    def _tag(self, tag: int, lane: int) -> int:
        return max(1, (tag >> 1) // self.count) * self.count + lane

    @property
    def probes(self) -> range:
        """Tags that nothing is sent with, one for each connection."""
        return range(self.count)


def _named(name: str) -> object:
    try:
        return dist.ProcessGroupGloo.create_device(interface=name)
    except RuntimeError:
        raise EnvironmentFault(
            f"interface '{name}' has no address", remedy="the name of one that is up and has one (`shoal doctor`)"
        ) from None


def asked_interfaces(setting: str | None, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The names in a setting, else in gloo's own variable; none: one is found by where it leads."""
    names = environ.get("GLOO_SOCKET_IFNAME", "") if setting is None else setting
    return tuple(name.strip() for name in names.split(",") if name.strip())
