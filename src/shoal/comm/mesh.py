"""The grid of ranks. Every group is a named axis of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.comm.group import Carrier, Group


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks as copies x ranks_per_copy x tensor.

    A *cell* is the ranks that compute one leaf together, one rank unless `tensor` is more;
    rank = cell * tensor + place in the cell, cell = copy * ranks_per_copy + place in the copy.

    `shard`: those with this place in the cells of one copy. `copies`: those with this place in every copy. `data`:
    those with this place in all cells. `tensor`: the ranks of one cell. `copy`: all ranks of one copy. `world`: all.
    """

    world: Group
    shard: Group
    copies: Group
    data: Group
    tensor: Group
    copy: Group

    @classmethod
    def of(cls, carrier: Carrier, ranks_per_copy: int, tensor: int = 1) -> Mesh:
        cell, lane = divmod(carrier.rank, tensor)
        cells = carrier.size // tensor
        number, place = divmod(cell, ranks_per_copy)
        first = number * ranks_per_copy
        inside = range(first, first + ranks_per_copy)
        return cls(
            world=Group("world", range(carrier.size), carrier),
            shard=Group("shard", [c * tensor + lane for c in inside], carrier),
            copies=Group("copies", [c * tensor + lane for c in range(place, cells, ranks_per_copy)], carrier),
            data=Group("data", [c * tensor + lane for c in range(cells)], carrier),
            tensor=Group("tensor", range(cell * tensor, (cell + 1) * tensor), carrier),
            copy=Group("copy", range(first * tensor, (first + ranks_per_copy) * tensor), carrier),
        )

    @property
    def cell(self) -> int:
        """This rank's cell."""
        return self.data.rank

    @property
    def cells(self) -> int:
        """How many there are."""
        return self.data.size

    def cell_of(self, rank: int) -> int:
        """The cell of any rank of the world."""
        return rank // self.tensor.size

    def again(self, number: int) -> Mesh:
        """The same grid for another model: what travels for one never meets what travels for the other."""

        def twin(group: Group) -> Group:
            return Group(f"{group.name}{number}", group.ranks, group.carrier)

        axes = {name: twin(getattr(self, name)) for name in ("shard", "copies", "data", "tensor", "copy")}
        return replace(self, **axes)
