"""Connections of this process, found by what the system says about its file descriptors."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

Wires = Mapping[int, int]
"""File descriptors of sockets, and their inodes: a number may come to mean another socket."""


def sockets() -> dict[int, int]:
    """This process's sockets. Empty where the system does not say."""
    with suppress(OSError):
        found = {int(name): _inode(int(name)) for name in os.listdir("/dev/fd")}
        return {fd: inode for fd, inode in found.items() if inode}
    return {}


def _inode(fd: int) -> int:
    """0: it is no socket, or closed."""
    with suppress(OSError):
        about = os.fstat(fd)
        return about.st_ino if stat.S_ISSOCK(about.st_mode) else 0
    return 0


class Wire(NamedTuple):
    """A connection, and the ports of this end and of the other."""

    fd: int
    socket: socket.socket
    here: int
    there: int


def _connected(wires: Wires) -> Iterator[Wire]:
    """Those of them that are still there and lead somewhere."""
    for fd, wire in _held(wires):
        if wire.family in (socket.AF_INET, socket.AF_INET6):
            with suppress(OSError):  # it listens
                yield Wire(fd, wire, wire.getsockname()[1], wire.getpeername()[1])


def _held(wires: Wires) -> Iterator[tuple[int, socket.socket]]:
    """Those of them that are still there."""
    for fd, inode in wires.items():
        if _inode(fd) == inode:
            with suppress(OSError), socket.socket(fileno=os.dup(fd)) as wire:  # closed meanwhile
                yield fd, wire


def toward(port: int, wires: Wires) -> Wires:
    """The connections that lead to this port."""
    return {wire.fd: wires[wire.fd] for wire in _connected(wires) if wire.there == port}


def apart_from(port: int, wires: Wires) -> Wires:
    """The connections that have nothing to do with this port."""
    return {wire.fd: wires[wire.fd] for wire in _connected(wires) if port not in (wire.here, wire.there)}


def all_open(wires: Wires) -> bool:
    """Has this process closed none of them?"""
    return all(_inode(fd) == inode for fd, inode in wires.items())


def shut(wires: Wires) -> None:
    """Let both ends know that it is over. A listening socket is left alone: gloo's would take the process along."""
    for wire in _connected(wires):
        with suppress(OSError):
            wire.socket.shutdown(socket.SHUT_RDWR)


def lead_nowhere(wires: Wires) -> bool:
    """Has the other end closed one of these connections? Takes nothing out of them."""
    for _, wire in _held(wires):
        try:
            if wire.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                return True
        except BlockingIOError:
            continue
        except OSError:  # it was reset
            return True
    return False


def forget_in_children(wires: Wires, alive: Callable[[], object]) -> None:
    """A data loader's worker must not keep connections open after this process's end: nobody would notice that.

    Args:
        alive: something true as long as the connections are ours.
    """

    def close() -> None:
        if alive():
            for fd, inode in wires.items():
                if _inode(fd) == inode:
                    os.close(fd)

    os.register_at_fork(after_in_child=close)
