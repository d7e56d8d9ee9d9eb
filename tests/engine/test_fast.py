"""What follows a first sum begins in the order of the first ones, whatever arrives first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.comm.group import Done, Pending, Strips
from shoal.engine.fast import Line


class Held:
    """Arrives when it is told to, or waited for."""

    def __init__(self) -> None:
        self.here = False

    def ready(self) -> bool:
        return self.here

    def wait(self) -> Sequence[Strips]:
        self.here = True
        return [[torch.ones(1)]]

    def release(self) -> None:
        return


def in_line(count: int) -> tuple[list[Held], list[Pending], list[int]]:
    """So many transfers that follow another one, and the numbers of those that have begun."""
    line, firsts, begun = Line(), [Held() for _ in range(count)], list[int]()

    def begin(number: int, strips: Strips) -> Pending:
        begun.append(number)
        return Done([strips])

    laters = [line.after(first, lambda strips, n=n: begin(n, strips)) for n, first in enumerate(firsts)]
    return firsts, laters, begun


def test_nobody_overtakes() -> None:
    firsts, laters, begun = in_line(3)
    firsts[2].here = firsts[1].here = True
    assert (laters[2].ready(), laters[1].ready(), begun) == (False, False, [])
    firsts[0].here = True
    assert (laters[1].ready(), begun) == (True, [0, 1, 2])


def test_who_waits_for_one_waits_for_those_before_it() -> None:
    _, laters, begun = in_line(3)
    assert laters[1].wait()[0][0].item() == 1.0
    assert begun == [0, 1]
    assert (laters[0].ready(), laters[2].ready()) == (True, False)
    assert laters[0].wait()[0][0].item() == 1.0
    assert begun == [0, 1]


class Looks(Held):
    """While one waits for it, others are looked at, which is how any carrier waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.look = 0, bool

    def wait(self) -> Sequence[Strips]:
        self.waits += 1
        self.here = True
        assert not self.look()
        return [[torch.ones(1)]]


def test_what_somebody_waits_for_is_begun_once() -> None:
    line, first, begun = Line(), Looks(), list[Strips]()

    def begin(strips: Strips) -> Pending:
        begun.append(strips)
        return Done([strips])

    later = line.after(first, begin)
    first.look = later.ready
    later.wait()
    assert (first.waits, len(begun)) == (1, 1)
    assert later.ready()


def test_what_is_here_begins_at_once() -> None:
    begun: list[Strips] = []
    later = Line().after(Done([[torch.zeros(2)]]), lambda strips: begun.append(strips) or Done())
    assert later.ready()
    assert [strip.tolist() for strip in begun[0]] == [[0.0, 0.0]]
