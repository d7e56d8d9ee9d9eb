"""Memory of this process that other processes of the host can read: one sparse file without a name, mapped by all."""

from __future__ import annotations

import mmap
import os
import platform
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.errors import EnvironmentFault

_PAGE = mmap.PAGESIZE
_LARGE = 2**25
"""Bytes of a buffer of which only one waits with its pages to be used again."""
_MOST = 2**42  # bytes of address space: a process maps the arenas of all ranks of its host
_ORDERED = platform.machine() in ("x86_64", "AMD64")  # stores are seen in their order, without more ado


def capacity() -> int:
    """Bytes of an arena: all memory there is. Pages exist once they are written."""
    return min(os.sysconf("SC_PHYS_PAGES") * _PAGE, _MOST)


class Fence:
    """Between data and the flag that says it is there: neither is seen in the other's place.

    Where the processor reorders stores, a lock that is released and taken again keeps them apart.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        if not _ORDERED:
            self._lock.release()
            self._lock.acquire()


class View:
    """An arena as this process sees it, its own or another's.

    Args:
        fd: of the file; not needed afterwards.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.map = mmap.mmap(fd, nbytes)
        self.words = memoryview(self.map).cast("Q")
        self.start = torch.frombuffer(self.map, dtype=torch.uint8, count=1).data_ptr()

    def tensor(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.map, dtype=dtype, count=numel, offset=offset)


class Arena(View):
    """This process's own.

    Args:
        reserved: bytes at its beginning that are never given out.
    """

    def __init__(self, reserved: int) -> None:
        self.nbytes = capacity()
        self.fd = os.memfd_create("shoal")
        os.ftruncate(self.fd, self.nbytes)
        super().__init__(self.fd, self.nbytes)
        self.end = _up(reserved, _PAGE)
        self.free: dict[int, list[int]] = {}  # by size
        self.taken: dict[int, int] = {}  # offset -> size
        self.lent: list[tuple[int, Callable[[], bool]]] = []

    def offset_of(self, tensor: Tensor) -> int | None:
        """Where in the arena a contiguous tensor lies; None: not in it."""
        at = tensor.data_ptr() - self.start
        return at if 0 <= at < self.end else None

    def take(self, nbytes: int, *, fresh: bool = False) -> int:
        """The offset of so many bytes; `fresh`: of zeros."""
        size = _room_for(nbytes)
        waiting = [] if fresh else self.free.get(size)
        if not waiting and not fresh and self.lent:
            self._call_in()
            waiting = self.free.get(size)
        offset = waiting.pop() if waiting else self._new(size)
        self.taken[offset] = size
        return offset

    def _new(self, size: int) -> int:
        if self.end + size > self.nbytes:
            raise EnvironmentFault(
                f"{size >> 10} KiB do not fit into what is left of {self.nbytes >> 20} MiB of shared memory",
                cause="tensors under way and shards take more memory than this host has",
                remedy='fewer ranks on this host, or carrier="gloo"',
            )
        offset, self.end = self.end, self.end + size
        return offset

    def give(self, offset: int, idle: Callable[[], bool]) -> None:
        """Take it back as soon as nobody reads it any more."""
        self.lent.append((offset, idle))

    def _call_in(self) -> None:
        lent, self.lent = self.lent, []
        for offset, idle in lent:
            if not idle():
                self.lent.append((offset, idle))
                continue
            size = self.taken.pop(offset)
            waiting = self.free.setdefault(size, [])
            if waiting and size > _LARGE:
                first = _up(offset, _PAGE)
                self.map.madvise(mmap.MADV_REMOVE, first, (offset + size - first) // _PAGE * _PAGE)
            waiting.append(offset)

    def close(self) -> None:
        """Others that have mapped it keep it."""
        os.close(self.fd)


def _room_for(nbytes: int) -> int:
    """Sizes of which there are few, so that what was given back fits again. Pages that nobody writes cost nothing."""
    return _up(nbytes, max(256, 2 ** max(0, nbytes.bit_length() - 4)))


def _up(n: int, to: int) -> int:
    return -(-n // to) * to
