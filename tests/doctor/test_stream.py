"""How fast one stream is, and what a clock at the other end shows."""

from __future__ import annotations

import threading
import time

import pytest

from shoal.doctor import stream
from shoal.doctor.wire import Line
from tests.doctor.test_wire import pair


def test_a_stream_ends_with_its_time_or_its_bytes() -> None:
    mine, other = (Line(end) for end in pair())

    def receive() -> None:
        message = other.receive()
        assert message["do"] == "stream"
        stream.receive_stream(other, float(str(message["seconds"])))

    thread = threading.Thread(target=receive)
    with other, mine:
        thread.start()
        start = time.perf_counter()
        rate = stream.send_stream(mine, 0.5)
        took = time.perf_counter() - start
        mine.socket.close()
        thread.join(10)
    assert not thread.is_alive()
    assert took < 1.5
    assert rate > 1e6
    assert rate * 0.9 * took < stream.MOST + (1 << 20)


def test_a_receiver_that_never_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_GRACE", 0.1)
    mine, other = (Line(end) for end in pair())
    with other, mine, pytest.raises(TimeoutError, match="no count came back"):
        stream.send_stream(mine, 0.1)


def test_a_clock_that_is_ahead() -> None:
    mine, other = (Line(end) for end in pair())

    def answer() -> None:
        for _ in range(21):
            other.receive()
            other.send(time=time.time() + 100)

    thread = threading.Thread(target=answer)
    with other, mine:
        thread.start()
        delay, offset, uncertainty = stream.round_trips(mine)
        thread.join(10)
    assert abs(offset - 100) < uncertainty + 0.01
    assert 0 < 2 * uncertainty <= delay < 0.5


def test_a_host_that_tells_no_time() -> None:
    mine, other = (Line(end) for end in pair())

    def answer() -> None:
        for _ in range(21):
            other.receive()
            other.send(time="noon")

    thread = threading.Thread(target=answer)
    thread.start()
    with other, mine, pytest.raises(TimeoutError, match="no clock was read"):
        stream.round_trips(mine)
    thread.join(10)
