"""What a host answers while others look at it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import cast

from pydantic import TypeAdapter, ValidationError

from shoal.doctor.stream import receive_stream
from shoal.doctor.ways import HostReport
from shoal.doctor.wire import Line, StrangerError, family, packed, unpacked
from shoal.errors import EnvironmentFault

_EPHEMERAL = 2  # ports
_BEAT = 0.2  # seconds between datagrams
_SILENCE = 30.0  # seconds after which a connection that says nothing is dropped
_TURN = 3.0  # seconds, the same for one that keeps others from measuring
_REPORTS = TypeAdapter(list[HostReport])


class Answers:
    """Listens at the meeting port and at ephemeral ones, sends datagrams to all, and keeps what others say.

    Args:
        own: this host's name.
        addresses: of all hosts by name; this one's is where it listens.

    Raises:
        EnvironmentFault: the meeting port is taken.
    """

    def __init__(self, own: str, addresses: dict[str, str], port: int) -> None:
        self.own, self.addresses, self.port = own, addresses, port
        self.came: set[str] = set()  # hosts that connected
        self.heard: dict[str, frozenset[str]] = {}  # hosts whose datagrams arrived, and whom those have heard
        self.reports: dict[str, HostReport] = {}
        self.measuring = threading.Lock()  # one stream at a time in or out of this host
        self._lock = threading.Lock()
        self._over = threading.Event()
        where, kind = addresses[own], family(addresses[own])
        try:
            listening = [socket.create_server((where, port), family=kind, backlog=128)]
        except OSError as error:
            raise EnvironmentFault(
                f"{own} cannot listen at {where} port {port}: {os.strerror(error.errno or 0)}",
                remedy="--port another one, the same on all hosts; --as NAME if this is another host",
            ) from None
        listening += [socket.create_server((where, 0), family=kind) for _ in range(_EPHEMERAL)]
        self.ports = [int(one.getsockname()[1]) for one in listening[1:]]
        self._air = socket.socket(kind, socket.SOCK_DGRAM)
        self._air.settimeout(_BEAT)
        with suppress(OSError):  # taken: then nobody hears us by datagram, and that is all
            self._air.bind((where, port))
        self._listening = listening
        self._threads = [threading.Thread(target=self._accept, args=(one,), daemon=True) for one in listening]
        self._threads += [threading.Thread(target=beat, daemon=True) for beat in (self._call, self._hear)]
        for thread in self._threads:
            thread.start()

    def merge(self, reports: Iterable[HostReport]) -> None:
        """Keep the newest report of each host."""
        with self._lock:
            for report in reports:
                known = self.reports.get(report.name)
                if report.name in self.addresses and (known is None or known.edition < report.edition):
                    self.reports[report.name] = report

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for one in self._listening:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        for thread in self._threads:
            thread.join()
        for one in (*self._listening, self._air):
            one.close()

    def _accept(self, listening: socket.socket) -> None:
        while not self._over.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            connection.settimeout(_SILENCE)
            threading.Thread(target=self._serve, args=(Line(connection),), daemon=True).start()

    def _serve(self, line: Line) -> None:
        held = False  # whether this connection has `measuring`
        with line, suppress(OSError, ValidationError):
            try:
                while not self._over.is_set():
                    message = line.receive()
                    if message.get("do") == "measure" and not held:
                        held = self.measuring.acquire(blocking=False)
                        line.socket.settimeout(_TURN)
                        line.send(busy=not held)
                    else:
                        self._answer(line, message)
            finally:
                if held:
                    self.measuring.release()

    def _answer(self, line: Line, message: dict[str, object]) -> None:
        match message.get("do"):
            case "hello":
                name = message.get("from")
                if isinstance(name, str) and name in self.addresses:
                    self.came.add(name)
                line.send(name=self.own, ports=self.ports)
            case "ping":
                line.send(time=time.time())
            case "reports":
                self.merge(_REPORTS.validate_python(message.get("reports")))
                line.send()
            case "stream":
                seconds = message.get("seconds")
                if not isinstance(seconds, float) or not 0 < seconds <= 1:
                    raise StrangerError(f"a stream of {seconds!r} s")
                receive_stream(line, seconds)
            case other:
                raise StrangerError(f"unknown wish {other!r}")

    def _call(self) -> None:
        others = [address for name, address in self.addresses.items() if name != self.own]
        while not self._over.wait(_BEAT):
            data = packed({"from": self.own, "heard": sorted(self.heard)})
            for address in others:
                with suppress(OSError):
                    self._air.sendto(data, (address, self.port))

    def _hear(self) -> None:
        while not self._over.is_set():
            with suppress(OSError):  # a time-out, or a stranger
                message = unpacked(self._air.recv(1 << 16))
                name, heard = message.get("from"), message.get("heard")
                if isinstance(name, str) and name in self.addresses and isinstance(heard, list):
                    self.heard[name] = frozenset(map(str, cast("list[object]", heard)))
