"""`memory=`: how much of a rank's bytes units may take that stay whole between two uses."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from shoal.comm.group import Group
from shoal.engine.binding import Binding
from shoal.engine.holding import bill_of, memory, plan_of
from shoal.engine.ledger import FIRST_STEP, GATHERED, KEPT_UNITS, LENT, MIB
from shoal.engine.residence import Room
from shoal.errors import SettingError

_TOLD = struct.Struct("<4q")


class Budget:
    """The bytes that a rank may use, by the ledger. Decides nothing that one rank could decide otherwise than another.

    Args:
        limit: as asked for on this rank; None: there is none.
        bindings: all models, as they are prepared.
        pending: may gradients of a step be there in the next one's forward?
        world: all ranks.
        say: to the user.
    """

    def __init__(
        self, limit: int | None, bindings: Mapping[str, Binding], *, pending: bool, world: Group,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.limit, self.bindings, self.pending, self.world, self.say = limit, bindings, pending, world, say
        self.told = False

    def check(self) -> None:
        """Ranks agree on the smallest budget, and that it is enough. Collective.

        Raises:
            SettingError: what rests and the largest unit take more.
        """
        if self.limit is None:
            return
        bindings = list(self.bindings.values())
        rest = sum(entry.rest for entry in memory(bindings, self.world).entries)
        unit = max(u.gathered + u.around for b in bindings for u in bill_of(b))
        mine = _TOLD.pack(self.limit, rest + unit, rest, unit)
        answers = [_TOLD.unpack(data) for data in self.world.share("memory", mine)]
        limits = [answer[0] for answer in answers]
        self.limit = min(limits)
        if max(limits) > self.limit and not self.told:
            self.told = True
            smallest = f"{_mib(self.limit)} of rank {limits.index(self.limit)}"
            self.say(f"memory= differs between ranks: {smallest}, the smallest, counts for all")
        _, need, rest, unit = max(answers, key=lambda answer: answer[1])
        if need > self.limit:
            rank = next(r for r, answer in enumerate(answers) if answer[1] == need)
            raise SettingError(
                f"memory={_mib(self.limit)} is too small: rank {rank} holds {_mib(rest)} at rest, and its largest unit "
                f"is {_mib(unit)}, {_mib(need)} in all",
                cause="print(job.memory()) without memory= shows every buffer",
                remedy=f"memory={-(-need // MIB)}MiB or more, more ranks per copy, or smaller blocks with units=",
            )

    def room(self, number: int) -> Room | None:
        """What this rank can spare for wholes of one model, once all else has its most.

        Before the first backward of a step nothing is there but what rests. Several models share by size.
        """
        if self.limit is None:
            return None
        bindings = list(self.bindings.values())
        apart = (GATHERED, KEPT_UNITS, LENT, FIRST_STEP)
        entries = [e for e in memory(bindings, self.world).entries if e.name not in apart]
        most, rest = sum(e.peak for e in entries), sum(e.rest for e in entries)
        alone = len(bindings) == 1 and plan_of(bindings[0]).turns == 1 and not self.pending
        sizes = [sum(u.gathered for u in bill_of(b)) for b in bindings]
        parts = max(1, sum(sizes))
        mine = sizes[number] or 1
        going, coming = self.limit - (rest if alone else most), self.limit - most
        return Room(max(0, going) * mine // parts, max(0, coming) * mine // parts)


def _mib(nbytes: int) -> str:
    """Exact to what anybody would write: `12 MiB`, `0.25 MiB`."""
    return f"{nbytes / MIB:.6g} MiB"
