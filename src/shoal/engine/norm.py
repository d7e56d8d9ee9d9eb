"""The global norm of gradients, with the same bits under every cut.

A parameter's sum of squares is a tree over its elements: pairs within aligned blocks first, blocks after. Every piece
reduces to a few nodes of that tree, which travel; sums over parameters are taken in the model's order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.comm.group import Group
from shoal.comm.meter import Meter
from shoal.engine.unit import Unit
from shoal.layout import ALIGN
from shoal.leaves import Node, Tree

CHUNK = 4096
"""Blocks that are squared at a time: a power of two that stays in cache."""

_NODE = struct.Struct("<iqqd")  # parameter, level, place, value


def squares(flat: Tensor, start: int) -> dict[Node, float]:
    """Sums of squares of what begins at element `start` of a parameter, as nodes of the tree over its blocks."""
    if flat.is_meta:  # a dry run: what counts is how many nodes there are
        flat = torch.zeros(flat.shape)
    nodes: dict[Node, float] = {}
    at, numel = 0, flat.numel()
    while at < numel:
        block = (start + at) // ALIGN
        take = min((CHUNK - block % CHUNK) * ALIGN, numel - at)
        part = flat[at : at + take]
        if take % ALIGN:
            part = torch.nn.functional.pad(part, (0, -take % ALIGN))
        if part.is_complex():
            part = torch.view_as_real(part).reshape(part.numel(), 2)
            rows = part.double().square()
            rows = (rows[:, 0] + rows[:, 1]).view(-1, ALIGN)
        else:
            rows = part.double().square().view(-1, ALIGN)
        while rows.shape[1] > 1:
            half = rows.shape[1] // 2
            rows = rows[:, :half] + rows[:, half:]
        _pair_up(rows.view(-1), block, nodes)
        at += take
    return nodes


def count_nodes(start: int, stop: int) -> int:
    """How many nodes `squares` makes of elements `start:stop` of a parameter."""
    found = 0
    first, end = start // ALIGN, -(-stop // ALIGN)
    while first < end:
        last = min(end, (first // CHUNK + 1) * CHUNK)
        a, b = first, last
        while a < b:
            found += a % 2 + (b - a - a % 2) % 2
            a, b = (a + a % 2) // 2, (b - (b - a - a % 2) % 2) // 2
        first = last
    return found


def _pair_up(values: Tensor, first: int, nodes: dict[Node, float]) -> None:
    level = 0
    while values.numel():
        if first % 2:
            nodes[Node(level, first)] = values[0].item()
            values, first = values[1:], first + 1
        if values.numel() % 2:
            nodes[Node(level, first + values.numel() - 1)] = values[-1].item()
            values = values[:-1]
        values, first, level = values[0::2] + values[1::2], first // 2, level + 1


def global_norm(units: Sequence[Unit], order: Mapping[str, int], shard: Group) -> float:
    """The 2-norm of all gradients of the step, equal on all ranks.

    Args:
        units: with the step's gradients in their pieces.
        order: parameter names and their places in the model.
        shard: the ranks that hold the other pieces.
    """
    found: list[tuple[int, Node, float]] = []
    sizes: dict[int, int] = {}
    for unit in units:
        for s in unit.layout.spans:
            sizes[order[s.name]] = max(1, -(-s.numel // ALIGN))
        for p in unit.layout.pieces(shard.rank):
            grad = unit.pieces[p.name].grad
            if grad is not None:
                found += [(order[p.name], n, v) for n, v in squares(grad.reshape(-1), p.start).items()]
    packed = b"".join(_NODE.pack(i, n.level, n.place, v) for i, n, v in found)
    most = max(sum(count_nodes(p.start, p.stop) for u in units for p in u.layout.pieces(r)) for r in range(shard.size))
    packed = len(found).to_bytes(8, "little") + packed.ljust(most * _NODE.size, b"\0")
    trees: dict[int, Tree[float]] = {}
    told = shard.share("norm", packed)
    if isinstance(shard.carrier, Meter) and shard.carrier.size > 1:
        return 0.0
    for data in told:
        end = 8 + int.from_bytes(data[:8], "little") * _NODE.size
        for i, level, place, value in _NODE.iter_unpack(data[8:end]):
            if i not in trees:
                trees[i] = Tree(sizes[i], lambda a, b: a + b)
            trees[i].put(Node(level, place), value)
    total = 0.0
    for i in sorted(trees):
        total += trees[i].take()
    return math.sqrt(total)
