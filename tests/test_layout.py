"""Where elements live, checked element by element against numpy."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from shoal.layout import ALIGN, Box, Interval, Item, Layout, Move, Span, moves

ODD = [Item("w", (65, 3)), Item("b", (7,)), Item("s", ()), Item("none", (0, 4)), Item("e", (2, 64)), Item("h", (129,))]


def line(owners: int, numel: int = 20) -> list[Interval]:
    """One parameter in pieces of nearly equal size."""
    cuts = [numel * r // owners for r in range(owners + 1)]
    return [Interval("w", (numel,), Box.whole((numel,)), a, b, r, 0) for r, (a, b) in enumerate(pairwise(cuts))]


def arrays(pieces: Iterable[Interval]) -> dict[str, np.ndarray]:
    """Every parameter in `pieces`, all elements of all parameters different."""
    found: dict[str, np.ndarray] = {}
    for p in pieces:
        if p.name not in found:
            found[p.name] = (np.arange(math.prod(p.shape)) + 1000 * len(found)).reshape(p.shape)
    return found


def elements(piece: Interval, array: np.ndarray) -> list[int]:
    inside = tuple(slice(o, o + n) for o, n in zip(piece.box.offset, piece.box.size, strict=True))
    return array[inside].reshape(-1)[piece.start : piece.stop].tolist()


def shards(pieces: Sequence[Interval], values: dict[str, np.ndarray] | None) -> dict[int, list[int]]:
    """What every owner holds; -1 where nothing is, and everywhere if there are no values."""
    held: dict[int, list[int]] = {}
    for p in pieces:
        shard = held.setdefault(p.owner, [])
        shard.extend([-1] * (p.at + p.numel - len(shard)))
        if values is not None:
            shard[p.at : p.at + p.numel] = elements(p, values[p.name])
    return held


def check_moves(old: Sequence[Interval], new: Sequence[Interval]) -> list[Move]:
    """Run them, and compare every element. Returns them."""
    values = arrays(old)
    sources, targets, done = shards(old, values), shards(new, None), list(moves(old, new))
    for m in done:
        assert m.numel > 0
        assert set(targets[m.dst][m.dst_at : m.dst_at + m.numel]) == {-1}, "an element moved twice"
        targets[m.dst][m.dst_at : m.dst_at + m.numel] = sources[m.src][m.src_at : m.src_at + m.numel]
    assert targets == shards(new, values)
    return done


def check_layout(layout: Layout, items: Iterable[Item]) -> None:
    """What holds for every layout."""
    items = list(items)
    assert sorted((s.name, s.shape, s.granule) for s in layout.spans) == sorted(tuple(i) for i in items)
    assert layout.used == sum(math.prod(i.shape) for i in items)
    assert layout.bounds[0] == 0
    assert list(layout.bounds) == sorted(layout.bounds)
    assert layout.numel % ALIGN == 0
    end = 0
    for span in layout.spans:
        assert span.start % ALIGN == 0
        assert end <= span.start < end + ALIGN
        assert span.box == Box.whole(span.shape)
        end = span.stop
    seen: Counter[tuple[str, int]] = Counter()
    for piece in layout:
        shard, span = layout.shard(piece.owner), next(s for s in layout.spans if s.name == piece.name)
        assert shard.stop - shard.start == layout.shard_numel(piece.owner)
        assert shard.start + piece.at == span.start + piece.start
        assert piece.numel == 0 or piece.at + piece.numel <= layout.shard_numel(piece.owner)
        for edge in (piece.start, piece.stop):
            inner = 0 < edge < span.numel
            assert not inner or (span.granule and edge % span.granule == 0), f"{span} is cut at {edge}"
        seen.update((piece.name, at) for at in range(piece.start, piece.stop))
    assert set(seen.values()) <= {1}
    assert len(seen) == layout.used
    empty = [(p.name, p.owner) for p in layout if p.numel == 0]
    assert empty == [(s.name, 0) for s in layout.spans if s.numel == 0]


def random_items(rng: random.Random) -> list[Item]:
    shapes: list[tuple[int, ...]] = [
        (),
        (0,),
        (1,),
        (3, 0, 2),
        (63,),
        (64,),
        (65,),
        (8, 16),
        (10, 13),
        (300,),
        (2, 3, 5),
    ]
    return [Item(f"p{i}", rng.choice(shapes), rng.choice([64, 1, 7, 128, 0])) for i in range(rng.randrange(7))]


# The even cut


@pytest.mark.parametrize("owners", [1, 2, 3, 4, 5, 8, 40])
def test_the_even_cut_is_even_and_on_granules(owners: int) -> None:
    layout = Layout.even(ODD, owners)
    check_layout(layout, ODD)
    assert layout.owners == owners
    for r, bound in enumerate(layout.bounds):
        assert bound % ALIGN == 0
        assert abs(bound - layout.numel * r / owners) <= ALIGN / 2


def test_the_even_cut_by_hand() -> None:
    layout = Layout.even([Item("a", (100,)), Item("b", (70, 1))], 2)
    assert layout.spans == (
        Span("a", (100,), 0, 64, Box((0,), (100,))),
        Span("b", (70, 1), 128, 64, Box((0, 0), (70, 1))),
    )
    assert layout.bounds == (0, 128, 256)
    assert (layout.numel, layout.used, layout.owners) == (256, 170, 2)
    assert [layout.shard(1), layout.shard_numel(1)] == [slice(128, 256), 128]
    three = Layout.even([Item("a", (100,)), Item("b", (70, 1))], 3)
    a, b = Box((0,), (100,)), Box((0, 0), (70, 1))
    assert three.bounds == (0, 64, 192, 256)
    assert list(three) == [
        Interval("a", (100,), a, 0, 64, 0, 0),
        Interval("a", (100,), a, 64, 100, 1, 0),
        Interval("b", (70, 1), b, 0, 64, 1, 64),
        Interval("b", (70, 1), b, 64, 70, 2, 0),
    ]
    assert list(three.pieces(1)) == list(three)[1:3]
    assert [p.complete for p in three] == [False] * 4
    assert all(p.complete for p in layout)


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (0, 1), (1, 0), (0.25, 0.5, 0.25), (1e-9, 1, 0, 2), (5,)])
def test_unequal_shares(shares: tuple[float, ...]) -> None:
    items = [*ODD, Item("big", (1000, 10))]
    layout = Layout.even(items, len(shares), shares)
    check_layout(layout, items)
    for r in range(len(shares) + 1):
        ideal = layout.numel * sum(shares[:r]) / sum(shares)
        assert abs(layout.bounds[r] - ideal) <= ALIGN / 2 + 1
    for r, share in enumerate(shares):
        assert share or layout.shard_numel(r) == 0
    assert Layout.even(items, 3) == Layout.even(items, 3, (2.5, 2.5, 2.5))


@pytest.mark.parametrize("shares", [(1,), (1, 2, 3), (-1, 2), (0, 0), (math.nan, 1), (math.inf, 1)])
def test_shares_that_cannot_be(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="for 2 owners: give 2 numbers >= 0, not all 0") as caught:
        Layout.even(ODD, 2, shares)
    assert f"shares={list(shares)}" in str(caught.value)


@pytest.mark.parametrize("granule", [1, 7, 64, 100, 256])
def test_cuts_are_on_multiples_of_the_granule_from_each_parameters_start(granule: int) -> None:
    items = [Item("a", (130,), granule), Item("b", (1000,), granule), Item("c", (3,), 64)]
    for owners in (2, 3, 7):
        layout = Layout.even(items, owners)
        check_layout(layout, items)
        for r, bound in enumerate(layout.bounds):
            assert abs(bound - layout.numel * r / owners) <= max(granule, ALIGN)


def test_granule_0_keeps_a_parameter_whole_under_the_even_cut() -> None:
    items = [Item("muon", (50, 50), 0), Item("adam", (5000,)), Item("tail", (10, 9), 0)]
    for owners in (1, 2, 3, 5, 9):
        layout = Layout.even(items, owners)
        check_layout(layout, items)
        assert all(p.complete for p in layout if p.name in ("muon", "tail"))
    near = Layout.even([Item("a", (640,), 0), Item("b", (384,), 0)], 2)
    assert near.bounds == (0, 640, 1024)
    far = Layout.even([Item("a", (1280,), 0), Item("b", (64,), 0)], 3)
    assert far.bounds == (0, 0, 1280, 1344)


def test_more_owners_than_elements() -> None:
    layout = Layout.even([Item("a", (3,)), Item("s", ())], 50)
    check_layout(layout, layout_items := [Item("a", (3,)), Item("s", ())])
    assert layout.owners == 50
    assert sorted(layout.shard_numel(r) for r in range(50)) == [0] * 48 + [64, 64]
    assert len(list(layout)) == len(layout_items)


def test_nothing_at_all() -> None:
    for layout in (Layout.even([], 3), Layout.by_parameter([], 3)):
        assert layout.bounds == (0, 0, 0, 0)
        assert (layout.numel, layout.used, list(layout)) == (0, 0, [])


def test_empty_and_scalar_parameters() -> None:
    items = [Item("e0", (0,)), Item("s", ()), Item("e1", (2, 0)), Item("t", ()), Item("e2", (0, 3))]
    for layout in (Layout.even(items, 2), Layout.by_parameter(items, 2)):
        check_layout(layout, items)
        assert Counter(p.name for p in layout) == Counter(i.name for i in items)
        assert {p.owner for p in layout if p.name in "st"} == {0, 1}
        assert all(p.complete for p in layout)


# The cut on parameter boundaries


@pytest.mark.parametrize("owners", [1, 2, 3, 4, 10])
def test_by_parameter_never_cuts_and_balances(owners: int) -> None:
    rng = random.Random(owners)
    items = [Item(f"p{i}", (rng.randrange(1, 400), rng.randrange(1, 9))) for i in range(25)] + ODD
    layout = Layout.by_parameter(items, owners)
    check_layout(layout, items)
    assert all(p.complete for p in layout)
    used = [sum(p.numel for p in layout.pieces(r)) for r in range(owners)]
    sizes = sorted((math.prod(i.shape) for i in items), reverse=True)
    assert max(used) - min(used) <= sizes[0]
    at_best = max(layout.used / owners, sizes[0])
    assert max(used) <= at_best * 4 / 3  # Graham 1969: largest first


def test_by_parameter_by_hand() -> None:
    items = [Item("a", (10,)), Item("b", (70,)), Item("c", (40,)), Item("d", (40,)), Item("e", (10,))]
    layout = Layout.by_parameter(items, 2)
    assert [s.name for s in layout.spans] == ["a", "b", "e", "c", "d"]
    assert layout.bounds == (0, 256, 384)
    loads = [1000, 0]
    assert {p.owner for p in Layout.by_parameter(items, 2, loads)} == {1}
    assert loads == [1000, 170]
    Layout.by_parameter([Item("f", (840,)), Item("g", (20,))], 2, loads)
    assert loads == [1020, 1010]


def test_the_order_of_a_part_is_that_of_the_items() -> None:
    items = [Item(f"p{i}", (n,)) for i, n in enumerate((1, 5, 3, 5, 1))]
    assert [s.name for s in Layout.by_parameter(items, 1).spans] == [i.name for i in items]


def test_owners_without_a_parameter() -> None:
    layout = Layout.by_parameter([Item("a", (5,)), Item("b", (6,))], 4)
    check_layout(layout, [Item("a", (5,)), Item("b", (6,))])
    assert [layout.shard_numel(r) for r in range(4)] == [64, 64, 0, 0]
    assert [p.name for p in layout] == ["b", "a"]


# Boxes


def test_runs_by_hand() -> None:
    box = Box((1, 2), (2, 3))
    assert box.numel == 6
    assert list(box.runs((4, 10), 0, 6)) == [(12, 0, 3), (22, 3, 3)]
    assert list(box.runs((4, 10), 2, 4)) == [(14, 2, 1), (22, 3, 1)]
    assert list(Box((1, 0), (2, 10)).runs((4, 10), 3, 17)) == [(13, 3, 14)]
    assert list(Box.whole(()).runs((), 0, 1)) == [(0, 0, 1)]
    assert list(Box.whole((4, 10)).runs((4, 10), 5, 5)) == []
    assert list(Box.whole((0, 3)).runs((0, 3), 0, 0)) == []
    assert list(Box((0, 1), (3, 0)).runs((3, 4), 0, 0)) == []


@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (3, 4, 5), (2, 3, 1, 4), (1, 1), (3, 0)])
def test_runs_are_the_elements_in_order_and_as_long_as_can_be(shape: tuple[int, ...]) -> None:
    rng = random.Random(str(shape))
    where = np.arange(math.prod(shape)).reshape(shape)
    for _ in range(200):
        offset = tuple(rng.randint(0, n) for n in shape)
        box = Box(offset, tuple(rng.randint(0, n - o) for o, n in zip(offset, shape, strict=True)))
        start = rng.randint(0, box.numel)
        piece = Interval("w", shape, box, start, rng.randint(start, box.numel), 0, 0)
        runs = list(box.runs(shape, piece.start, piece.stop))
        assert [at + i for at, _, n in runs for i in range(n)] == elements(piece, where)
        assert [local + i for _, local, n in runs for i in range(n)] == list(range(piece.start, piece.stop))
        if box == Box.whole(shape):
            assert len(runs) <= 1


# Moves


def test_the_example() -> None:
    four, three = line(4), line(3)
    assert list(moves(four, three)) == [
        Move(src=0, src_at=0, dst=0, dst_at=0, numel=5),
        Move(src=1, src_at=0, dst=0, dst_at=5, numel=1),
        Move(src=1, src_at=1, dst=1, dst_at=0, numel=4),
        Move(src=2, src_at=0, dst=1, dst_at=4, numel=3),
        Move(src=2, src_at=3, dst=2, dst_at=0, numel=2),
        Move(src=3, src_at=0, dst=2, dst_at=2, numel=5),
    ]
    assert next(moves(four, three)) == Move(src=0, src_at=0, dst=0, dst_at=0, numel=5)


@pytest.mark.parametrize("seed", range(60))
def test_any_layout_to_any_other_and_back(seed: int) -> None:
    rng = random.Random(seed)
    items = random_items(rng)
    layouts = [
        Layout.even(items, rng.randint(1, 9)),
        Layout.even([i._replace(granule=1) for i in items], 4, [rng.random() for _ in range(4)]),
        Layout.by_parameter(items, rng.randint(1, 9)),
        Layout.even(items, 200),
    ]
    for layout, of in zip(layouts, (items, [i._replace(granule=1) for i in items], items, items), strict=True):
        check_layout(layout, of)
    for old in layouts:
        for new in layouts:
            check_moves(list(old), list(new))


def test_a_layout_onto_itself_moves_every_piece_once() -> None:
    layout = Layout.even(ODD, 3)
    pieces = [p for p in layout if p.numel]
    assert list(moves(layout, layout)) == [Move(p.owner, p.at, p.owner, p.at, p.numel) for p in pieces]


def test_any_part_in_any_order() -> None:
    old = list(Layout.even(ODD, 3))
    new = list(Layout.even(ODD, 5))
    random.Random(1).shuffle(new)
    check_moves(old[::-1], new)
    check_moves(old, [p for p in new if p.owner == 2])
    check_moves(old, [])


def random_boxes(rng: random.Random, shape: tuple[int, ...]) -> list[Box]:
    """A grid of boxes that together are the whole."""
    boxes = [Box((), ())]
    for n in shape:
        cuts = sorted({0, n, *(rng.randint(0, n) for _ in range(rng.randrange(3)))})
        edges = list(pairwise(cuts)) or [(0, 0)]
        boxes = [Box((*b.offset, a), (*b.size, z - a)) for b in boxes for a, z in edges]
    return boxes


def random_pieces(rng: random.Random, shapes: dict[str, tuple[int, ...]]) -> list[Interval]:
    """Boxes, each cut into runs, dealt to owners with gaps between them."""
    pieces: list[Interval] = []
    full: Counter[int] = Counter()
    for name, shape in shapes.items():
        for box in random_boxes(rng, shape):
            cuts = sorted({0, box.numel, *(rng.randint(0, box.numel) for _ in range(rng.randrange(3)))})
            for a, b in pairwise(cuts):
                owner = rng.randrange(4)
                full[owner] += rng.randrange(3)
                pieces.append(Interval(name, shape, box, a, b, owner, full[owner]))
                full[owner] += b - a
    rng.shuffle(pieces)
    return pieces


@pytest.mark.parametrize("seed", range(100))
def test_any_boxes_to_any_others(seed: int) -> None:
    rng = random.Random(seed)
    shapes = {"a": (5, 6), "b": (3, 4, 2), "c": (11,), "d": (), "e": (0, 3), "f": (1, 7, 1)}
    old, new = random_pieces(rng, shapes), random_pieces(rng, shapes)
    check_moves(old, new)


def test_rows_to_columns() -> None:
    rows = [Interval("w", (2, 4), Box((r, 0), (1, 4)), 0, 4, r, 0) for r in range(2)]
    columns = [Interval("w", (2, 4), Box((0, 2 * c), (2, 2)), 0, 4, c, 0) for c in range(2)]
    assert check_moves(rows, columns) == [
        Move(0, 0, 0, 0, 2),
        Move(1, 0, 0, 2, 2),
        Move(0, 2, 1, 0, 2),
        Move(1, 2, 1, 2, 2),
    ]


def test_what_several_hold_is_taken_once() -> None:
    copies = [*line(2), *(Interval(*p[:-2], p[-2] + 2, 3) for p in map(_fields, line(3)))]
    check_moves(copies, line(4))
    assert sum(m.numel for m in moves(copies, line(4))) == 20


def _fields(p: Interval) -> tuple:
    return p.name, p.shape, p.box, p.start, p.stop, p.owner, p.at


@pytest.mark.parametrize(
    ("keep", "told"),
    [([1, 2, 3], "elements 0:6"), ([0, 2, 3], "elements 5:6"), ([0, 1, 2], "elements 15:20"), ([], "elements 0:6")],
)
def test_what_is_nowhere_is_named(keep: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=f"{told} of w are nowhere in the old space"):
        list(moves([line(4)[k] for k in keep], line(3)))


def test_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"w has shape \(20,\) in the old space and \(21,\) in the new"):
        list(moves(line(4), line(3, numel=21)))
    assert list(moves([], [Interval("e", (0,), Box.whole((0,)), 0, 0, 0, 0)])) == []
