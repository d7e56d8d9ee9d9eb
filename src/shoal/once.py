"""Work that one rank does for others: `job.once` and `job.main`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from shoal.comm import host
from shoal.comm.group import Carrier
from shoal.comm.meet import Meeting, Want
from shoal.errors import PeerFailed, SettingError, nearest

T = TypeVar("T")

PER = ("host", "job")


def once(meeting: Meeting, work: Callable[[], T], per: str) -> T:
    """See `Job.once`."""
    if per not in PER:
        raise SettingError(f"job.once(per={per!r})", remedy=nearest(per, PER))
    world = meeting.world
    meeting.meet(Want.ONCE)
    places = world.share_any("once", _place() if per == "host" else b"")
    doers = [places.index(place) for place in places]  # of every rank, the first one of its place
    error: Exception | None = None
    said: dict[str, object] = {}
    if doers[world.rank] == world.rank:
        world.carrier.hold("job.once")
        try:
            said = _told(work())
        except Exception as e:  # the others wait: they have to hear of it before it is raised here
            error, said = e, {"error": f"{type(e).__name__}: {e}"}
        finally:
            world.carrier.hold("")
    meeting.meet(Want.ONCE, 1)
    found = [cast("dict[str, object]", json.loads(d)) for d in world.share_any("once", json.dumps(said).encode())]
    if error is not None:
        raise error
    _check(found)
    return cast(T, found[doers[world.rank]]["value"])


def _told(value: object) -> dict[str, object]:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise SettingError(
            f"job.once: the function returned a {type(value).__name__}, which the other ranks cannot be told",
            cause="values travel as JSON, never as pickles",
            remedy="return nothing, a path as a string, numbers, or lists and dicts of them",
        ) from None
    return {"value": value}


def _check(found: Sequence[dict[str, object]]) -> None:
    for rank, said in enumerate(found):
        if "error" in said:
            raise PeerFailed(
                f"job.once failed on rank {rank}: {said['error']}",
                cause="the function raised; its traceback is that rank's",
                remedy="mend what failed, or catch it on all ranks: they are all still there",
            )


def _place() -> bytes:
    """Equal for ranks on one host."""
    try:
        return host.identity()
    except OSError:  # no /proc
        return f"{platform.node()} {os.name}".encode()


class Main:
    """True on rank 0. As a context manager it also stops the clock of the others' waits, as long as it is entered.

    Args:
        carrier: of this rank.
    """

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    def __bool__(self) -> bool:
        return self._carrier.rank == 0

    def __enter__(self) -> bool:
        self._carrier.hold("job.main")
        return bool(self)

    def __exit__(self, *_: object) -> None:
        self._carrier.hold("")
