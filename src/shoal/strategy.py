"""The user's words for how a model is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Literal, cast

from shoal.errors import StrategyError, nearest


class Shard(IntEnum):
    """What the ranks of one copy divide among them. Each level includes those above it."""

    NOTHING = 0
    OPTIMIZER = 1  # ZeRO-1
    GRADIENTS = 2  # ZeRO-2
    PARAMETERS = 3  # ZeRO-3


class Cut(Enum):
    """Where shards may end."""

    EVEN = "even"  # anywhere the optimizer allows
    PARAMETER = "parameter"  # between parameters only (layer-wise)


PRECISIONS = ("float32", "bfloat16", "float16")
REDUCTIONS = ("float32", "bfloat16")
NUMERICS = ("exact", "fast")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How to train: what is wanted, not how it happens. `rules.rules` says what happens when.

    The ranks form a grid, copies x ranks_per_copy. One rank per copy is data parallelism, one copy is ZeRO, between
    them lies hybrid sharding.

    Args:
        shard: what the ranks of one copy divide among them.
        ranks_per_copy: ranks that hold one model together. None: the world, or 1 if nothing is sharded; "host": the
            ranks of one host.
        tensor: ranks that compute one leaf together, joined by torch's tensor parallelism, which has made DTensors of
            the model's parameters before `prepare`. Nothing else than that is divided inside such a cell.
        leaves: micro-batches of one step, whoever computes them. None: the world at first start (its cells).
        twig: so many neighbouring leaves are added in place, one after the other, before the tree: fewer buffers and
            less traffic, no finer division of work. Part of the numbers.
        precision: "float32" computes in the model's own dtypes; "bfloat16" and "float16" compute float32 parameters in
            that dtype and keep float32 masters for the update; "float16" scales losses.
        masters: False, with bfloat16 only: no float32 masters; updates are rounded stochastically.
        reduce: the dtype in which gradients travel and are summed (wider parameters keep their own).
        cut: where shards may end.
        numerics: "exact": the same bits in every strategy and world; "fast" gives that up: the backend adds up
            gradients in an order of its own (gloo's all-reduce, NCCL's rings and NVLS).

    Raises:
        StrategyError: a combination that cannot be, with the nearest one that can.
    """

    shard: Shard = Shard.NOTHING
    ranks_per_copy: int | Literal["host"] | None = None
    tensor: int = 1
    leaves: int | None = None
    twig: int = 1
    precision: str = "float32"
    masters: bool = True
    reduce: str = "float32"
    cut: Cut = Cut.EVEN
    numerics: str = "exact"

    def __post_init__(self) -> None:
        ranks = cast(object, self.ranks_per_copy)  # whatever the user gave
        if ranks not in (None, "host") and (not isinstance(ranks, int) or ranks < 1):
            raise StrategyError(f"ranks_per_copy={ranks!r}", remedy='a number of at least 1, None or "host"')
        if self.shard is Shard.NOTHING and ranks not in (None, 1):
            raise StrategyError(
                f"ranks_per_copy={ranks!r} but nothing is sharded",
                remedy="shard=Shard.OPTIMIZER or more, or ranks_per_copy=1 for data parallelism",
            )
        if self.leaves is not None and self.leaves < 1:
            raise StrategyError(f"leaves={self.leaves}: a step has at least one leaf", remedy="leaves=1")
        if self.tensor < 1 or (self.tensor > 1 and self.shard is Shard.PARAMETERS):
            raise StrategyError(
                f"tensor={self.tensor} with shard={self.shard.name}",
                cause="DTensors stay where they are; optimizer state and gradients can be cut across cells",
                remedy="shard=Shard.GRADIENTS or less, and tensor of at least 1",
            )
        if self.twig < 1:
            raise StrategyError(f"twig={self.twig}: a twig has at least one leaf", remedy="twig=1")
        for field, known in (("precision", PRECISIONS), ("reduce", REDUCTIONS), ("numerics", NUMERICS)):
            value = str(getattr(self, field))
            if value not in known:
                raise StrategyError(f"{field}={value!r} is not known", remedy=nearest(value, known))
        if self.tensor > 1 and self.numerics == "fast":
            raise StrategyError(
                f'numerics="fast" with tensor={self.tensor}',
                cause="what every rank of a cell has must stay equal bit by bit, and each adds it up with others",
                remedy='numerics="exact", or tensor=1',
            )
        if not self.masters and self.precision != "bfloat16":
            raise StrategyError(
                f"masters=False with precision={self.precision!r}",
                cause="only bfloat16 is rounded stochastically; float16 has too small a range for weights",
                remedy='precision="bfloat16", or masters=True',
            )

    @classmethod
    def named(cls, name: str) -> Strategy:
        """The strategy of that name: ddp, zero1, zero2, zero3 or hybrid."""
        if name not in NAMED:
            raise StrategyError(f"there is no strategy {name!r}", remedy=nearest(name, NAMED))
        return NAMED[name]

    @property
    def name(self) -> str:
        """The shortest name that fits; `hybrid` where a copy is the ranks of one host."""
        if self.shard is Shard.PARAMETERS and self.ranks_per_copy == "host":
            return "hybrid"
        return {Shard.NOTHING: "ddp", Shard.OPTIMIZER: "zero1", Shard.GRADIENTS: "zero2", Shard.PARAMETERS: "zero3"}[
            self.shard
        ]

    def settled(self, world: int, local_world: int) -> Strategy:
        """The same with nothing left open, for a job of `world` ranks, `local_world` of them on each host.

        Raises:
            StrategyError: `world` does not divide into copies.
        """
        if world % self.tensor:
            near = max(n for n in range(1, min(self.tensor, world) + 1) if world % n == 0)
            raise StrategyError(f"a world of {world} ranks has no cells of {self.tensor}", remedy=f"tensor={near}")
        world, local_world = world // self.tensor, local_world // self.tensor  # from here on: cells
        ranks = self.ranks_per_copy
        if ranks is None:
            ranks = 1 if self.shard is Shard.NOTHING else world
        if ranks == "host":
            ranks = local_world
        if world % ranks:
            near = max(n for n in range(1, min(ranks, world) + 1) if world % n == 0)
            raise StrategyError(
                f"a world of {world} ranks does not divide into copies of {ranks}",
                remedy=f"ranks_per_copy={near}, or a world that is a multiple of {ranks}",
            )
        return replace(self, ranks_per_copy=ranks, leaves=self.leaves or world)

    def explain(self) -> str:
        """The table of rules: what happens to a unit's parameters and gradients, and when."""
        from shoal.rules import explain

        return explain(self)


NAMED: dict[str, Strategy] = {
    "ddp": Strategy(),
    "zero1": Strategy(shard=Shard.OPTIMIZER),
    "zero2": Strategy(shard=Shard.GRADIENTS),
    "zero3": Strategy(shard=Shard.PARAMETERS),
    "hybrid": Strategy(shard=Shard.PARAMETERS, ranks_per_copy="host"),
}
