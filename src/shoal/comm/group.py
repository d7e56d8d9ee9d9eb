"""The seam between what is exchanged and what carries it.

A carrier moves tensors between pairs of ranks. A group is some ranks of the job and the few verbs that shoal needs,
written once for all carriers. Sums are left to a carrier only by name (`Sums`): else their order is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shoal.comm.levels import Hosts, Levels, Relay
from shoal.errors import OrderError


class Like(NamedTuple):
    """What to receive into memory of the carrier's choice: 1-d tensors of these `sizes`, in elements."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Strips = Sequence[Tensor]
"""Contiguous tensors of one dtype and device that travel one after the other."""
Parcel = tuple[int, Strips]
"""A rank and what to send to it."""
Box = tuple[int, Strips | Like]
"""A rank and what to fill from it. Both sides agree on the sizes of the strips; empty ones do not travel."""


class Kept(NamedTuple):
    """Bytes of a carrier that hold what travels, that wait to be used again, and that it has as long as it lives.

    `stages`: does it ever copy what travels?
    """

    under_way: int = 0
    waiting: int = 0
    fixed: int = 0
    stages: bool = True

    def __add__(self, other: Kept) -> Kept:  # type: ignore[override]
        under_way, waiting, fixed = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return Kept(under_way, waiting, fixed, self.stages or other.stages)


FAR, NEAR = 2**27, 2**24
"""Bytes that keep a network busy, and memory that ranks share (`Carrier.plenty`)."""

LAST_DOING = "has finished and closes the job"
"""The note of a rank that takes part in nothing but meetings any more."""


class Pending(Protocol):
    """A transfer under way."""

    def ready(self) -> bool:
        """Has all arrived? Never waits."""
        ...

    def wait(self) -> Sequence[Strips]:
        """Return what was received, box by box, when all has arrived.

        All that was sent may be overwritten then; except, where a box was `Like`, memory of the carrier
        (`Carrier.empty`), which may be when it is idle.

        Raises:
            PeerLost: a rank died or left.
            StalledError: nobody moved for `timeout` seconds.
        """
        ...

    def release(self) -> None:
        """What came into memory of the carrier's choice is not used any more."""
        ...


class Common(Protocol):
    """One memory that all members of a group see, each of whom writes its own part of it."""

    data: Tensor

    def publish(self) -> None:
        """This member's part is current now. All members publish equally often."""
        ...

    def current(self) -> Pending:
        """Until everybody has published as often as this member."""
        ...

    def release(self) -> None:
        """No member uses it any more; each says so, after all have stopped."""
        ...


class Sums(Protocol):
    """Sums over some ranks, in an order of the backend's own. All of them start the same ones in the same order."""

    scatters: bool  # does a reduce-scatter cost less than an all-reduce?

    def all_reduce(self, label: str, tensor: Tensor) -> Pending:
        """Sum `tensor` over all ranks, in place. All of them get the same bits."""
        ...

    def reduce_scatter(self, label: str, whole: Tensor) -> Pending:
        """Sum `whole` over all ranks; this one gets its equal share of it."""
        ...


MakeSums = Callable[[str, Sequence[int]], Sums]
"""Over a group of this name and these world ranks, who all call it; once made, a name keeps what it has."""


class Carrier(Protocol):
    """Moves tensors between the ranks of the job."""

    rank: int
    size: int
    sent: Counter[str]  # bytes, by the first word of the label

    @property
    def levels(self) -> Levels:
        """The hosts of all ranks, where ranks of one host have a shorter way to each other than to others.

        While this rank waits, it goes on with `levels.errands`, unless the carrier is `ordered`.
        """
        ...

    @property
    def ordered(self) -> bool:
        """Does it match what is sent with what is received by order alone? All ranks must post in one order then."""
        ...

    @property
    def plenty(self) -> int:
        """So many bytes of gradients under way keep it busy; more would only take memory."""
        ...

    @property
    def closed(self) -> bool:
        """The job is over."""
        ...

    @property
    def failed(self) -> bool:
        """This rank or its connections have failed: there is nobody to say goodbye to."""
        ...

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        """Start a transfer. `label` must be equal on both sides, and differs from that of any other under way."""
        ...

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        """Senders may hear now of what a later `post` with this label receives.

        Args:
            receives: the same tensors that `post` will be given.

        Returns:
            What is to be kept until then: without it, nothing is expected any more.
        """
        ...

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory from which others can be sent to without a copy, where there is such."""
        ...

    def idle(self, tensor: Tensor) -> bool:
        """May memory from `empty` be overwritten? Others may still read it."""
        ...

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        """Zeros that all these ranks see; None where they have no memory in common. Collective."""
        ...

    def sums(self, device: torch.device) -> MakeSums | None:
        """What adds up tensors of this device faster than exact numerics can; None: nothing does."""
        ...

    def note(self, mark: str) -> None:
        """Say what this rank does now, for the others to read while they wait."""
        ...

    def hold(self, reason: str) -> None:
        """Stop the time-out of the others (`reason` not empty) or let it run again."""
        ...

    def rest(self) -> None:
        """A step is over: let go of memory that the next one gets again."""
        ...

    def kept(self) -> Kept:
        """Memory of this rank for what travels."""
        ...

    def fail(self, why: str) -> None:
        """Tell the others that this rank fails, and of what."""
        ...

    def close(self) -> None: ...


current: ContextVar[Carrier | None] = ContextVar("shoal_carrier", default=None)
"""What `shoal.init` uses in this context instead of looking for a place: a rank that is a thread, or a dry run."""

latest: ContextVar[Carrier | None] = ContextVar("shoal_latest", default=None)
"""Of the job that this rank has made last: what has no job as an argument goes over it (`shoal.dropin`)."""


class Done:
    """Nothing to wait for any more."""

    def __init__(self, received: Sequence[Strips] = ()) -> None:
        self.received = received

    def ready(self) -> bool:
        return True

    def wait(self) -> Sequence[Strips]:
        return self.received

    def release(self) -> None:
        return


def new_strips(like: Like) -> Strips:
    """Fresh memory, in one piece."""
    flat = torch.empty(sum(like.sizes), dtype=like.dtype, device=like.device)
    return torch.split(flat, list(like.sizes))


class Ahead(NamedTuple):
    """Where everybody's bytes will come, and what keeps them expected."""

    boxes: Sequence[Tensor]
    held: object


class Sharing(NamedTuple):
    """Everybody's bytes on their way to everybody."""

    pending: Pending
    boxes: Sequence[Tensor]

    def bytes(self) -> list[bytes]:
        """All of them, when they have come."""
        self.pending.wait()
        return [box.numpy().tobytes() for box in self.boxes]


class Group:
    """Some ranks of the job that exchange with each other.

    Args:
        name: of the axis: "world", "shard", "copies".
        ranks: world ranks, in the order of the group.
        carrier: what moves the bytes.
    """

    def __init__(self, name: str, ranks: Sequence[int], carrier: Carrier) -> None:
        self.name, self.ranks, self.carrier = name, tuple(ranks), carrier
        self.rank, self.size = self.ranks.index(carrier.rank), len(self.ranks)
        self._count = 0
        one = carrier.ordered  # what goes on as it comes knows no order
        self.hosts = Hosts.among([0 if one else carrier.levels.hosts[r] for r in self.ranks])

    def swap(
        self, verb: str, sends: Sequence[Sequence[Strips]], receives: Sequence[Sequence[Strips | Like]], key: str = ""
    ) -> Pending:
        """Send all of `sends[r]` to each member r and fill `receives[r]` from it; nothing for oneself.

        Both sides must agree on number and sizes. Empty tensors do not travel.

        Args:
            verb: what the bytes are counted under.
            key: what members know this transfer by, if they may begin it in another order than others.

        Raises:
            OrderError: the job is closed.
        """
        key = key or self.new_key()
        if self.size == 1:
            return Done()
        if self.carrier.closed:
            raise OrderError(
                "the job is closed: ranks exchange nothing any more",
                remedy="do this before job.close(), or inside `with shoal.init(...) as job:`",
            )
        self._count_crossing(verb, sends)
        parcels = [(self.ranks[r], strips) for r, parcels in enumerate(sends) if r != self.rank for strips in parcels]
        return self.carrier.post(f"{verb} {self.name} {key}", parcels, self._boxes(receives))

    def expect(self, verb: str, receives: Sequence[Sequence[Strips]], key: str) -> object:
        """Others may hear already that a later `swap` with just these boxes and this key receives from them.

        Returns:
            What is to be kept until then.
        """
        if self.size == 1 or self.carrier.closed:
            return None
        return self.carrier.expect(f"{verb} {self.name} {key}", self._boxes(receives))

    def _boxes(self, receives: Sequence[Sequence[Strips | Like]]) -> list[Box]:
        return [(self.ranks[r], box) for r, boxes in enumerate(receives) if r != self.rank for box in boxes]

    def new_key(self) -> str:
        """What members know their next transfer by, where all begin them in one order."""
        self._count += 1
        return f"#{self._count}"

    def _count_crossing(self, verb: str, sends: Sequence[Sequence[Strips]]) -> None:
        home = self.hosts.home
        away = [strips for r, parcels in enumerate(sends) if home[r] != home[self.rank] for strips in parcels]
        if away:
            self.carrier.levels.crossed[verb] += sum(t.nbytes for strips in away for t in strips)

    def gather(self, verb: str, flat: Tensor, bounds: Sequence[int], key: str = "") -> Pending:
        """Member r has filled `flat[bounds[r]:bounds[r + 1]]`; afterwards everybody has all of it."""
        parts = [flat[a:b] for a, b in pairwise(bounds)]
        if self.hosts.two_levels:
            return self._gather_by_hosts(verb, parts, key or self.new_key())
        return self.swap(verb, [[[parts[self.rank]]]] * self.size, [[[part]] for part in parts], key)

    def _gather_by_hosts(self, verb: str, parts: Sequence[Tensor], key: str) -> Pending:
        """A host's members each take a piece of what comes from another one, and pass it on to each other."""
        me, home = self.rank, self.hosts.home
        mates = self.hosts.of[home[me]]
        away = [r for r in range(self.size) if home[r] != home[me]]
        pieces = {r: torch.tensor_split(parts[r], len(mates)) for r in away}
        sends: list[list[Strips]] = [[] for _ in parts]
        for host, members in enumerate(self.hosts.of):
            for member, piece in zip(members, torch.tensor_split(parts[me], len(members)), strict=True):
                sends[member] = [[piece]] if host != home[me] else []
        place = mates.index(me)
        boxes = [[[pieces[r][place]]] if r in away else [] for r in range(self.size)]
        far = self.swap(verb, sends, boxes, f"{key} far")
        if len(mates) == 1:
            return far
        own = [[[parts[me]]] if r in mates else [] for r in range(self.size)]
        near = self.swap(verb, own, [[[parts[r]]] if r in mates else [] for r in range(self.size)], key)

        def pass_on() -> Pending:
            out = [[[pieces[r][place] for r in away]] if m in mates else [] for m in range(self.size)]
            into = [
                [[pieces[r][mates.index(m)] for r in away]] if m in mates else [] for m in range(self.size)
            ]  # fmt: skip
            return self.swap(verb, out, into, f"{key} on")

        return Relay(self.carrier.levels, far, near, pass_on)

    def common(self, numel: int, dtype: torch.dtype, device: torch.device) -> Common | None:
        """Zeros that all members see; None where they have no memory in common. Collective."""
        self._count += 1
        if self.size == 1:
            return None
        return self.carrier.common(f"common {self.name} #{self._count}", self.ranks, numel, dtype, device)

    def share(self, verb: str, data: bytes) -> list[bytes]:
        """Everybody gets everybody's bytes, in the order of the group. All must have the same length."""
        return self.begin_share(verb, data).bytes()

    def begin_share(self, verb: str, data: bytes, ahead: Ahead | None = None, key: str = "") -> Sharing:
        """Like `share`, for who does something else meanwhile.

        Args:
            ahead: what `expect_share` said of this key.
            key: see `swap`.
        """
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        boxes = ahead.boxes if ahead is not None else [torch.empty_like(mine) for _ in range(self.size)]
        boxes = [*boxes[: self.rank], mine, *boxes[self.rank + 1 :]]
        return Sharing(self.swap(verb, [[[mine]]] * self.size, [[[box]] for box in boxes], key), boxes)

    def expect_share(self, verb: str, nbytes: int, key: str) -> Ahead:
        """Others may hear that so many bytes of theirs can come when they are shared under this key."""
        boxes = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(self.size)]
        return Ahead(boxes, self.expect(verb, [[[box]] for box in boxes], key))

    def share_any(self, verb: str, data: bytes) -> list[bytes]:
        """Like `share`, for bytes of any length."""
        sizes = [int.from_bytes(b, "little") for b in self.share(verb, len(data).to_bytes(8, "little"))]
        padded = self.share(verb, data.ljust(max(sizes), b"\0"))
        return [b[:n] for b, n in zip(padded, sizes, strict=True)]
