"""Ranks as threads, and a small job whose state they hold in shards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint import Meta, Piece, Share
from shoal.layout import Item, Layout

META = Meta(strategy={"name": "zero3"}, leaves=4, seed=7, world=2, versions={"torch": "2", "shoal": "0.1"})


def on_ranks(world: int, work: Callable[[int, Share], Any]) -> list[Any]:
    """What `work(rank, share)` gives on each rank, exceptions among them."""
    barrier = threading.Barrier(world, timeout=20)
    table: list[bytes] = [b""] * world
    results: list[Any] = [None] * world

    def one(rank: int) -> None:
        def share(mine: bytes) -> list[bytes]:
            table[rank] = mine
            barrier.wait()
            seen = list(table)
            barrier.wait()
            return seen

        try:
            results[rank] = work(rank, share)
        except Exception as e:
            results[rank] = e

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def alone(mine: bytes) -> list[bytes]:
    """The all-gather of a world of one."""
    return [mine]


def bits(tensor: Tensor) -> Any:
    """Equal for equal bits, whatever the dtype."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), bytes(raw.tolist())


@dataclass
class Job:
    """Whole tensors, and how ranks contribute them."""

    params: dict[str, Tensor]
    states: dict[str, Tensor]  # one kind, of every parameter
    whole: list[Piece]

    def layout(self, owners: int, granule: int = 1) -> Layout:
        return Layout.even([Item(n, tuple(p.shape), granule) for n, p in self.params.items()], owners)

    def pieces(self, rank: int, layout: Layout) -> Iterator[Piece]:
        for i in layout.pieces(rank):
            for kind, tensors in (("param", self.params), ("state:exp_avg", self.states)):
                yield Piece(kind=kind, interval=i, tensor=tensors[i.name].reshape(-1)[i.start : i.stop])
        if rank == layout.owners - 1:
            yield from self.whole


def make_job() -> Job:
    """Six parameters, one of each dtype that matters, among them a scalar, an empty one and an odd name."""
    g = torch.Generator().manual_seed(1)
    shapes = {"wte.weight": (65, 3), "bias": (7,), "scale": (), "none": (0, 4), "head": (2, 3, 5), "ü.0\n": (130,)}
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.complex64]
    params = {
        n: torch.randn(s, generator=g, dtype=torch.float64).to(d)
        for (n, s), d in zip(shapes.items(), dtypes, strict=True)
    }
    states = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    whole = [
        Piece.whole("buffer", "bn.running_mean", torch.randn(4, generator=g)),
        Piece.whole("buffer", "bn.num_batches_tracked", torch.tensor(3)),
        Piece.whole("buffer", "mask", torch.tensor([[True, False], [False, True]])),
        Piece.whole("buffer", "nothing", torch.zeros(0, 2)),
        *(Piece.whole("extra:step", n, torch.tensor(11.0)) for n in shapes),
        Piece.whole("extra:row", "head", torch.randn(2, 1, generator=g)),
    ]
    return Job(params, states, whole)
