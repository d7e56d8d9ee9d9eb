"""The ranks of a program that has no job: found when a drop-in needs them, left at the interpreter's end."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar

import torch
import torch.distributed as dist

from shoal.comm.group import LAST_DOING, Carrier, Group, current, latest
from shoal.dropin.strays import Strays
from shoal.errors import EnvironmentFault, OrderError
from shoal.launch.place import find_place
from shoal.logs import say, warn
from shoal.start import Seat, find_carrier, settle_settings, tell_of_failure


class World:
    """All ranks of the program.

    Args:
        carrier: what connects them.
        seat: how many of them share this host.
        own: did the drop-ins make the carrier, and close it? Else a job did.
    """

    def __init__(self, carrier: Carrier, seat: Seat, *, own: bool) -> None:
        self.carrier, self.seat, self.own = carrier, seat, own
        self.groups = 0
        self.goodbyes: list[Callable[[], object]] = []  # each tells those who wait for this rank that it leaves
        self.all = self.group(range(carrier.size))
        self.strays = Strays(self.all) if own else None
        self._restore: Callable[[], None] = lambda: None
        if own and seat.own_process:
            self._restore = tell_of_failure(carrier)
            atexit.register(self.leave)

    @property
    def rank(self) -> int:
        return self.carrier.rank

    @property
    def size(self) -> int:
        return self.carrier.size

    @property
    def local_rank(self) -> int:
        """Among the ranks of this host."""
        place = find_place(os.environ) if self.seat.own_process and "RANK" in os.environ else None
        return self.rank % self.seat.local_world if place is None else place.local_rank

    def group(self, ranks: Sequence[int]) -> Group:
        """Some ranks under a name of their own. All of the program's ranks make the same groups in the same order."""
        self.groups += 1
        return Group(f"dropin{self.groups}", ranks, self.carrier)

    def group_of(self, process_group: dist.ProcessGroup | None) -> Group:
        """The ranks of one of torch's groups; None: all."""
        if process_group is None:
            return self.group(range(self.size))
        ranks = dist.get_process_group_ranks(process_group)
        if self.rank not in ranks:
            raise OrderError(
                f"rank {self.rank} is not in process_group= with ranks {ranks}",
                remedy="make this object on the ranks of its group only",
            )
        return self.group(ranks)

    def say(self, text: str) -> None:
        """For rank 0."""
        if self.rank == 0:
            say(text)

    def warn(self, text: str) -> None:
        """A mistake of the whole program: rank 0 says it for all."""
        if self.rank == 0:
            warn(text)

    def leave(self) -> None:
        """Go together: say what drifted apart, close the connections that the drop-ins made.

        Called while an exception is on its way, tell the others of that instead.
        """
        if _here.get() is self:
            _here.set(None)
        if not self.own or self.carrier.closed:
            return
        atexit.unregister(self.leave)
        self._restore()
        failure = sys.exc_info()[1]
        if failure is not None:
            self.carrier.fail(f"{type(failure).__name__}: {failure}")
        try:
            if self.strays is not None and not self.carrier.failed:
                self.carrier.note(LAST_DOING)
                for goodbye in self.goodbyes:
                    goodbye()
                self.strays.tell(self.warn)
        except BaseException as error:
            self.carrier.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            self.carrier.close()


_here: ContextVar[World | None] = ContextVar("shoal_dropin_world", default=None)
"""Of this rank: torch's and Horovod's names take no job as an argument."""


def known() -> World | None:
    """The world that this rank has joined; None: none yet."""
    found = _here.get()
    return found if found is not None and not found.carrier.closed else None


def world(device: torch.device | None = None) -> World:
    """The ranks of this program, joined at the first call. Collective then.

    A job's connections are used where there is one; else ranks find each other by the environment, as `shoal.init`
    does, or by torch's process group where a script has numbered its ranks itself.

    Args:
        device: of the tensors that will travel; None: the host.

    Raises:
        EnvironmentFault: the others do not come, or the environment and torch's process group contradict each other.
    """
    found = known()
    if found is not None:
        return found
    check_rank(os.environ)
    job = latest.get()
    thread = current.get()
    if job is not None and not job.closed:
        made = World(job, Seat(job.size, own_process=thread is None), own=False)
    else:
        made = World(*_joined(device), own=True)
    _here.set(made)
    return made


def _joined(device: torch.device | None) -> tuple[Carrier, Seat]:
    settings = settle_settings(None, {}).settings
    environ: Mapping[str, str] = os.environ
    if "RANK" not in environ and dist.is_initialized():
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing and dist.get_world_size() > 1:
            raise EnvironmentFault(
                f"torch's process group has {dist.get_world_size()} ranks, and {', '.join(missing)} is not set",
                cause="init_process_group was told where rank 0 is by init_method=",
                remedy='os.environ["MASTER_ADDR"] and ["MASTER_PORT"] (a free port) before; or shoal run --workers N',
            )
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **environ}
        environ |= {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    where = settings.device if device is None or device.type == "cpu" else str(device)
    return find_carrier(settings.timeout, settings.carrier, where, settings.interface, environ, settings.one_round)


def check_rank(environ: Mapping[str, str]) -> None:
    """Raises `EnvironmentFault` when torch's process group has another rank or size than the environment says."""
    if current.get() is not None or not dist.is_available() or not dist.is_initialized():
        return
    for name, value in (("RANK", dist.get_rank()), ("WORLD_SIZE", dist.get_world_size())):
        if environ.get(name) not in (None, "", str(value)):
            raise EnvironmentFault(
                f"torch's process group says {name}={value}, the environment {name}={environ[name]}",
                cause="a rank or world size that is written into the script",
                remedy="dist.init_process_group() without rank= and world_size=; the launcher gives them",
            )
