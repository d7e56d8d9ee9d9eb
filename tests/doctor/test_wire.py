"""JSON objects over a connection."""

from __future__ import annotations

import socket

import pytest

from shoal.doctor.ways import Reach
from shoal.doctor.wire import Line, StrangerError, connect, packed, reach_of, unpacked


def test_messages_come_as_they_were_sent() -> None:
    ends = [Line(end) for end in pair()]
    with ends[0] as a, ends[1] as b:
        a.send(do="one", numbers=[1, 2.5])
        a.send(do="two")
        assert [b.receive(), b.receive()] == [
            {"shoal doctor": 1, "do": "one", "numbers": [1, 2.5]},
            {"shoal doctor": 1, "do": "two"},
        ]
        a.socket.close()
        with pytest.raises(ConnectionResetError, match="the other end has left"):
            b.receive()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r", b"{}", b'{"shoal doctor": 2}', b"[1]", b"\xff\xfe"])
def test_strangers(data: bytes) -> None:
    with pytest.raises(StrangerError, match="not a message of this version: b"):
        unpacked(data)


def test_a_line_without_end() -> None:
    a, b = pair()
    with a, Line(b) as line:
        line._rest = b"x" * (4 << 20)
        a.sendall(b"x")
        with pytest.raises(StrangerError, match="a line without end"):
            line.receive()


@pytest.mark.parametrize(
    ("error", "reach"),
    [
        (StrangerError("x"), Reach.STRANGER),
        (TimeoutError(110, "Connection timed out"), Reach.SILENT),
        (ConnectionRefusedError(), Reach.REFUSED),
        (ConnectionResetError(), Reach.REFUSED),
        (OSError(113, "No route to host"), Reach.NO_WAY),
    ],
)
def test_reach(error: OSError, reach: Reach) -> None:
    assert reach_of(error) is reach


def test_connections_come_from_the_own_address() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        connect("127.0.0.1", server.getsockname()[1], 5, "127.0.0.3") as line,
    ):
        there, address = server.accept()
        there.close()
        assert address[0] == line.socket.getsockname()[0] == "127.0.0.3"


def test_a_datagram_is_a_message() -> None:
    assert unpacked(packed({"from": "a"})) == {"shoal doctor": 1, "from": "a"}


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        return a, server.accept()[0]
