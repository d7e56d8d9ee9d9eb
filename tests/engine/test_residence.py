"""Which units stay whole. Units 0 to 4 are blocks; 5 is the rest of the model around them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from shoal.engine.residence import AHEAD, Course, Residence, Room
from shoal.engine.schedule import Act, Event, Plan

ACTS = {"+": Act.GATHER, "-": Act.FREE, "=": Act.REDUCE}
GOING = " ".join(f"+{i} -{i}" for i in range(5))
COMING = " ".join(f"+{i} ={i} -{i}" for i in reversed(range(5)))
LEAF = f"+5 {GOING} -5 +5 {COMING} =5 -5"
TWICE = "+5 +0 -0 +1 -1 +2 -2 +0 -0 +3 -3 -5 +5 +3 =3 -3 +0 -0 +2 =2 -2 +1 =1 -1 +0 =0 -0 =5 -5"
SIZES = {0: 4, 1: 3, 2: 5, 3: 4, 4: 4, 5: 2}


def events(text: str) -> list[Event]:
    return [(ACTS[word[0]], int(word[1:])) for word in text.split()]


def shown(plan: Plan) -> str:
    return " ".join(f"{'+' if e.act is Act.GATHER else '='}{e.unit}{'*' * e.keep}" for e in plan)


def leaf(text: str, room: int | None, sizes: Mapping[int, int] = SIZES, *, carry: bool = False) -> Residence:
    return Residence(
        events=events(text), sizes=sizes, room=None if room is None else Room(room, room), carry=carry
    )  # fmt: skip


def course(text: str, room: int | None, sizes: Mapping[int, int] = SIZES) -> str:
    return shown(leaf(text, room, sizes).course(before=False, after=False).entries)


def test_all_that_fits_is_gathered_once() -> None:
    assert course(LEAF, sum(SIZES.values())) == "+5* +0* +1* +2* +3* +4* =4 =3 =2 =1 =0 =5"


def test_what_is_needed_latest_goes_first() -> None:
    """In use are 2 + 5 at most, with 5 more gathered ahead; the last blocks stay, the first go."""
    seen = [course(LEAF, room) for room in (7, 12, 15, 20)]
    assert seen == [
        "+5* +0 +1 +2 +3 +4* =4 +3 =3 +2 =2 +1 =1 +0 =0 =5",
        "+5* +0 +1 +2 +3 +4* +3 =4 +2 =3 +1 =2 +0 =1 =0 =5",
        "+5* +0 +1 +2 +3* +4* +2 =4 =3 +1 =2 +0 =1 =0 =5",
        "+5* +0 +1 +2* +3* +4* +1 =4 =3 =2 +0 =1 =0 =5",
    ]


def test_gradients_take_room() -> None:
    """What fits while there are none goes when backward begins."""
    all_of_it = sum(SIZES.values())
    tight = Residence(events=events(LEAF), sizes=SIZES, room=Room(all_of_it, 11), carry=False)
    assert shown(tight.course(before=False, after=False).entries).count("+") > 6
    assert max(held(tight, tight.course(before=False, after=False), {})[12:]) <= 11


def test_memory_that_all_see_costs_nothing() -> None:
    nothing = dict.fromkeys(SIZES, 0)
    assert course(LEAF, 0, nothing) == "+5* +0* +1* +2* +3* +4* =4 =3 =2 =1 =0 =5"
    assert course(LEAF, None, nothing) == "+5* +0 +1 +2 +3* +4* =4 =3 +2 =2 +1 =1 +0 =0 =5"


def test_gathers_of_the_backward_begin_early() -> None:
    """Before the reductions that they would have waited for, as far as bytes allow, and not before they were let go."""
    assert course(LEAF, None) == "+5* +0 +1 +2 +3* +4* +2 +1 +0 =4 =3 =2 =1 =0 =5"
    large = {unit: size * AHEAD for unit, size in SIZES.items()}
    assert course(LEAF, None, large) == "+5* +0 +1 +2 +3* +4* +2 +1 =4 =3 +0 =2 =1 =0 =5"
    assert leaf(LEAF, None, large).ahead == 10 * AHEAD
    assert course("+1 +0 -0 +2 -2 +3 -3 =3 +0 =0 -0 =2 +2 =1", None) == "+1 +0 +2 +3 +0 +2 =3 =0 =2 =1"
    still = "+1 +0 +2 -2 +3 -3 =3 -0 +4 -4 +5 -5 +0 =0 -0 -1 =1"
    assert course(still, None) == "+1 +0 +2 +3 +4 +5 =3 +0 =0 =1"


def held(residence: Residence, course: Course, here: dict[int, int]) -> list[int]:
    """Replay a leaf as `Presence` does, without gathering ahead: bytes at every event. `here`: units, changed in place."""
    assert here.keys() == course.here.keys()
    here.update(course.here)
    gathers = {e.at: e for e in course.entries if e.act is Act.GATHER}
    used: list[int] = []
    for at, (act, unit) in enumerate(residence.events):
        if act is Act.GATHER and at in gathers:
            assert unit not in here
            here[unit] = gathers[at].keep
        elif act is Act.GATHER:
            assert unit in here, (at, unit)
        elif act is Act.FREE and here[unit]:
            here[unit] -= 1
        elif act is Act.FREE:
            del here[unit]
        used.append(sum(residence.sizes[u] for u in here))
    assert here.keys() == course.stay
    return used


@pytest.mark.parametrize("text", [LEAF, TWICE])
def test_no_budget_is_exceeded(text: str) -> None:
    """For every room in which the units in use fit, in leaves that come alone and in steps of several."""
    sizes = {unit: size for unit, size in SIZES.items() if f"+{unit}" in text}
    gathers: list[int] = []
    for room in range(8, sum(sizes.values()) + 1):
        residence = leaf(text, room, sizes, carry=True)
        alone = residence.course(before=False, after=False)
        gathers.append(sum(e.act is Act.GATHER for e in alone.entries))
        here: dict[int, int] = {}
        courses = [
            alone,
            *(residence.course(before=b, after=a) for b, a in [(False, True), (True, True), (True, False)]),
        ]
        for each in courses:
            if not residence.carried and each is not alone:
                continue
            used = max(held(residence, each, here))
            assert used <= room
            assert each.most <= residence.most
            assert min(used + residence.ahead, residence.total) <= room or used + residence.ahead <= residence.total
        assert not here
    assert gathers[-1] == len(sizes) < gathers[0]
    assert gathers == sorted(gathers, reverse=True) or text == TWICE


def test_several_leaves_keep_all_that_fits() -> None:
    residence = leaf(LEAF, sum(SIZES.values()), carry=True)
    assert residence.carried == set(SIZES)
    middle = residence.course(before=True, after=True)
    assert shown(middle.entries) == "=4 =3 =2 =1 =0 =5"
    assert middle.here == {**dict.fromkeys(range(5), 2), 5: 2}
    assert middle.stay == set(SIZES)
    last = residence.course(before=True, after=False)
    assert last.here == dict.fromkeys(SIZES, 1)
    assert not last.stay


def test_what_is_said() -> None:
    mib = {unit: size * 2**20 for unit, size in SIZES.items()}
    assert str(leaf(LEAF, 22 * 2**20, mib)) == (
        "memory: 6 gathers for 12 uses of units in a leaf; at most 12 MiB in use or gathered ahead, 22 MiB kept"
    )
