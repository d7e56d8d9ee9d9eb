"""What groups promise, over threads and over gloo."""

from __future__ import annotations

import pytest
import torch

from shoal.comm.group import Group
from shoal.comm.levels import Levels
from shoal.comm.mesh import Mesh
from shoal.comm.meter import Meter
from shoal.errors import OrderError, StalledError
from tests.comm.carriers import KINDS, TIMEOUT, joined, on, world_of
from tests.pool import Pool

on_every_carrier = pytest.mark.parametrize("kind", KINDS)


def filled(count: int, value: float) -> torch.Tensor:
    return torch.full((count,), float(value))


def swap() -> tuple[list[list[float]], list[float]]:
    """Rank r sends r + 1 tensors to each other rank: 3, 0, 2 elements long; the empty one does not travel."""
    with joined() as carrier:
        world = world_of(carrier)
        me, sizes = world.rank, (3, 0, 2)
        own = filled(3, -1)
        sends = [[[filled(sizes[i], 10 * me + i) for i in range(me + 1)]] for _ in range(3)]
        receives = [[filled(sizes[i], -1) for i in range(r + 1)] for r in range(3)]
        receives[me] = [own]
        world.swap("swap", sends, [[boxes] for boxes in receives]).wait()
        got = [torch.cat(boxes).tolist() for r, boxes in enumerate(receives) if r != me]
        return got, own.tolist()


@on_every_carrier
def test_swap(kind: str, pool: Pool) -> None:
    from_rank = {0: [0.0] * 3, 1: [10.0] * 3, 2: [20.0] * 3 + [22.0] * 2}
    for me, (got, own) in enumerate(on(kind, pool, swap, world=3)):
        assert got == [from_rank[r] for r in range(3) if r != me]
        assert own == [-1.0] * 3  # what is for oneself is left alone


def gather(bounds: list[int]) -> list[float]:
    with joined() as carrier:
        world = world_of(carrier)
        flat = filled(bounds[-1], -1)
        flat[bounds[world.rank] : bounds[world.rank + 1]] = world.rank
        world.gather("gather", flat, bounds).wait()
        return flat.tolist()


@on_every_carrier
@pytest.mark.parametrize("bounds", [[0, 2, 2, 5], [0, 0, 0, 4], [0, 0, 0, 0]])
def test_gather_of_unequal_parts(kind: str, bounds: list[int], pool: Pool) -> None:
    want = [float(r) for r in range(3) for _ in range(bounds[r], bounds[r + 1])]
    assert on(kind, pool, gather, bounds, world=3) == [want] * 3


def share() -> tuple[list[bytes], list[bytes], list[bytes], list[bytes]]:
    with joined() as carrier:
        world = world_of(carrier)
        mine = bytes([world.rank + 65])
        return (
            world.share("equal", mine * 4),
            world.share("empty", b""),
            world.share_any("any", mine * 100 * world.rank),
            world.share_any("nothing", b""),
        )


@on_every_carrier
def test_share(kind: str, pool: Pool) -> None:
    want = ([b"AAAA", b"BBBB", b"CCCC"], [b""] * 3, [b"", b"B" * 100, b"C" * 200], [b""] * 3)
    assert on(kind, pool, share, world=3) == [want] * 3


def many_under_way() -> tuple[float, float]:
    """The later one is waited for first; equal names and sizes do not mix."""
    with joined() as carrier:
        world = world_of(carrier)
        boxes = [filled(1000, -1) for _ in range(2)]
        pending = [
            world.swap("same", [[[filled(1000, 10 * n + world.rank)]]] * 2, [[[box]], [[box]]])
            for n, box in enumerate(boxes)
        ]
        for transfer in reversed(pending):
            transfer.wait()
            transfer.wait()  # nothing more to wait for
        return boxes[0].mean().item(), boxes[1].mean().item()


@on_every_carrier
def test_several_transfers_under_way(kind: str, pool: Pool) -> None:
    assert on(kind, pool, many_under_way) == [(1.0, 11.0), (0.0, 10.0)]


def axes() -> tuple[list[bytes], list[bytes]]:
    """2 copies x 2: both axes at once, each with its own count."""
    with joined() as carrier:
        mesh = Mesh.of(carrier, 2)
        mine = str(carrier.rank).encode()
        for _ in range(carrier.rank // 2):
            mesh.shard.share("more", mine)  # copies do different numbers of things
        return mesh.shard.share("same", mine), mesh.copies.share("same", mine)


@on_every_carrier
def test_axes_of_a_mesh(kind: str, pool: Pool) -> None:
    shards, copies = ([b"0", b"1"], [b"2", b"3"]), ([b"0", b"2"], [b"1", b"3"])
    assert on(kind, pool, axes, world=4) == [(shards[r // 2], copies[r % 2]) for r in range(4)]


def sent() -> dict[str, int]:
    with joined() as carrier:
        world = world_of(carrier)
        world.gather("gather", filled(7, 0), [0, 2, 7]).wait()
        world.share("meet", b"12345")
        world.share_any("plan", b"1" * (3 + world.rank))
        return dict(carrier.sent)


@on_every_carrier
def test_bytes_are_counted(kind: str, pool: Pool) -> None:
    assert on(kind, pool, sent) == [{"gather": g, "meet": 5, "plan": 8 + 4} for g in (8, 20)]


def test_a_group_of_one_sends_nothing() -> None:
    alone = Meter(0, 1)
    group = Group("shard", [0], alone)
    flat = filled(3, 1)
    group.gather("gather", flat, [0, 3]).wait()
    assert group.share("meet", b"x") == group.share_any("plan", b"x") == [b"x"]
    assert not alone.sent


# ---------------------------------------------------------------- what does not match


def unequal(how: str) -> None:
    with joined(TIMEOUT) as carrier:
        world = world_of(carrier)
        count = 1000 + 500 * (carrier.rank if how == "longer" else -carrier.rank if how == "shorter" else 0)
        mine = filled(count, 1) if how != "dtype" or carrier.rank == 0 else torch.ones(count, dtype=torch.int32)
        world.share("before", b"all is well")
        label = "other" if how == "label" and carrier.rank else "swap"
        world.swap(label, [[[mine]]] * 2, [[[torch.empty_like(mine)]]] * 2).wait()


def test_what_does_not_match_is_never_delivered(pool: Pool) -> None:
    """Over gloo a longer message kills the receiver, a shorter one or another dtype passes silently."""
    ways = ("longer", "shorter", "dtype", "label")
    for how, running in [(how, pool.start(unequal, how)) for how in ways]:
        other = "other" if how == "label" else "swap"
        marks = f"    rank 0 waits in 'swap world #2' (starts)\n    rank 1 waits in '{other} world #2' (starts)"
        for result in running.results(TIMEOUT + 5, grace=2):
            assert isinstance(result.exception, StalledError), result.error
            assert marks in result.exception.what


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("longer", r"swap world #2: \[\(1500, .*\)\] came, \[\(1000, .*\)\] expected"),
        ("shorter", r"swap world #2: \[\(500, .*\)\] came, \[\(1000, .*\)\] expected"),
        ("dtype", r"swap world #2: \[\(1000, torch.int32\)\] came, \[\(1000, torch.float32\)\] expected"),
    ],
)
def test_what_does_not_match_on_threads(how: str, text: str, pool: Pool) -> None:
    with pytest.raises(AssertionError, match=text):
        on("threads", pool, unequal, how)


class PassOn:
    """What came from rank 1 goes back to it, whatever rank 0 waits for then."""

    def __init__(self, world: Group, levels: Levels) -> None:
        self.world, self.levels = world, levels
        self.word = torch.zeros(1)
        self.coming = world.swap("to", [[], []], [[], [[self.word]]], "0")
        levels.errands.append(self)

    def go_on(self) -> None:
        if self in self.levels.errands and self.coming.ready():
            self.levels.errands.remove(self)
            self.coming.wait()
            self.world.swap("back", [[], [[self.word + 1]]], [[], []], "to 1").wait()


def there_and_back() -> float:
    with joined() as carrier:
        world, word, last = world_of(carrier), torch.ones(1), torch.zeros(1)
        if world.rank == 0:
            PassOn(world, carrier.levels)
            world.swap("last", [[], []], [[], [[last]]], "word").wait()
        else:
            sent = world.swap("to", [[[word]], []], [[], []], "0")
            world.swap("back", [[], []], [[[last]], []], "to 1").wait()
            sent.wait()
            world.swap("last", [[[last]], []], [[], []], "word").wait()
        return last.item()


@on_every_carrier
def test_whatever_a_rank_waits_for_it_does_its_errands(kind: str, pool: Pool) -> None:
    assert on(kind, pool, there_and_back) == [2.0, 2.0]


def too_late() -> None:
    with joined() as carrier:
        world = world_of(carrier)
    world.share("meet", b"x")


@on_every_carrier
def test_nothing_is_exchanged_after_the_end(kind: str, pool: Pool) -> None:
    with pytest.raises(OrderError) as caught:
        on(kind, pool, too_late)
    assert str(caught.value) == (
        "shoal[E22] the job is closed: ranks exchange nothing any more\n"
        "  try:   do this before job.close(), or inside `with shoal.init(...) as job:`"
    )
