"""Memory of this process that other processes of the host can read: one sparse file without a name, mapped by all."""

from __future__ import annotations

import mmap
import os
import platform
import threading
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from shoal.errors import EnvironmentFault

_PAGE = mmap.PAGESIZE
WARM = 2**21
"""Bytes of free memory that keeps its pages between steps."""
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

    Note: what keeps its pages. Memory that came back serves whoever needs as much, or half of it at least: units of
    all sizes share it. Between steps only the smallest free parts keep theirs: steps of small models should not pay for
    new pages, and those of large ones do not notice.

    Args:
        reserved: bytes at its beginning that are never given out.
    """

    def __init__(self, reserved: int) -> None:
        self.nbytes = capacity()
        self.fd = os.memfd_create("shoal")
        os.ftruncate(self.fd, self.nbytes)
        super().__init__(self.fd, self.nbytes)
        self.reserved = self.end = _up(reserved, _PAGE)
        self.free: list[tuple[int, int]] = []  # size and offset, ascending
        self.bare: list[tuple[int, int]] = []  # the same, of those without pages
        self.taken: dict[int, int] = {}  # offset -> size
        self.lent: list[tuple[int, Callable[[], bool]]] = []

    @property
    def under_way(self) -> int:
        """Bytes that others may still read, and nobody needs after that."""
        self._call_in()
        return sum(self.taken[offset] for offset, _ in self.lent)

    @property
    def waiting(self) -> int:
        """Bytes of free memory that has pages."""
        return sum(size for size, _ in self.free)

    def offset_of(self, tensor: Tensor) -> int | None:
        """Where in the arena a contiguous tensor lies; None: not in it."""
        at = tensor.data_ptr() - self.start
        return at if 0 <= at < self.end else None

    def take(self, nbytes: int, *, fresh: bool = False) -> int:
        """The offset of so many bytes; `fresh`: of zeros."""
        size = _up(nbytes, _PAGE if nbytes >= _PAGE else 256)
        self._call_in()
        found = _fitting(self.free, size) or _fitting(self.bare, size)
        size, offset = found if found is not None else (size, self._new(size))
        if fresh and found is not None:
            self.tensor(offset, size, torch.uint8).zero_()
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
            if idle():
                insort(self.free, (self.taken.pop(offset), offset))
            else:
                self.lent.append((offset, idle))

    def rest(self) -> None:
        """A step is over: free memory loses its pages."""
        self._call_in()
        ends = accumulate(size for size, _ in self.free)
        for size, offset in [slot for slot, end in zip(self.free, ends, strict=True) if end > WARM]:
            first, last = _up(offset, _PAGE), (offset + size) // _PAGE * _PAGE
            if first < last:
                self.map.madvise(mmap.MADV_REMOVE, first, last - first)
                self.free.remove((size, offset))
                insort(self.bare, (size, offset))

    def close(self) -> None:
        """Others that have mapped it keep it."""
        os.close(self.fd)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _fitting(slots: list[tuple[int, int]], size: int) -> tuple[int, int] | None:
    """Take the smallest out that is large enough and not much too large."""
    at = bisect_left(slots, (size, 0))
    return slots.pop(at) if at < len(slots) and slots[at][0] <= 2 * size else None
