"""The grid of ranks. Every group is a named axis of it."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.comm.group import Carrier, Group


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks as copies x ranks_per_copy; rank = copy * ranks_per_copy + place in the copy.

    `shard`: the ranks of one copy. `copies`: those with the same place in every copy. `world`: all.
    """

    world: Group
    shard: Group
    copies: Group

    @classmethod
    def of(cls, carrier: Carrier, ranks_per_copy: int) -> Mesh:
        copy, place = divmod(carrier.rank, ranks_per_copy)
        first = copy * ranks_per_copy
        return cls(
            world=Group("world", range(carrier.size), carrier),
            shard=Group("shard", range(first, first + ranks_per_copy), carrier),
            copies=Group("copies", range(place, carrier.size, ranks_per_copy), carrier),
        )

    def again(self, number: int) -> Mesh:
        """The same grid for another model: what travels for one never meets what travels for the other."""
        shard, copies = (Group(f"{g.name}{number}", g.ranks, g.carrier) for g in (self.shard, self.copies))
        return Mesh(self.world, shard, copies)
