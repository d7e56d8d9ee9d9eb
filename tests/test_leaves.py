"""The leaf tree against a recursion that adds the same nodes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from shoal.leaves import Assignment, Node, Tree, Weighed, assign, pending, weigh


def recursive(leaves: int, level: int | None = None, index: int = 0) -> Any:
    """Node (k, j) as nested pairs, straight from its definition."""
    if level is None:
        level = (leaves - 1).bit_length()
    if level == 0:
        return index
    left = recursive(leaves, level - 1, 2 * index)
    if (2 * index + 1) << (level - 1) >= leaves:
        return left
    return left, recursive(leaves, level - 1, 2 * index + 1)


def pair(left: Any, right: Any) -> Any:
    return left, right


def test_the_recursion_itself() -> None:
    assert recursive(1) == 0
    assert recursive(2) == (0, 1)
    assert recursive(3) == ((0, 1), 2)
    assert recursive(6) == (((0, 1), (2, 3)), (4, 5))
    assert recursive(7) == (((0, 1), (2, 3)), ((4, 5), 6))


@pytest.mark.parametrize("leaves", range(1, 41))
def test_the_sum_is_the_recursive_one_in_any_order_of_arrival(leaves: int) -> None:
    rng = random.Random(leaves)
    orders = [list(range(leaves)), list(range(leaves))[::-1]]
    orders += [rng.sample(range(leaves), leaves) for _ in range(30)]
    for order in orders if leaves > 5 else itertools.permutations(range(leaves)):
        tree: Tree[Any] = Tree(leaves, pair)
        for n, leaf in enumerate(order):
            assert not tree.complete, f"complete after {n} of {leaves}"
            tree.put_leaf(leaf, leaf)
        assert tree.complete
        assert tree.take() == recursive(leaves)
        assert not tree.nodes


@pytest.mark.parametrize("leaves", range(1, 41))
def test_partial_sums_of_others_are_taken_in(leaves: int) -> None:
    """Every rank adds what it can of its own leaves; one puts the nodes of all together."""
    rng = random.Random(leaves)
    for ranks in (1, 2, 3, 7):
        owner = [rng.randrange(ranks) for _ in range(leaves)]
        parts: list[tuple[Node, Any]] = []
        for rank in range(ranks):
            tree: Tree[Any] = Tree(leaves, pair)
            for leaf in rng.sample(range(leaves), leaves):
                if owner[leaf] == rank:
                    tree.put_leaf(leaf, leaf)
            parts += tree.nodes.items()
        rng.shuffle(parts)
        whole: Tree[Any] = Tree(leaves, pair)
        for node, value in parts:
            whole.put(node, value)
        assert whole.take() == recursive(leaves)


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 8, 12, 31])
def test_floats_have_the_same_bits_in_any_order(leaves: int) -> None:
    rng = random.Random(leaves)
    values = [rng.uniform(-1, 1) * 10.0 ** rng.randint(-8, 8) for _ in range(leaves)]
    sums = set()
    for _ in range(50):
        tree: Tree[float] = Tree(leaves, lambda a, b: a + b)
        for leaf in rng.sample(range(leaves), leaves):
            tree.put_leaf(leaf, values[leaf])
        sums.add(tree.take().hex())
    assert len(sums) == 1


@pytest.mark.parametrize("leaves", range(1, 41))
def test_adding_in_place_on_the_first_argument(leaves: int) -> None:
    def add(left: list[int], right: list[int]) -> list[int]:
        left += right
        return left

    for order in (range(leaves), reversed(range(leaves))):
        tree: Tree[list[int]] = Tree(leaves, add)
        for leaf in order:
            tree.put_leaf(leaf, [leaf])
        assert tree.take() == list(range(leaves))


def test_an_incomplete_sum_cannot_be_taken() -> None:
    tree: Tree[int] = Tree(5, lambda a, b: a + b)
    tree.put_leaf(4, 1)
    tree.put_leaf(1, 1)
    with pytest.raises(AssertionError, match="the sum over 5 leaves lacks some: here are only"):
        tree.take()
    assert set(tree.nodes) == {Node(2, 1), Node(0, 1)}


def test_in_order_no_more_waits_than_a_binary_counter_has_ones() -> None:
    for leaves in range(1, 41):
        tree: Tree[None] = Tree(leaves, lambda _a, _b: None)
        for done in range(1, leaves):
            tree.put_leaf(done - 1, None)
            assert len(tree.nodes) == done.bit_count()


# Who computes what


GRIDS = [
    (leaves, copies, ranks)
    for leaves in (1, 2, 3, 4, 5, 8, 12, 13, 40)
    for copies in (1, 2, 3, 4)
    for ranks in (1, 2, 3, 4)
]


@pytest.mark.parametrize("every_leaf", [False, True])
@pytest.mark.parametrize(("leaves", "copies", "ranks"), GRIDS)
def test_every_leaf_once_and_evenly(leaves: int, copies: int, ranks: int, every_leaf: bool) -> None:
    found = assign(leaves, copies, ranks, every_leaf=every_leaf)
    assert len(found) == copies * ranks
    assert sorted(leaf for mine in found for leaf in mine) == list(range(leaves))
    turns = [len(mine) for mine in found]
    assert max(turns) - min(turns) <= 1
    assert all(list(mine) == sorted(mine) for mine in found)
    per_copy = [sorted(leaf for mine in found[c * ranks : (c + 1) * ranks] for leaf in mine) for c in range(copies)]
    assert [leaf for copy in per_copy for leaf in copy] == list(range(leaves)), "a copy computes neighbours"


def waiting(leaves: int, assignment: Assignment, ranks: int, every_leaf: bool) -> int:
    """The most nodes without their sibling, counted from sets of leaves."""

    def joined(done: set[int]) -> int:
        def cover(level: int, index: int) -> int:
            """Nodes that wait below node (level, index), itself included."""
            inside = set(range(index << level, min((index + 1) << level, leaves)))
            if not inside & done:
                return 0
            if inside <= done:
                return 1
            return cover(level - 1, 2 * index) + cover(level - 1, 2 * index + 1)

        return cover((leaves - 1).bit_length(), 0)

    most = 0
    for first in range(0, len(assignment), ranks):
        copy = assignment[first : first + ranks]
        for group in [copy] if every_leaf else [(mine,) for mine in copy]:
            done: set[int] = set()
            for turn in range(max(map(len, group))):
                done |= {mine[turn] for mine in group if turn < len(mine)}
                most = max(most, joined(done))
    return most


@pytest.mark.parametrize("every_leaf", [False, True])
@pytest.mark.parametrize(("leaves", "copies", "ranks"), GRIDS)
def test_pending_counts_what_waits(leaves: int, copies: int, ranks: int, every_leaf: bool) -> None:
    rng = random.Random(leaves * 100 + copies * 10 + ranks)
    dealt: list[list[int]] = [[] for _ in range(copies * ranks)]
    for leaf in range(leaves):
        rng.choice(dealt).append(leaf)
    some = tuple(map(tuple, dealt))
    for assignment in (some, assign(leaves, copies, ranks, every_leaf=every_leaf)):
        count = pending(leaves, assignment, ranks, every_leaf=every_leaf)
        assert count == waiting(leaves, assignment, ranks, every_leaf)


def test_the_assignment_with_fewest_waiting_sums_is_taken() -> None:
    assert assign(4, 1, 2, every_leaf=True) == ((0, 2), (1, 3))
    assert assign(4, 1, 2, every_leaf=False) == ((0, 1), (2, 3))
    assert assign(8, 2, 2, every_leaf=True) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert pending(8, assign(8, 1, 4, every_leaf=True), 4, every_leaf=True) == 1
    assert pending(4, ((0, 2), (1, 3)), 2, every_leaf=False) == 2
    assert assign(2, 1, 4, every_leaf=True) == ((0,), (1,), (), ())


@pytest.mark.parametrize("leaves", range(1, 41))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_what_waits_stays_logarithmic(leaves: int, ranks: int) -> None:
    once = pending(leaves, assign(leaves, 1, ranks, every_leaf=False), ranks, every_leaf=False)
    n = -(-leaves // ranks)
    assert once <= max(1, 2 * n.bit_length())
    shards = pending(leaves, assign(leaves, 1, ranks, every_leaf=True), ranks, every_leaf=True)
    assert shards <= max(1, 2 * leaves.bit_length())


# Weights


def joined(weights: list[float], order: list[int]) -> Weighed[Any]:
    """The weighed sum as text: what was scaled by what, and added to what."""
    join = weigh(lambda x, w: f"{w:g}*{x}", lambda a, b: f"({a}+{b})")
    tree: Tree[Weighed[Any]] = Tree(len(weights), join)
    for leaf in order:
        w = weights[leaf]
        tree.put_leaf(leaf, Weighed(f"g{leaf}", w) if w else Weighed(None))
    return tree.take()


@pytest.mark.parametrize(
    ("weights", "value"),
    [
        ([1, 1], "(g0+g1)"),
        ([2, 0.5], "(2*g0+0.5*g1)"),
        ([1, 0.5, 1], "((g0+0.5*g1)+g2)"),
        ([3, 1, 0.5, 0.5], "((3*g0+g1)+(0.5*g2+0.5*g3))"),
        ([0, 2, 3], "(2*g1+3*g2)"),
        ([2, 3, 0], "(2*g0+3*g1)"),
        ([0.5, 0, 0, 1, 0], "(0.5*g0+g3)"),
    ],
)
def test_every_leaf_is_multiplied_once_when_it_meets_another(weights: list[float], value: str) -> None:
    leaves = list(range(len(weights)))
    for order in itertools.permutations(leaves):
        total = joined(weights, list(order))
        assert total == Weighed(value)
        assert not total.alone


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("weight", [1.0, 0.25, 7.0])
def test_a_leaf_alone_keeps_its_gradient_untouched(at: int, weight: float) -> None:
    weights = [0.0] * 6
    weights[at] = weight
    for order in (list(range(6)), list(range(6))[::-1]):
        total = joined(weights, order)
        assert total == Weighed(f"g{at}", weight)
        assert total.alone


def test_leaves_of_weight_0_only_have_no_sum() -> None:
    total = joined([0, 0, 0], [2, 0, 1])
    assert total == Weighed(None)
    assert not total.alone


def test_values_that_compare_like_none_are_still_values() -> None:
    join = weigh(lambda x, w: x * w, lambda a, b: a + b)
    assert join(Weighed(0.0, 2.0), Weighed(5.0, 3.0)) == Weighed(15.0)
    assert join(Weighed(0.0), Weighed(5.0)) == Weighed(5.0)
    assert Weighed(0.0, 1.0).alone
