"""Every buffer that a rank holds: its bytes now, and at rest and at most as predicted. Arithmetic only: no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from shoal.comm.arena import WARM
from shoal.comm.group import Kept
from shoal.strategy import Shard

KINDS = ("parameters", "masters", "gradients", "optimizer", "staging", "other")
MIB = 2**20
GATHERED, KEPT_UNITS, LENT, FIRST_STEP = (
    "gathered units", "units kept", "parameters in job.whole", "gradients, first step",
)  # fmt: skip
"""Entries that others ask for by name."""

STATES = {
    "SGD": 0, "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adadelta": 2, "RMSprop": 1, "Adagrad": 1,
    "ASGD": 1, "Rprop": 2, "LAMB": 2, "LARS": 1,
}  # fmt: skip
"""Numbers of state per parameter, without options."""
OPTIONS = {"amsgrad": 1, "momentum": 1, "centered": 1}
"""And what options add where they are on. LARS has momentum always."""
UNCOUNTED = ("SGD", "LARS", "LAMB")
"""They keep no count of their steps, which is a float32 of its own per parameter."""


def states_of(optimizer: str, options: Mapping[str, object]) -> int | None:
    """Numbers of state that a torch optimizer keeps per parameter; None: not known."""
    known = STATES.get(optimizer)
    if known is None or optimizer == "LARS":
        return known
    return known + sum(more for name, more in OPTIONS.items() if options.get(name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A buffer, or all of one name.

    Args:
        kind: one of `KINDS`.
        now: bytes in use; those that several ranks share are divided by their number.
        rest, peak: bytes between two steps and at most, as predicted.
        lifetime: "always", "gathered" (a unit's forward or backward), "leaf", "step" (to the update), "in flight" (and
            its memory is kept), "between steps" (to be used again), "between uses" (of one step), "first step" (of
            the job), "lent" (inside `job.whole`).
        setting: what makes it larger or smaller.
        shared: it is shared with other ranks of the host.
    """

    name: str
    kind: str
    now: int
    rest: int
    peak: int
    lifetime: str
    setting: str
    shared: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitBill:
    """A unit as the ledger sees it: numbers of elements and bytes per element.

    Args:
        numel, used, mine: elements of the flat buffer, of its parameters alone, and of this rank's shard.
        around: bytes of other units of its blocks, and of the blocks that these lie in: they are whole while it is.
        resident: the whole stays between steps.
        common, common_gradient: ranks that have the whole, and the step's gradient, in one memory; 1: everybody has
            its own.
        agreed: the step's gradient lies in a buffer of its own, not in the last partial sum.
    """

    numel: int
    used: int
    mine: int
    around: int = 0
    compute: int
    master: int
    reduce: int
    trainable: bool
    resident: bool
    stochastic: bool = False
    common: int = 1
    common_gradient: int = 1
    agreed: bool = True

    @property
    def same(self) -> bool:
        """Are masters and parameters of one dtype?"""
        return self.compute == self.master

    @property
    def masters(self) -> int:
        """Bytes of masters that are no part of the whole."""
        return 0 if self.same and self.resident else self.mine * self.master

    @property
    def parameters(self) -> int:
        """Bytes of the whole that rest on this rank."""
        if self.resident:
            return self.numel * self.compute
        return self.mine * self.compute if self.common > 1 and not self.same else 0

    @property
    def gathered(self) -> int:
        """Bytes of the whole while it is here for a while."""
        return 0 if self.resident or self.common > 1 else self.numel * self.compute


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the strategy makes of the units.

    Args:
        pending: partial sums that wait at the same time; of shards if `every_leaf`.
        turns: leaves of a rank in a step.
        pool, least: buffers of one size that wait to be used again, and their bytes at least.
        in_flight: bytes of gradients under way at most, besides the last unit.
        ranks: among which gradients are sent.
        ahead: bytes that are gathered ahead of their use at most.
        in_use: bytes of units that are used or gathered ahead, once the order of leaves is known; None: it is not.
        kept: bytes of units that stay whole while nobody uses them.
        layerwise: bytes of gradients of units whose backward is under way, where others are updated and gone; None:
            all wait for the step.
        received: whole gradients that come to this rank at most where one partial sum of each rank travels.
        at_once: bytes of others' partial sums that come in one round; 0: all travel in two.
    """

    shard: Shard
    units: Sequence[UnitBill]
    pending: int
    every_leaf: bool
    turns: int
    pool: int
    least: int
    in_flight: int
    ranks: int
    received: float = 1.0
    at_once: int = 0
    ahead: int = 0
    in_use: int | None = None
    kept: int = 0
    layerwise: int | None = None


def gathered_at_most(units: Sequence[UnitBill], ahead: int = 0) -> int:
    """Bytes of units that are whole at the same time: one, one that is used again soon, those around, those ahead."""
    own = sorted((u.gathered for u in units), reverse=True)
    return min(sum(own), max((u.around for u in units), default=0) + sum(own[:2]) + ahead)


def gradients_kept(p: Plan) -> int:
    """Bytes of buffers for the step's gradient that wait for the next step: at most `pool` of one size."""
    sizes = sorted(u.mine * u.reduce for u in p.units if u.trainable and u.agreed and u.common_gradient == 1)
    return sum(size * min(p.pool, len(list(alike))) for size, alike in groupby(sizes) if size >= p.least)


def gradients_at_most(p: Plan) -> tuple[int, int, int]:
    """Bytes of one leaf's gradients, of partial sums, and of the step's gradient where it has memory of its own.

    Where gradients travel after every leaf, shards of sums wait, and one leaf's gradients are on their way. The last
    leaf's gradients become the partial sum: nothing is counted twice.
    """
    trained = [u for u in p.units if u.trainable]
    leaf = sum(u.used * u.compute for u in trained)
    whole = sum(u.numel * u.reduce for u in trained)
    cut = sum(u.mine * u.reduce for u in trained)
    waiting = whole + p.pending * cut if p.every_leaf else p.pending * whole
    means = [u.mine * u.reduce for u in trained if u.agreed and u.common_gradient == 1]
    mean = sum(means)
    if p.layerwise is not None:
        two = sum(sorted(u.numel * u.reduce for u in trained)[-2:])  # one is taken, one is under way
        earlier = (p.pending * cut if p.every_leaf else p.pending * whole) if p.turns > 1 else 0
        return p.layerwise, two + earlier, sum(sorted(means)[-2:])
    return leaf, waiting - (leaf if p.turns == 1 else 0), mean


def staging_at_most(p: Plan) -> int:
    """Bytes that are copied for others, or have come from them, and are not summed yet."""
    if p.ranks == 1:
        return 0
    sums = 1 if p.every_leaf else p.pending
    sizes = [u.numel * u.reduce * sums for u in p.units if u.trainable]
    return round(max(1.0, p.received) * min(sum(sizes), p.in_flight * sums + max(sizes, default=0)))


def staging_at_rest(p: Plan) -> int:
    """Bytes of it that wait for the next step: little, and what malloc would not keep."""
    large = sum(u.numel * u.reduce for u in p.units if u.trainable and u.numel * u.reduce >= p.least)
    return min(staging_at_most(p), WARM + large)


def state_entries(p: Plan, now: Mapping[str, int], optimizer: int) -> Iterator[Entry]:
    """What rests always.

    Args:
        now: bytes in use, by name.
        optimizer: predicted bytes of its state.
    """
    whole = sum(u.parameters for u in p.units)
    masters = sum(u.masters for u in p.units)
    shared = any(u.common > 1 for u in p.units)
    yield Entry(
        name="parameters", kind="parameters", now=now["parameters"], rest=whole, peak=whole, lifetime="always",
        setting="strategy, precision", shared=shared,
    )  # fmt: skip
    most = gathered_at_most(p.units, p.ahead) if p.in_use is None else p.in_use
    yield Entry(
        name=GATHERED, kind="parameters", now=now["gathered"], rest=0, peak=most, lifetime="gathered",
        setting="units",
    )  # fmt: skip
    yield Entry(
        name=KEPT_UNITS, kind="parameters", now=now["kept"], rest=0, peak=p.kept, lifetime="between uses",
        setting="memory",
    )  # fmt: skip
    yield Entry(
        name="masters", kind="masters", now=now["masters"], rest=masters, peak=masters, lifetime="always",
        setting="masters", shared=shared and any(u.same for u in p.units),
    )  # fmt: skip
    wide = sum(u.mine * 4 for u in p.units if u.stochastic and u.trainable)
    yield Entry(
        name="masters while updating", kind="masters", now=now["wide"], rest=0, peak=wide, lifetime="step",
        setting="masters",
    )  # fmt: skip
    yield Entry(
        name="optimizer state", kind="optimizer", now=now["optimizer"], rest=optimizer, peak=optimizer,
        lifetime="always", setting="strategy",
    )  # fmt: skip


def gradient_entries(p: Plan, now: Mapping[str, int]) -> Iterator[Entry]:
    """What comes and goes with gradients."""
    trained = [u for u in p.units if u.trainable]
    leaf, waiting, mean = gradients_at_most(p)
    kept = gradients_kept(p)
    first = 0 if p.layerwise is None else sum(gradients_at_most(replace(p, layerwise=None)))
    yield Entry(
        name="gradients of a leaf", kind="gradients", now=now["leaf"], rest=0, peak=leaf, lifetime="leaf",
        setting="units",
    )  # fmt: skip
    yield Entry(
        name="sums over leaves", kind="gradients", now=now["sums"], rest=0, peak=max(0, waiting + mean - kept),
        lifetime="step", setting="strategy, leaves, twig",
    )  # fmt: skip
    yield Entry(
        name=FIRST_STEP, kind="gradients", now=now["first"], rest=0, peak=first, lifetime="first step",
        setting="layerwise",
    )  # fmt: skip
    yield Entry(
        name="gradient buffers kept", kind="gradients", now=now["pool"], rest=kept, peak=kept,
        lifetime="between steps", setting="units",
    )  # fmt: skip
    common = sum(u.mine * u.reduce // u.common_gradient for u in trained if u.common_gradient > 1)
    yield Entry(
        name="common gradient", kind="gradients", now=now["common"], rest=common, peak=common, lifetime="always",
        setting="carrier", shared=True,
    )  # fmt: skip


def at_once_entries(p: Plan, now: int) -> Iterator[Entry]:
    """Where others' gradients come in one round: this step's, and the next one's."""
    yield Entry(
        name="gradients of others", kind="staging", now=now, rest=p.at_once, peak=2 * p.at_once,
        lifetime="between steps", setting="one_round",
    )  # fmt: skip


def carrier_entries(p: Plan, kept: Kept) -> Iterator[Entry]:
    """What the carrier has for what travels."""
    rest, most = (staging_at_rest(p), staging_at_most(p)) if kept.stages else (0, 0)
    yield Entry(
        name="staging", kind="staging", now=kept.under_way + kept.waiting, rest=rest, peak=most, lifetime="in flight",
        setting="carrier",
    )  # fmt: skip
    yield Entry(
        name="rings", kind="staging", now=kept.fixed, rest=kept.fixed, peak=kept.fixed, lifetime="always",
        setting="carrier", shared=True,
    )  # fmt: skip


def other(name: str, now: int, *, lifetime: str, setting: str, most: int | None = None) -> Entry:
    """What the user asked for: it rests as it is, unless it is lent."""
    rest = 0 if lifetime == "lent" else now
    return Entry(
        name=name, kind="other", now=now, rest=rest, peak=now if most is None else most, lifetime=lifetime,
        setting=setting,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Memory(Mapping[str, int]):
    """The memory of one rank: a mapping from kind to bytes in use now, and a table when printed.

    Args:
        entries: the ledger.
        title: which rank of what.
        measure: asks the system, which takes milliseconds in a large process.
    """

    entries: tuple[Entry, ...]
    title: str
    measure: Callable[[], Mapping[str, int]]

    def __getitem__(self, kind: str) -> int:
        if kind not in KINDS:
            raise KeyError(kind)
        return sum(e.now for e in self.entries if e.kind == kind)

    def __iter__(self) -> Iterator[str]:
        return iter(KINDS)

    def __len__(self) -> int:
        return len(KINDS)

    @property
    def measured(self) -> Mapping[str, int]:
        """Bytes by name as the system tells them now; empty where it does not."""
        return self.measure()

    @property
    def total(self) -> int:
        """Bytes in use now."""
        return sum(e.now for e in self.entries)

    @property
    def rest(self) -> int:
        """Bytes between two steps, as predicted."""
        return sum(e.rest for e in self.entries)

    @property
    def peak(self) -> int:
        """Bytes that no moment exceeds, as predicted: the sum of what each buffer has at most."""
        return sum(e.peak for e in self.entries)

    def __str__(self) -> str:
        width = max(24, *(len(e.name) + 2 for e in self.entries))
        lines = [f"{self.title}, MiB", f"{'':{width}}{'now':>9}{'at rest':>9}{'at most':>9}  lifetime       setting"]
        for e in self.entries:
            if e.now or e.peak:
                name = e.name + (" *" if e.shared else "")
                about = f"{e.lifetime:13}  {e.setting}"
                lines.append(f"{name:{width}}{_mib(e.now)}{_mib(e.rest)}{_mib(e.peak)}  {about}")
        lines.append(f"{'in all':{width}}{_mib(self.total)}{_mib(self.rest)}{_mib(self.peak)}")
        if any(e.shared and (e.now or e.peak) for e in self.entries):
            lines.append("* ranks of this host share it: this rank's part")
        lines += [f"{'measured: ' + name:{width}}{_mib(n)}" for name, n in self.measured.items()]
        return "\n".join(lines)


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:9.2f}"
