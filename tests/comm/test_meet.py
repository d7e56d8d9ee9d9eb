"""Who wants what: grants, agreement, and the error that names everybody."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from shoal.comm.group import LAST_DOING, Ahead, Done, Group, Sharing, Strips
from shoal.comm.meet import Intent, Meeting, Want
from shoal.comm.meter import Meter
from shoal.comm.threads import run
from shoal.errors import DivergedError
from shoal.start import find_carrier


class Script(Group):
    """A world whose other ranks say what is written here."""

    def __init__(self, *rounds: Sequence[tuple[Want, int]]) -> None:
        super().__init__("world", range(1 + len(rounds[0])), Meter(0, 1 + len(rounds[0])))
        self.rounds = list(rounds)

    def begin_share(self, verb: str, data: bytes, ahead: Ahead | None = None, key: str = "") -> Sharing:
        assert verb == "meet"
        tail = data[16:]
        told = [struct.pack("<qii", number, want, 0) + tail.upper() for want, number in self.rounds.pop(0)]
        return Sharing(Done(), [torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in (data, *told)])


def meeting(*rounds: Sequence[tuple[Want, int]]) -> tuple[Meeting, list[int]]:
    met, granted = Meeting(Script(*rounds)), list[int]()
    met.granters.append(granted.append)
    return met, granted


def test_all_want_the_same() -> None:
    met, granted = meeting([(Want.STEP, 4), (Want.STEP, 4)])
    met.make_room(3)
    met.make_room(2)  # it only grows
    assert met.room == 3
    assert met.meet(Want.STEP, 4, b"ab") == [b"ab", b"AB", b"AB"]
    assert granted == []


def test_who_says_it_early_goes_on_and_the_next_meeting_waits() -> None:
    met, granted = meeting([(Want.REDUCE, 1)], [(Want.STEP, 0)])
    met.make_room(2)
    begun = met.begin(Want.REDUCE, 1, b"ab")
    assert met.latest is begun
    assert met.meet(Want.STEP) == [b""] * 2
    assert met.latest is None
    assert begun.ready()
    assert begun.answers() == [b"ab", b"AB"]
    assert granted == []


def test_who_says_it_early_may_wait_for_a_moment() -> None:
    met, _ = meeting([(Want.REDUCE, 1)])
    begun = met.begin(Want.REDUCE, 1)
    come = threading.Event()
    begun._sharing = begun._sharing._replace(pending=Late(come))  # pyright: ignore[reportPrivateUsage]
    assert not begun.ready_within(0.001)
    threading.Timer(0.01, come.set).start()
    assert begun.ready_within(10)


class Late(Done):
    def __init__(self, come: threading.Event) -> None:
        super().__init__()
        self.come = come

    def ready(self) -> bool:
        return self.come.is_set()


def test_what_somebody_waits_for_is_not_there_for_others() -> None:
    """Waits do other things meanwhile, and two who take one answer would both look for the next."""
    met, _ = meeting([(Want.REDUCE, 1)])
    begun = met.begin(Want.REDUCE, 1)
    seen = list[bool]()
    begun._sharing = begun._sharing._replace(pending=Watched(lambda: seen.append(begun.ready())))  # pyright: ignore[reportPrivateUsage]
    assert begun.ready()
    begun.wait()
    assert seen == [False]
    assert begun.ready()


class Watched(Done):
    def __init__(self, waited: Callable[[], None]) -> None:
        super().__init__()
        self.waited = waited

    def wait(self) -> Sequence[Strips]:
        self.waited()
        return ()


def test_gathers_are_granted_before_anything_else() -> None:
    """Two ranks need units 5 and 3: the lower one first, and we, who want to step, take part in both."""
    met, granted = meeting(
        [(Want.GATHER, 5), (Want.GATHER, 3)], [(Want.GATHER, 5), (Want.STEP, 0)], [(Want.STEP, 0), (Want.STEP, 0)]
    )
    assert met.meet(Want.STEP) == [b""] * 3
    assert granted == [3, 5]


def test_our_own_gather_waits_for_its_turn() -> None:
    met, granted = meeting([(Want.GATHER, 2)], [(Want.GATHER, 7)])
    assert met.meet(Want.GATHER, 7) == []
    assert granted == [2, 7]


def test_a_gather_is_granted_by_who_does_something_else() -> None:
    met, granted = meeting([(Want.CLOSE, 0)])
    assert met.meet(Want.GATHER, 1) == []
    assert granted == [1]


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        ((Want.STEP, 1), (Want.STEP, 2), "rank 0 ends step 1; rank 1 ends step 2"),
        ((Want.REDUCE, 1), (Want.SAVE, 1), "rank 0 reduces gradients of leaf turn 1; rank 1 is in job.save at step 1"),
        ((Want.MEAN, 0), (Want.CLOSE, 0), f"rank 0 is in job.mean of step 0; rank 1 {LAST_DOING}"),
    ],
)
def test_different_wishes_are_named(ours: tuple[Want, int], theirs: tuple[Want, int], text: str) -> None:
    met, granted = meeting([theirs])
    with pytest.raises(DivergedError) as caught:
        met.meet(*ours)
    assert str(caught.value) == (
        f"shoal[E20] ranks do different things: {text}\n"
        "  cause: different numbers of batches, or a branch that only some ranks take\n"
        "  try:   let job.loader or a prepared loader hand out batches; keep calls of the job out of `if job.rank == 0`"
    )
    assert granted == []


def test_wishes_for_another_model_differ() -> None:
    met, _ = meeting([(Want.STEP, 1)])
    with pytest.raises(DivergedError, match="rank 0 ends step 1 of model 2; rank 1 ends step 1"):
        met.meet(Want.STEP, 1, model=2)


def test_every_wish_has_words() -> None:
    said = [str(Intent(want, 7)) for want in Want]
    assert len(set(said)) == len(Want)
    assert not any("{" in text for text in said)


def test_what_has_no_room() -> None:
    met, _ = meeting([(Want.STEP, 0)])
    met.make_room(3)
    with pytest.raises(AssertionError, match=r"ends step 0: 4 bytes do not fit into 3"):
        met.meet(Want.STEP, 0, b"1234")


@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_need_different_units(seed: int) -> None:
    """On real ranks: each needs other units in its own order, then all meet."""
    needs = [[4, 1], [2], [], [1, 2, 3]]

    def program(rank: int) -> list[int]:
        carrier, _ = find_carrier(1.0)
        met, granted = Meeting(Group("world", range(4), carrier)), list[int]()
        met.granters.append(granted.append)
        for unit in needs[rank]:
            met.meet(Want.GATHER, unit)
        assert met.meet(Want.LEAF_END, 0) == [b""] * 4
        return granted

    first, *others = run(4, program, seed=seed)
    assert all(granted == first for granted in others)
    assert first == [1, 2, 3, 4, 1]
