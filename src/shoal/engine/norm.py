"""Norms over shards, with the same bits under every cut: of all gradients, and of single parameters.

Every piece reduces to a few nodes of its parameter's tree of squares, which travel; sums over parameters are taken in
the model's order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

from torch import Tensor

from shoal.comm.group import Group
from shoal.comm.mesh import Mesh
from shoal.comm.meter import Meter
from shoal.engine.unit import Unit
from shoal.leaves import Node
from shoal.squares import add_up, count_nodes, squares

_NODE = struct.Struct("<iqqd")  # parameter, level, place, value
_PART = struct.Struct("<iiqqd")  # parameter, which of its tensors, level, place, value


def global_norm(units: Sequence[Unit], order: Mapping[str, int], mesh: Mesh) -> float:
    """The 2-norm of all gradients of the step, equal on all ranks.

    Args:
        units: with the step's gradients in their pieces.
        order: parameter names and their places in the model.
        mesh: the ranks of a copy hold the other pieces, and other boxes of what is spread over a cell.
    """
    group, lanes, lane = mesh.copy, mesh.tensor.size, mesh.tensor.rank
    found: list[tuple[int, Node, float]] = []
    sizes: dict[int, int] = {}
    for unit in units:
        for s in unit.layout.spans:
            sizes |= {order[s.name] * lanes + other: s.numel for other in range(lanes)}
        for p in unit.layout.pieces(mesh.shard.rank):
            grad = unit.pieces[p.name].grad
            spread = p.name in unit.spread
            if grad is not None and (spread or lane == 0):  # what all ranks of a cell hold counts once
                key = order[p.name] * lanes + lane
                found += [(key, n, v) for n, v in squares(grad.reshape(-1), p.start).items()]
    packed = b"".join(_NODE.pack(i, n.level, n.place, v) for i, n, v in found)
    parts_of = range(mesh.shard.size)
    most = max(sum(count_nodes(p.start, p.stop) for u in units for p in u.layout.pieces(r)) for r in parts_of)
    packed = len(found).to_bytes(8, "little") + packed.ljust(most * _NODE.size, b"\0")
    told = group.share("norm", packed)
    if isinstance(group.carrier, Meter) and group.carrier.size > 1:
        return 0.0
    parts: dict[int, dict[Node, float]] = {}
    for data in told:
        end = 8 + int.from_bytes(data[:8], "little") * _NODE.size
        for i, level, place, value in _NODE.iter_unpack(data[8:end]):
            parts.setdefault(i, {})[Node(level, place)] = value
    total = 0.0
    for i in sorted(parts):
        total += add_up(parts[i], sizes[i])
    return math.sqrt(total)


def norms(
    units: Sequence[Unit], order: Mapping[str, int], shard: Group, values: Mapping[Tensor, Sequence[Tensor]]
) -> dict[Tensor, list[float]]:
    """The 2-norms of whole tensors of which every rank has pieces. Collective.

    Args:
        units: whose pieces they belong to.
        order: parameter names and their places in the model.
        shard: the ranks that hold the other pieces.
        values: per piece some tensors, cut as it is; as many for every piece of a parameter.
    """
    mine: list[tuple[int, int, Node, float]] = []
    about: dict[tuple[int, int], int] = {}
    for unit in units:
        for p in unit.layout.pieces(shard.rank):
            for which, tensor in enumerate(values.get(unit.pieces[p.name], ())):
                about[order[p.name], which] = p.box.numel
                found = squares(tensor.reshape(-1), p.start).items()
                mine += [(order[p.name], which, n, v) for n, v in found]
    packed = b"".join(_PART.pack(i, which, n.level, n.place, v) for i, which, n, v in mine)
    parts: dict[tuple[int, int], dict[Node, float]] = {}
    for data in shard.share_any("norm", packed):
        for i, which, level, place, value in _PART.iter_unpack(data):
            parts.setdefault((i, which), {})[Node(level, place)] = value
    dry = isinstance(shard.carrier, Meter) and shard.carrier.size > 1
    names: dict[Tensor, int] = {
        unit.pieces[p.name]: order[p.name] for unit in units for p in unit.layout.pieces(shard.rank)
    }
    return {
        piece: [
            1.0 if dry else math.sqrt(add_up(parts.get((names[piece], k), {}), about[names[piece], k]))
            for k in range(len(tensors))
        ]
        for piece, tensors in values.items()
    }
