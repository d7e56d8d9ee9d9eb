"""What Horovod's calls have in common on a rank: the group, and what ranks tell each other before each of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextvars import ContextVar
from typing import cast

from shoal.comm.pool import Pool
from shoal.dropin.mean import Averager
from shoal.dropin.world import World, world
from shoal.errors import DivergedError, OrderError, SettingError

Words = dict[str, object]
"""What a rank says of its next call: `op`, and what must be equal on all ranks."""

JOIN, LEFT = "join", "end of the program"


class Session:
    """From `init()` to `shutdown()` on one rank."""

    def __init__(self, here: World) -> None:
        self.world, self.group, self.pool = here, here.group(range(here.size)), Pool()
        self.calls = 0
        self.optimizers: list[Averager] = []  # in the order in which all ranks make them
        here.goodbyes.append(lambda: self.tell({"op": LEFT}))

    def name(self, given: str | None, op: str) -> str:
        """The name of a call, which all ranks must give alike."""
        self.calls += 1
        return given or f"{op}.noname.{self.calls}"

    def tell(self, words: Words, *, differs: str = "") -> list[Words]:
        """What every rank says. Ranks in `join()` agree with whatever the others do. Collective.

        Args:
            words: of this rank.
            differs: the one key that need not be equal.

        Raises:
            DivergedError: ranks call different things.
        """
        self.group.carrier.note(f"is in hvd.{words['op']} {words.get('name', '')}".rstrip())
        told = [cast(Words, json.loads(w)) for w in self.group.share_any("hvd", json.dumps(words).encode())]
        busy = [(r, w) for r, w in enumerate(told) if w["op"] != JOIN]
        alike = [{k: v for k, v in w.items() if k != differs} for _, w in busy]
        if any(w != alike[0] for w in alike):
            shown = "; ".join(f"rank {r} calls {_shown(w)}" for r, w in busy)
            raise DivergedError(
                f"ranks call different things: {shown}",
                cause="a branch that only some ranks take, unequal numbers of batches, or another order of calls",
                remedy="the same calls in the same order on all ranks; hvd.join() on a rank that is out of data",
            )
        return told


def nobody_joined(told: Sequence[Words], what: str) -> None:
    out = [str(r) for r, w in enumerate(told) if w["op"] == JOIN]
    if out and len(out) < len(told):
        raise OrderError(
            f"hvd.{what} while rank {', '.join(out)} is in hvd.join()",
            remedy="only allreduce and a DistributedOptimizer's step go on without a rank",
        )


def check_process_set(process_set: object) -> None:
    """All ranks take part: there are no others' groups."""
    if process_set is not None:
        raise SettingError(
            "process_set= is not among shoal's", remedy="shoal.DistributedDataParallel(model, process_group=...)"
        )


def _shown(words: Words) -> str:
    rest = ", ".join(f"{k}={v}" for k, v in words.items() if k not in ("op", "touched"))
    return f"{words['op']}({rest})"


_session: ContextVar[Session | None] = ContextVar("shoal_horovod", default=None)
"""Of this rank: Horovod's functions take no such argument."""


def begin() -> None:
    """See `shoal.horovod.init`."""
    if not initialized():
        _session.set(Session(world()))


def initialized() -> bool:
    """Has `init()` been called, and `shutdown()` not?"""
    found = _session.get()
    return found is not None and not found.world.carrier.closed


def end() -> None:
    """See `shoal.horovod.shutdown`."""
    found = _session.get()
    if found is not None:
        _session.set(None)
        found.world.leave()


def session() -> Session:
    """Raises `OrderError` before `init()`."""
    found = _session.get()
    if found is None or found.world.carrier.closed:
        raise OrderError("Horovod's names are used before hvd.init()", remedy="import shoal.horovod as hvd; hvd.init()")
    return found
