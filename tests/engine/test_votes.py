"""What ranks make of each other's votes."""

from __future__ import annotations

from shoal.engine.scale import Overflow
from shoal.engine.votes import Vote, counted, size_of

NAMES = [f"p{i}" for i in range(17)]


def test_what_any_rank_has_touched_is_touched() -> None:
    votes = [Vote({"p0", "p16"}, False, None), Vote({"p0", "p8"}, False, None), Vote((), False, None)]
    result = counted([vote.packed(NAMES) for vote in votes], NAMES)
    assert result == ({"p0", "p8", "p16"}, False, None)


def test_that_buffers_changed_is_no_parameter() -> None:
    result = counted([Vote((), False, None).packed(NAMES), Vote((), True, None).packed(NAMES)], NAMES)
    assert result == (frozenset(), True, None)


def test_the_first_overflow_in_the_order_of_leaves_counts() -> None:
    overflows = [Overflow(2, 0), None, Overflow(1, 5), Overflow(1, 3)]
    votes = [Vote((), False, overflow).packed(NAMES) for overflow in overflows]
    assert counted(votes, NAMES).overflow == (Overflow(1, 3), 3)


def test_a_vote_has_the_size_for_which_ranks_have_made_room() -> None:
    for names in (NAMES[:7], NAMES[:8], NAMES):
        assert len(Vote(names, True, Overflow(0, 0)).packed(names)) == size_of(names)
