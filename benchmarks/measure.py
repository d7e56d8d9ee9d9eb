"""What this process and its machine say about themselves: processor time, memory, bytes sent. Linux tells all of it."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import socket
import struct
import threading
import time
from pathlib import Path

SIOCGIFADDR = 0x8915
PR_SET_PDEATHSIG = 1


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        ("arena", ctypes.c_size_t), ("ordblks", ctypes.c_size_t), ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t), ("hblkhd", ctypes.c_size_t), ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t), ("uordblks", ctypes.c_size_t), ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]  # fmt: skip


_C = ctypes.CDLL(None)
_HEAP = getattr(_C, "mallinfo2", None)  # glibc 2.33
if _HEAP is not None:
    _HEAP.restype = _Mallinfo2


def heap() -> int | None:
    """Bytes that are allocated now, by whatever thread and whatever library; Python's small objects are elsewhere.

    All tensors on the CPU come from malloc. The call takes half a microsecond.
    """
    if _HEAP is None:
        return None
    found = _HEAP()
    return found.uordblks + found.hblkhd


def trim() -> None:
    """Give memory that is not in use back to the system."""
    gc.collect()
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)


def proportional(pid: int | str = "self", field: str = "Pss") -> int | None:
    """Bytes of a process: its own pages, and its part of those that it shares. "Pss_Shmem": of shared memory only."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # not Linux, or it has just ended
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


class Highest:
    """Looks at the heap a thousand times a second while it is open and keeps the most. Not for steps whose time counts.

    A context manager. It agrees with torch's profiler (which does not see other threads) to three digits.
    """

    def __init__(self) -> None:
        self.bytes = heap() or 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.bytes = max(self.bytes, heap() or 0)

    def __enter__(self) -> Highest:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()


def machine_seconds() -> float | None:
    """Seconds that all processors of this machine have been busy."""
    try:
        user, nice, system, _idle, _wait, *other = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    return sum(map(int, (user, nice, system, *other))) / os.sysconf("SC_CLK_TCK")


def interface_of(address: str) -> str:
    """The name of the network interface that has this address, in the network namespace of this process; or ""."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return ""


def wire_bytes(interface: str) -> int | None:
    """Bytes that an interface has sent, headers included, in the network namespace of this process."""
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, numbers = line.strip().partition(":")
        if name == interface:
            return int(numbers.split()[8])
    return None


def die_with_parent(signal: int) -> None:
    """Nobody is left behind when the race itself is killed."""
    if hasattr(_C, "prctl"):
        _C.prctl(PR_SET_PDEATHSIG, signal)


def stream(seconds: float = 1.0) -> float:
    """Bytes a second of one plain TCP stream over the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = threading.Thread(target=_drain, args=(server,), daemon=True)
        reader.start()
        sent, block, start = 0, memoryview(bytearray(1 << 20)), time.perf_counter()
        with socket.create_connection(server.getsockname()) as out:
            while time.perf_counter() - start < seconds:
                out.sendall(block)
                sent += len(block)
        reader.join(seconds + 5)
        return sent / (time.perf_counter() - start)


def _drain(server: socket.socket) -> None:
    into = bytearray(1 << 20)
    peer, _ = server.accept()
    with peer:
        while peer.recv_into(into):
            pass
