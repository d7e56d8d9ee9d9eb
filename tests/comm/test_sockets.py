"""Connections found by file descriptors: the right ones are shut, the others are left alone."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from shoal.comm.sockets import all_open, apart_from, forget_in_children, lead_nowhere, shut, sockets, toward

Pair = tuple[socket.socket, socket.socket]


class Ends:
    """A listener and a connection to it, all in this process."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.client = socket.create_connection(("127.0.0.1", self.port))
        self.server, _ = self.listener.accept()

    def close(self) -> None:
        for end in (self.client, self.server, self.listener):
            end.close()


@pytest.fixture
def wire() -> Iterator[Ends]:
    with closing(Ends()) as ends:
        yield ends


@pytest.fixture
def store() -> Iterator[Ends]:
    with closing(Ends()) as ends:
        yield ends


def wires_of(*all_ends: Ends) -> dict[int, int]:
    numbers = {end.fileno() for ends in all_ends for end in (ends.client, ends.server, ends.listener)}
    return {fd: inode for fd, inode in sockets().items() if fd in numbers}


def is_open(one: socket.socket, other: socket.socket) -> bool:
    with suppress(OSError):
        one.send(b"x")
        other.settimeout(1)
        return other.recv(1) == b"x"
    return False


def test_only_connections_are_found(wire: Ends) -> None:
    found = sockets()
    for end in (wire.client, wire.server, wire.listener):
        assert end.fileno() in found
    with open(os.devnull) as file:
        assert file.fileno() not in sockets()


def test_wires_are_shut_and_the_store_is_not(wire: Ends, store: Ends) -> None:
    shut(apart_from(store.port, wires_of(wire, store)))
    assert not is_open(wire.client, wire.server)
    assert is_open(store.client, store.server)
    socket.create_connection(("127.0.0.1", wire.port)).close()  # it listens on


def test_a_number_that_means_another_socket_now(wire: Ends, store: Ends) -> None:
    number = wire.client.fileno()
    inode = sockets()[number]
    with closing(Ends()) as new:
        os.dup2(new.client.fileno(), number)  # as if it had been closed and given out again
        shut({number: inode})
        assert is_open(new.client, new.server)


def test_wires_that_are_closed_already(wire: Ends, store: Ends) -> None:
    wires = wires_of(wire, store)
    assert all_open(wires)
    wire.client.close()
    assert not all_open(wires)
    shut(wires)
    assert not is_open(wire.server, wire.server)


def test_the_other_end_of_the_store(wire: Ends, store: Ends) -> None:
    ours = toward(store.port, wires_of(wire, store))
    assert list(ours) == [store.client.fileno()]  # in the process that serves, clients come and go
    assert not lead_nowhere(ours)
    store.server.send(b"answer")
    assert not lead_nowhere(ours)
    assert store.client.recv(6) == b"answer"  # looking takes nothing away
    wire.server.close()
    assert not lead_nowhere(ours)
    store.server.close()
    assert lead_nowhere(ours)
    store.client.close()
    assert not lead_nowhere(ours)  # nothing is known


def test_a_connection_that_was_reset(store: Ends) -> None:
    ours = toward(store.port, wires_of(store))
    store.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    store.server.close()
    assert lead_nowhere(ours)


def test_other_kinds_of_sockets() -> None:
    one, other = socket.socketpair()
    with one, other:
        shut({fd: i for fd, i in sockets().items() if fd in (one.fileno(), other.fileno())})
        assert is_open(one, other)


@pytest.mark.parametrize("alive", [True, False])
def test_children_do_not_hold_connections(alive: bool, wire: Ends) -> None:
    keep = [alive]
    forget_in_children({wire.client.fileno(): sockets()[wire.client.fileno()]}, lambda: keep[0])
    child = os.fork()
    if child == 0:
        os._exit(int(wire.client.fileno() in sockets()))
    keep[0] = False  # for later tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == int(not alive)
    assert is_open(wire.client, wire.server)
