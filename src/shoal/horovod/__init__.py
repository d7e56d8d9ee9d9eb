"""Horovod's names for PyTorch over shoal's groups: a script changes its import, `import shoal.horovod as hvd`.

Ranks are found from the launcher's environment (`shoal run --workers N script.py`, torchrun, mpirun, Slurm). Calls come
in the same order on all ranks: before each one they tell each other what they call, so that a mistake is an error that
names both sides, never a hang. Sums have a fixed order. What is not here is refused by name.

Source: Sergeev and Del Balso, Horovod, arXiv 1802.05799; horovod.torch.
"""

from __future__ import annotations

from shoal.horovod.compression import Compression
from shoal.horovod.handles import poll, synchronize
from shoal.horovod.moves import (
    allgather,
    allgather_async,
    allgather_object,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    broadcast_object,
)
from shoal.horovod.ops import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    Sum,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    join,
)
from shoal.horovod.optimizer import DistributedOptimizer, broadcast_optimizer_state, broadcast_parameters
from shoal.horovod.session import begin, end, initialized, session

__all__ = [
    "Adasum", "Average", "Compression", "DistributedOptimizer", "Max", "Min", "Product", "Sum", "allgather",
    "allgather_async", "allgather_object", "allreduce", "allreduce_", "allreduce_async", "allreduce_async_",
    "broadcast", "broadcast_", "broadcast_async", "broadcast_async_", "broadcast_object", "broadcast_optimizer_state",
    "broadcast_parameters", "init", "is_initialized", "join", "local_rank", "local_size", "poll", "rank", "shutdown",
    "size", "synchronize",
]  # fmt: skip


def init() -> None:
    """Join the other ranks. Collective; a second call does nothing.

    Raises:
        EnvironmentFault: the other ranks do not come.
    """
    begin()


def is_initialized() -> bool:
    """Between `init()` and `shutdown()`?"""
    return initialized()


def shutdown() -> None:
    """Leave, all ranks together. Done at the interpreter's end too."""
    end()


def rank() -> int:
    """This worker's number, from 0."""
    return session().world.rank


def size() -> int:
    """The number of workers."""
    return session().world.size


def local_rank() -> int:
    """This worker's number among those of its host."""
    return session().world.local_rank


def local_size() -> int:
    """The number of workers on this host."""
    return session().world.seat.local_world


def mpi_threads_supported() -> bool:
    """False: no call of MPI comes from this module."""
    return False


def nccl_built() -> int:
    """0: which carrier moves the bytes is `SHOAL_CARRIER`'s business."""
    return 0


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(
        f"shoal.horovod has no {name!r}; it has {', '.join(__all__)}. Elastic training: `shoal run --workers N`; "
        "synchronised batch norm: GroupNorm, or buffers averaged by job.prepare"
    )
