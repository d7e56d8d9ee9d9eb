"""Point-to-point exchange over MPI. The only file that knows mpi4py.

MPI says nothing of a rank that has died, and who waits in it is not freed. So gloo's connections stay open beside it:
nothing travels over them, but an end of one is seen at once; marks and verdicts are in the same store as gloo's.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from shoal.comm.boxes import Boxes, numbered
from shoal.comm.group import FAR, Box, Common, Kept, MakeSums, Parcel, Pending, Strips
from shoal.comm.lanes import tag_of
from shoal.comm.pairwise import Gloo
from shoal.comm.pool import Pool
from shoal.comm.rendezvous import MARGIN, Address, bounded
from shoal.comm.waiter import Lost
from shoal.comm.watch import TICK
from shoal.errors import EnvironmentFault, PeerError

_SPIN = 100e-6  # seconds of a wait without sleep
_NAP = 1e-3  # seconds of the longest sleep
_PIECE = 1 << 30  # bytes: counts of MPI are 32 bits wide
_left: list[object] = []  # MPI may still write into what failed jobs have left under way, and must not wait for it


class Mpi:
    """The carrier of one rank that mpirun has started. MPI moves on whenever shoal calls it, not meanwhile.

    Args:
        address, timeout, report: see `Gloo`.

    Raises:
        EnvironmentFault: there is no mpi4py, no MPI library, or mpirun has not started these ranks.
    """

    ordered, plenty = False, FAR

    def __init__(self, address: Address, *, timeout: float, report: Callable[[str], None]) -> None:
        self.mpi = _library()
        world = self.mpi.COMM_WORLD
        if (world.rank, world.size) != address[:2]:
            raise EnvironmentFault(
                f"this is rank {address.rank} of {address.size}, and rank {world.rank} of {world.size} for MPI",
                cause="something else than mpirun has started these ranks",
                remedy="mpirun -n <ranks> python script.py, or carrier=gloo",
            )
        self.lives = Gloo(address, timeout=timeout, report=report)
        self.rank, self.size, self.sent = address.rank, address.size, self.lives.sent
        self.closed, self.failed, self.spare = False, False, Pool()
        self.levels = self.lives.levels  # of one: MPI knows hosts itself, and not what they could add up
        self.most = int(world.Get_attr(self.mpi.TAG_UB) or 32767)
        # apart from what the program itself sends; not by Idup, after which Open MPI 5.0 may crash at its end
        self.comm = bounded(lambda: world.Dup(), timeout + MARGIN, address)

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        self.sent[label.split(" ")[0]] += sum(t.nbytes for _, strips in sends for t in strips)
        self.lives.watch.at(label)
        boxes = Boxes(receives, self.spare)
        under_way: list[Request] = []
        for start, parcels in ((self.comm.Irecv, boxes.filled), (self.comm.Isend, sends)):
            for index, peer, tensor in numbered(parcels):
                tag = 1 + tag_of(label, index, tensor) % self.most
                try:
                    under_way += [(peer, start([p, self.mpi.BYTE], peer, tag), tensor) for p in self._pieces(tensor)]
                except self.mpi.Exception as e:
                    raise self.broken(label, peer, e) from None
        return Requests(self, label, under_way, boxes)

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        return None

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def idle(self, tensor: Tensor) -> bool:
        return True

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        return None

    def sums(self, device: torch.device) -> MakeSums | None:
        return None  # MPI knows no bfloat16, and what it adds up moves on only while shoal calls it

    def note(self, mark: str) -> None:
        self.lives.note(mark)

    def hold(self, reason: str) -> None:
        self.lives.hold(reason)

    def rest(self) -> None:
        return

    def kept(self) -> Kept:
        return Kept(self.spare.out, self.spare.nbytes)

    def fail(self, why: str) -> None:
        self.failed = True
        _left.append(why)
        self.lives.fail(why)

    def close(self) -> None:
        if not (self.failed or self.closed):
            self.comm.Free()
        self.lives.close()
        self.closed = True

    def broken(self, label: str, peer: int, error: Exception) -> PeerError:
        """See `Gloo.broken`."""
        self.failed = True
        _left.append(label)
        return self.lives.broken(label, peer, error)

    def ended(self, label: str) -> PeerError:
        """See `Gloo.ended`."""
        self.failed = True
        _left.append(label)
        return self.lives.ended(label)

    def _pieces(self, tensor: Tensor) -> Iterator[object]:
        """Its memory. Not by numpy, which would keep torch from resizing the storage for good."""
        for start in range(0, tensor.nbytes, _PIECE):
            size = min(_PIECE, tensor.nbytes - start)
            yield self.mpi.buffer.fromaddress(tensor.data_ptr() + start, size)


Request = tuple[int, Any, Tensor | None]
"""With which rank, mpi4py's request, and what must not be freed before it is complete."""


class Requests:
    """The transfers of one post."""

    def __init__(self, carrier: Mpi, label: str, under_way: list[Request], boxes: Boxes) -> None:
        self.carrier, self.label, self.under_way, self.boxes = carrier, label, under_way, boxes

    def ready(self) -> bool:
        try:
            if self.carrier.mpi.Request.Testall([request for _, request, _ in self.under_way]):
                self.under_way = []
        except self.carrier.mpi.Exception as e:
            raise self._leave(self.carrier.broken(self.label, self._waited_for(), e)) from None
        return not self.under_way

    def wait(self) -> Sequence[Strips]:
        if self.under_way and not self.ready():
            with self.carrier.lives.watch.waiting(self.label):
                self._wait()
        return self.boxes.received()

    def release(self) -> None:
        self.boxes.release()

    def _wait(self) -> None:
        lives, begin = self.carrier.lives, time.monotonic()
        look, missed = begin + TICK, cast(Lost | None, None)
        while not self.ready():
            lives.go_on()
            now = time.monotonic()
            if now >= look:
                look = now + TICK
                if lives.watch.judge() is not None:
                    raise self._leave(self.carrier.ended(self.label))
                before, missed = missed, self._missed()
                if before and missed and before[0] == missed[0] and not self.ready():
                    raise self._leave(self.carrier.broken(self.label, *missed))
            _rest(now - begin)

    def _missed(self) -> Lost | None:
        """A rank that is waited for and has gone."""
        peers = {peer for peer, request, _ in self.under_way if not request.Test()}
        return next((lost for peer in sorted(peers) if (lost := self.carrier.lives.severed(peer))), None)

    def _waited_for(self) -> int:
        """The rank with which something failed, as far as MPI says."""
        for peer, request, _ in self.under_way:
            try:
                request.Test()
            except self.carrier.mpi.Exception:
                return peer
        return self.under_way[0][0]

    def _leave(self, error: PeerError) -> PeerError:
        _left.append(self.under_way)
        return error


def _rest(waited: float) -> None:
    """Let others run; the longer the wait has been, the longer."""
    if waited < _SPIN:
        os.sched_yield()
    else:
        time.sleep(min(waited / 10, _NAP))


def _library() -> ModuleType:
    """mpi4py's MPI, initialised. At this process's end it is finalised, unless a job has failed: that would wait."""
    ours = "mpi4py.MPI" not in sys.modules
    try:
        if ours:
            import_module("mpi4py").rc.finalize = False
        mpi = import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as e:  # no mpi4py, or no MPI library that it can load
        raise EnvironmentFault(
            f"carrier=mpi needs mpi4py and an MPI library: {str(e).splitlines()[0]}",
            remedy="pip install 'shoal[mpi]', and an MPI such as Open MPI where mpirun is; or carrier=gloo",
        ) from None
    if ours:
        atexit.register(lambda: None if _left else mpi.Finalize())
    return mpi
