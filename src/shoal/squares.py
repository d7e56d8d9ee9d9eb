"""Sums of squares with the same bits under every cut.

A parameter's sum of squares is a tree over its elements: pairs within aligned blocks first, blocks after. A piece of it
reduces to a few nodes of that tree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.layout import ALIGN
from shoal.leaves import Node, Tree

CHUNK = 4096
"""Blocks that are squared at a time: a power of two that stays in cache."""


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


def add_up(nodes: dict[Node, float], numel: int) -> float:
    """The whole sum, from the nodes of all pieces of a parameter of `numel` elements."""
    tree: Tree[float] = Tree(max(1, -(-numel // ALIGN)), lambda a, b: a + b)
    for node, value in nodes.items():
        tree.put(node, value)
    return tree.take() if nodes else 0.0
