"""How fast one plain TCP stream is, and what a clock at the other end shows."""

from __future__ import annotations

import select
import socket
import struct
import time
from contextlib import suppress
from statistics import median

from shoal.doctor.wire import Line

MOST = 64 << 20  # bytes
_CHUNK = 256 << 10
_GRACE = 2.0  # seconds for a count to come back through full queues
_TRIPS = 21


def send_stream(line: Line, seconds: float) -> float:
    """Send as fast as possible until the receiver has counted; return its bytes per second.

    Raises:
        OSError: the connection broke, or no count came.
    """
    line.send(do="stream", seconds=seconds)
    chunk, until = memoryview(bytes(_CHUNK)), time.monotonic() + seconds + _GRACE
    line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # what is unsent is dropped
    line.socket.setblocking(False)
    while (left := until - time.monotonic()) > 0:
        readable, writable, _ = select.select([line.socket], [line.socket], [], left)
        if readable:
            line.socket.settimeout(_GRACE)
            said = line.receive()
            count, took = said.get("bytes"), said.get("seconds")
            if isinstance(count, int) and isinstance(took, float) and took > 0:
                return count / took
            break
        if writable:
            line.socket.send(chunk)
    raise TimeoutError("no count came back")


def receive_stream(line: Line, seconds: float) -> None:
    """Count what comes for a while, say so, and wait until the sender has hung up.

    Raises:
        OSError: the connection broke.
    """
    room, count, last = bytearray(_CHUNK), 0, 0.0
    line.socket.settimeout(seconds + _GRACE)
    line.socket.recv_into(room, 1)
    start = time.perf_counter()
    while count < MOST and last < seconds:
        got = line.socket.recv_into(room)
        if not got:
            return
        count, last = count + got, time.perf_counter() - start
    line.send(bytes=count, seconds=last)
    until = time.monotonic() + _GRACE
    with suppress(ConnectionError):  # it drops what is unsent
        while line.socket.recv_into(room) and time.monotonic() < until:
            pass


def round_trips(line: Line) -> tuple[float, float, float]:
    """Median delay of small round trips, and how far the other clock is ahead, give or take how much, in seconds.

    As in NTP (RFC 5905, section 8): the other clock was read somewhere within the quickest trip.

    Raises:
        OSError: the connection broke.
    """
    trips: list[tuple[float, float]] = []
    for _ in range(_TRIPS):
        sent = time.time()
        start = time.perf_counter()
        there = line.ask(do="ping").get("time")
        took = time.perf_counter() - start
        if isinstance(there, float):
            trips.append((took, there - (sent + took / 2)))
    if not trips:
        raise TimeoutError("no clock was read")
    quickest, offset = min(trips)
    return median(took for took, _ in trips), offset, quickest / 2
