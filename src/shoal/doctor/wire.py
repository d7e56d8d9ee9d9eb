"""JSON objects over a connection, one a line. No pickles: whoever connects can only say numbers and names."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import cast

from shoal.doctor.ways import Reach

MARK = "shoal doctor"  # every message has it, with the version of what is spoken
VERSION = 1
_LONGEST = 4 << 20
_PIECE = 1 << 16


class StrangerError(OSError):
    """What came is none of our messages."""


class Line:
    """A connection that carries messages. Its time-out is the socket's."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message: object) -> None:
        """Send one message."""
        self.socket.sendall(packed(message) + b"\n")

    def receive(self) -> dict[str, object]:
        """The next message.

        Raises:
            OSError: the connection has ended or is silent; StrangerError: it carries something else.
        """
        while b"\n" not in self._rest:
            piece = self.socket.recv(_PIECE)
            if not piece:
                raise ConnectionResetError("the other end has left")
            self._rest += piece
            if len(self._rest) > _LONGEST:
                raise StrangerError("a line without end")
        line, _, self._rest = self._rest.partition(b"\n")
        return unpacked(line)

    def ask(self, **message: object) -> dict[str, object]:
        """Send one message and wait for its answer."""
        self.send(**message)
        return self.receive()

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()


def packed(message: Mapping[str, object]) -> bytes:
    """A message as bytes."""
    return json.dumps({MARK: VERSION, **message}).encode()


def unpacked(data: bytes) -> dict[str, object]:
    """The message that bytes stand for.

    Raises:
        StrangerError: none.
    """
    try:
        message: object = json.loads(data)
    except ValueError:
        message = None
    if not isinstance(message, dict) or cast("dict[str, object]", message).get(MARK) != VERSION:
        raise StrangerError(f"not a message of this version: {data[:40]!r}")
    return cast("dict[str, object]", message)


def connect(address: str, port: int, timeout: float, own: str) -> Line:
    """A connection from the address `own`.

    Raises:
        OSError: see `reach_of`.
    """
    return Line(socket.create_connection((address, port), timeout=timeout, source_address=(own, 0)))


def reach_of(error: OSError) -> Reach:
    """What an attempt to connect has shown."""
    if isinstance(error, StrangerError):
        return Reach.STRANGER
    if isinstance(error, ConnectionError):
        return Reach.REFUSED
    return Reach.SILENT if isinstance(error, TimeoutError) else Reach.NO_WAY


def family(address: str) -> socket.AddressFamily:
    """IPv4 or IPv6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET
