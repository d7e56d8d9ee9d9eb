"""The plan that is made of a record. Units 0, 1, 2 are blocks; 3 is the rest of the model around them."""

from __future__ import annotations

from shoal.engine.schedule import Act, Cursor, Plan, Record, fullest, make_plan

AROUND = {0: {3}, 1: {3}, 2: {3}, 3: set[int]()}
ACTS = {"+": Act.GATHER, "-": Act.FREE, "=": Act.REDUCE}


def record(text: str) -> Record:
    """`+1` gathers unit 1, `-1` frees it, `=1` has all its gradients."""
    found = Record()
    for word in text.split():
        found.add(ACTS[word[0]], int(word[1:]))
    return found


def shown(plan: Plan) -> str:
    """As in `record`; `+1*` is kept for one more use."""
    return " ".join(f"{'+' if e.act is Act.GATHER else '='}{e.unit}{'*' * e.keep}" for e in plan)


def plan_of(text: str, around: dict[int, set[int]] = AROUND) -> str:
    return shown(make_plan(record(text), around, set(around)))


def test_a_leaf_as_it_is() -> None:
    """The last block is not gathered again for its backward, which comes at once; nor what comes one gather later."""
    leaf = "+3 +0 -0 +1 -1 +2 -2 -3 +3 +2 -2 =2 +1 -1 =1 +0 -0 =0 -3 =3"
    assert plan_of(leaf) == "+3* +0 +1* +2* =2 =1 +0 =0 =3"
    five = {**{i: {5} for i in range(5)}, 5: set[int]()}
    going = " ".join(f"+{i} -{i}" for i in range(5))
    coming = " ".join(f"+{i} -{i} ={i}" for i in reversed(range(5)))
    assert plan_of(f"+5 {going} -5 +5 {coming} -5 =5", five) == "+5* +0 +1 +2 +3* +4* =4 =3 +2 =2 +1 =1 +0 =0 =5"


def test_without_gathers_only_the_order_of_gradients_counts() -> None:
    assert plan_of("=2 =1 =0 =3") == "=2 =1 =0 =3"


def test_the_last_of_several_gradients_counts() -> None:
    assert plan_of("=2 =1 =2 =0 =3") == "=1 =2 =0 =3"


def test_units_without_gradients_come_at_the_end_the_last_defined_first() -> None:
    assert plan_of("=1") == "=1 =3 =2 =0"


def test_missing_blocks_get_their_definition_place() -> None:
    """Between their neighbours, going in and coming back."""
    assert plan_of("+3 +0 -0 +2 -2 -3 +3 +2 -2 =2 +0 -0 =0 -3 =3") == "+3* +0 +1* +2* =2 +0 =0 =3 =1"
    assert plan_of("+3 +1 -1 +2 -2 -3 +3 +2 -2 =2 +1 -1 =1 -3 =3") == "+3* +0 +1* +2* =2 +0 =1 =3 =0"  # the first one
    assert plan_of("+3 +0 -0 +1 -1 -3 +3 +1 -1 =1 +0 -0 =0 -3 =3") == "+3* +0 +1* +2* =1 +0 =0 =3 =2"  # the last one
    assert plan_of("+3 -3 +3 -3 =3") == "+3* +0 +1* +2* +0 =3 =2 =1 =0"  # all of them
    five = {**{i: {5} for i in range(5)}, 5: set[int]()}
    assert plan_of("+5 -5 +5 -5 =5", five) == "+5* +0 +1 +2 +3* +4* +2 +1 +0 =5 =4 =3 =2 =1 =0"


def test_a_frozen_block_has_no_reduction() -> None:
    frozen = make_plan(record("+3 +0 -0 +1 -1 +2 -2 -3 +3 +2 -2 =2 +1 -1 +0 -0 =0 -3 =3"), AROUND, {0, 2, 3})
    assert shown(frozen) == "+3* +0 +1* +2* =2 +0 =0 =3"


def test_used_several_times() -> None:
    """Block 0 is entered twice; kept for the second time as it comes soon, gathered again for the third."""
    assert plan_of("+3 +0 -0 +1 -1 +0 -0 -3 +3 +0 -0 +1 -1 =1 +0 -0 =0 -3 =3", {0: {3}, 1: {3}, 3: set()}) == (
        "+3* +0*** +1* =1 =0 =3"
    )


def test_the_fullest_record_is_taken() -> None:
    """That of the rank with gradients for most units; of the first of them."""
    short, long, empty = record("+3 +0 -0 -3 =0"), record("+3 +0 -0 +1 -1 -3 =1 =0 =3"), record("+3 +0 +1 +2 -0 -1 -2")
    assert fullest([empty, short, long, long]) is long
    assert fullest([empty, short]) is short


def test_a_record_travels() -> None:
    leaf = record("+3 +0 -0 =0 =0 -3 =3")
    again = Record.from_json(leaf.to_json())
    assert again == leaf
    assert again.times == {0: 2, 3: 1}
    again.forget_gradients()
    assert again.events == record("+3 +0 -0 -3").events
    assert again.times == {0: 2, 3: 1}  # what was dropped counts: the user's loop will do the same again


def test_a_cursor() -> None:
    cursor = Cursor(make_plan(record("+3 +0 =0 =3"), {0: {3}, 3: set()}, {0, 3}))
    assert cursor.will_gather(0)
    cursor.at = 2
    assert not cursor.will_gather(0)
    assert cursor.next.act is Act.REDUCE
    cursor.at = 4
    assert cursor.next is None
