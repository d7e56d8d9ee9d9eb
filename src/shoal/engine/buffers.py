"""Buffers that a forward changes, such as running statistics: every leaf starts from the step's, and they are averaged.

Floating buffers become the weighted mean of the leaves' results; integer and bool ones take the last leaf's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from shoal.comm.group import Group
from shoal.comm.pool import Pool
from shoal.engine.exchange import agree, finished
from shoal.engine.sums import Sum, drain, even_bounds, new_tree
from shoal.engine.turns import Turns
from shoal.leaves import Weighed

Place = tuple[nn.Module, str]


class Buffers:
    """The buffers of one model through one step after another.

    Args:
        model: whose buffers; they stay the user's own tensors.
        world: all ranks.
    """

    def __init__(self, model: nn.Module, world: Group) -> None:
        self.model, self.world, self.pool = model, world, Pool()
        self.places: list[Place] = []
        seen: set[int] = set()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    self.places.append((module, name))
        self.start: list[Tensor] = []
        self.stamps: list[tuple[int, int]] = []
        self.changed = False
        self.leaves: dict[int, tuple[float, list[Tensor]]] = {}

    def now(self) -> list[Tensor]:
        found = (cast("Tensor | None", getattr(module, name)) for module, name in self.places)
        return [b for b in found if b is not None]

    def _stamps(self) -> list[tuple[int, int]]:
        return [(id(b), b._version) for b in self.now()]

    def begin(self, *, first: bool) -> None:
        """A leaf begins; `first` of this step on this rank: what is there now is where all leaves start."""
        if first and self._stamps() != self.stamps:
            self.start = [b.clone() for b in self.now()]
            self.stamps = self._stamps()

    def end(self, number: int | None, weight: float) -> None:
        """A leaf is over: keep what it made of the buffers (None: drop it) and go back to the start."""
        if self._stamps() == self.stamps:
            return
        self.changed = True
        if number is not None and weight:
            self.leaves[number] = (weight, [b.clone() for b in self.now()])
        self._set(self.start)

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self.now(), values, strict=True):
                buffer.copy_(value)
        self.stamps = self._stamps()

    def settle(self, turns: Turns) -> None:
        """The step is over and some rank's buffers changed: everybody gets the same new ones. Collective."""
        rank, leaves = self.world.rank, turns.leaves
        results = {n: values for n, (_, values) in self.leaves.items()}
        values = [b.clone() for b in self.start]
        for wide in (False, True):
            at = [i for i, b in enumerate(values) if _floats(b) and (b.dtype == torch.float64) == wide]
            if at:
                self._average(at, wide, values, results, turns, rank, leaves)
        self._take_last(values, results, turns)
        self._set(values)
        self.start, self.changed = values, False
        self.leaves.clear()

    def _average(
        self, at: Sequence[int], wide: bool, values: list[Tensor], results: dict[int, list[Tensor]],
        turns: Turns, rank: int, leaves: int,
    ) -> None:  # fmt: skip
        dtype = torch.float64 if wide else torch.float32
        tree = new_tree(leaves)
        for leaf in turns.assignment[rank]:
            weight = turns.weights[leaf]
            made = results.get(leaf, self.start)  # a leaf that changed nothing ends where it began
            flat = torch.cat([made[i].reshape(-1).to(dtype) for i in at]) if weight else None
            tree.put_leaf(leaf, Weighed(None) if flat is None else Weighed(Sum([flat]), weight))
        numel = sum(values[i].numel() for i in at)
        theirs = [turns.rank_holds(r) for r in range(self.world.size)]
        like = torch.empty(0, dtype=dtype, device=values[at[0]].device)
        bounds = even_bounds(0, numel, self.world.size)
        runs = [(0, numel)]
        mean = finished(
            agree(self.world, bounds, runs, drain(tree), theirs, turns.total, leaves, self.pool, like)
        )  # fmt: skip
        if mean.strips is not None:
            for i, part in zip(at, _split(mean.strips[0], [values[i].numel() for i in at]), strict=True):
                values[i] = part.view(values[i].shape).to(values[i].dtype).clone()
            if mean.flat is not None:
                self.pool.give(mean.flat)

    def _take_last(self, values: list[Tensor], results: dict[int, list[Tensor]], turns: Turns) -> None:
        at = [i for i, b in enumerate(values) if not _floats(b)]
        weighing = [leaf for leaf, weight in turns.weights.items() if weight]
        if not at or not weighing:
            return
        last = max(weighing)
        owner = next(r for r, mine in enumerate(turns.assignment) if last in mine)
        made = results.get(last, self.start)
        mine = b"".join(_bytes(made[i]) for i in at)
        data = torch.frombuffer(bytearray(self.world.share("buffers", mine)[owner]), dtype=torch.uint8)
        for i, part in zip(at, _split(data, [values[i].nbytes for i in at]), strict=True):
            values[i] = part.clone().view(values[i].dtype).view(values[i].shape).to(values[i].device)


def _bytes(b: Tensor) -> bytes:
    if b.is_meta:
        return bytes(b.nbytes)
    return b.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()


def _split(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(torch.split(flat, sizes))


def _floats(b: Tensor) -> bool:
    return b.dtype.is_floating_point or b.dtype.is_complex
