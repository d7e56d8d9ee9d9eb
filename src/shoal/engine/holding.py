"""What is in memory now, tensor by tensor, and what the ledger has to know of units and optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from shoal.comm.group import Group
from shoal.comm.pool import least
from shoal.engine.binding import Binding
from shoal.engine.engine import Engine
from shoal.engine.gradients import Gradients
from shoal.engine.ledger import (
    LENT,
    UNCOUNTED,
    Entry,
    Memory,
    Plan,
    UnitBill,
    at_once_entries,
    carrier_entries,
    gradient_entries,
    other,
    state_entries,
    states_of,
)
from shoal.engine.residence import AHEAD
from shoal.engine.unit import Unit
from shoal.engine.units import beside
from shoal.leaves import Assignment, pending

_MEASURED = {"Pss": "pages, shared ones by part", "Rss": "pages, shared ones in full"}


def memory(bindings: Sequence[Binding], world: Group) -> Memory:
    """The ledger of this rank."""
    found = [list(_entries(binding)) for binding in bindings]
    entries = [_sum(alike) for alike in zip(*found, strict=True)]
    carrying = carrier_entries(_staged(bindings), world.carrier.kept())
    strategy = bindings[0].strategy
    return Memory(
        entries=(*entries, *carrying),
        title=f"memory of rank {world.rank} of {world.size}: {strategy.name}, {strategy.precision}",
        measure=partial(measured, bindings[0].engine.units[0].device),
    )


def _sum(alike: Sequence[Entry]) -> Entry:
    """One entry of several models."""
    first = alike[0]
    return Entry(
        name=first.name, kind=first.kind, now=sum(e.now for e in alike), rest=sum(e.rest for e in alike),
        peak=sum(e.peak for e in alike), lifetime=first.lifetime, setting=first.setting,
        shared=any(e.shared for e in alike),
    )  # fmt: skip


def measured(device: torch.device) -> dict[str, int]:
    """Bytes of this process by what they are, where the system tells them, and of the device."""
    found: dict[str, int] = {}
    rollup = Path("/proc/self/smaps_rollup")
    for line in rollup.read_text().splitlines()[1:] if rollup.exists() else ():
        field, value = line.split(":")
        if field in _MEASURED:
            found[_MEASURED[field]] = int(value.split()[0]) * 1024
    if device.type not in ("cpu", "meta"):
        found["tensors on the device"] = torch.accelerator.memory_allocated(device)
        found["tensors on the device at most"] = torch.accelerator.max_memory_allocated(device)
    return found


# ---------------------------------------------------------------- of one model


def _entries(binding: Binding) -> Iterator[Entry]:
    engine = binding.engine
    units, buffers = engine.units, engine.buffers
    plan = plan_of(binding)
    now = _units_now(units, engine.presence.idle() if engine.budgeted else ()) | _gradients_now(engine.gradients)
    now["first"] = 0
    if engine.gradients.layerwise and not engine.steps:
        now |= {"first": now["leaf"] + now["sums"], "leaf": 0, "sums": 0}
    now["optimizer"] = sum(_bytes(_state_of(optimizer)) for optimizer in binding.optimizers)
    yield from state_entries(plan, now, sum(_states_predicted(o, binding) for o in binding.optimizers))
    yield from gradient_entries(plan, now)
    yield from at_once_entries(plan, now["others"])
    copies = [*buffers.start, *(b for _, made in buffers.leaves.values() for b in made)]
    yield other("copies of buffers", _bytes(copies) + buffers.pool.nbytes, lifetime="between steps", setting="leaves")
    averages = [piece for average in binding.averages for piece in average.pieces.values()]
    yield other("averages of weights", _bytes(averages), lifetime="always", setting="job.ema")
    lent = [u.lent for u in units if u.lent is not u.whole]
    most = sum(u.numel * u.dtypes.compute.itemsize for u in units if not u.resident)
    yield other(LENT, _bytes(lent), lifetime="lent", setting="job.whole", most=most)


def plan_of(binding: Binding) -> Plan:
    """What the ledger predicts from."""
    engine, mesh = binding.engine, binding.engine.mesh
    twigs = -(-engine.leaves // engine.twig)
    waiting = pending(twigs, _twigs(engine.assignment, engine.twig), mesh.shard.size, every_leaf=engine.every_leaf)
    units, residence = bill_of(binding), engine.plan
    whole = sum(u.gathered for u in units)
    largest = max((u.gathered for u in units), default=0)
    return Plan(
        shard=binding.strategy.shard,
        units=units,
        pending=waiting + (engine.twig > 1),  # a twig under way is a sum of its own
        every_leaf=engine.every_leaf, turns=engine.turns.count, pool=engine.gradients.pool.kept,
        least=least(engine.units[0].device), ranks=mesh.data.size, in_flight=engine.gradients.journeys.limit,
        ahead=residence.ahead if residence else largest if engine.budgeted else max(AHEAD, 2 * largest),
        in_use=residence.in_use if residence and engine.budgeted else None,
        kept=(residence.most if residence else whole) if engine.budgeted else 0,
        layerwise=engine.moments.begun_most if engine.gradients.layerwise else None,
        received=max(group.hosts.received(group.rank) for group in (mesh.shard, mesh.copies)),
        at_once=_at_once(engine),
    )  # fmt: skip


def _at_once(engine: Engine) -> int:
    """Bytes of other ranks' partial sums that come in one round."""
    at_once, sums = engine.gradients.at_once, engine.turns.sums
    return 0 if at_once is None else at_once.nbytes * (sum(sums) - sums[engine.mesh.cell])


def bill_of(binding: Binding) -> list[UnitBill]:
    """A model's units as the ledger sees them."""
    engine = binding.engine
    others, sizes = beside(engine.units), engine.sizes
    return [_bill(u, engine.gradients, sum(sizes[i] for i in others[u.index])) for u in engine.units]


def _staged(bindings: Sequence[Binding]) -> Plan:
    """All models' units: one carrier serves them."""
    plans = [plan_of(binding) for binding in bindings]
    first = plans[0]
    return Plan(
        shard=first.shard, units=[u for p in plans for u in p.units], pending=first.pending, turns=first.turns,
        every_leaf=first.every_leaf, pool=first.pool, least=first.least, in_flight=first.in_flight,
        ranks=first.ranks, received=first.received,
    )  # fmt: skip


def _twigs(assignment: Assignment, twig: int) -> Assignment:
    return tuple(tuple(dict.fromkeys(leaf // twig for leaf in mine)) for mine in assignment)


def _bill(unit: Unit, gradients: Gradients, others: int) -> UnitBill:
    shard, copies, dtypes = gradients.mesh.shard, gradients.mesh.copies, unit.dtypes
    return UnitBill(
        numel=unit.numel, used=unit.layout.used, mine=unit.mine.stop - unit.mine.start, around=others,
        compute=dtypes.compute.itemsize, master=dtypes.master.itemsize, reduce=dtypes.reduce.itemsize,
        trainable=unit.trainable, resident=unit.resident, stochastic=dtypes.stochastic,
        common=shard.size if unit.common else 1,
        common_gradient=copies.size if gradients.commons.get(unit.index) else 1,
        agreed=shard.size > 1 or copies.size > 1,
    )  # fmt: skip


def _units_now(units: Sequence[Unit], idle: Sequence[Unit]) -> dict[str, int]:
    now: dict[str, int] = {"parameters": 0, "gathered": 0, "kept": 0, "masters": 0, "wide": 0}
    for unit in units:
        same = unit.dtypes.compute == unit.dtypes.master
        if unit.common is not None:  # what all see is counted by who fills it
            now["parameters"] += 0 if same else unit.whole[unit.mine].nbytes
        else:
            name = "parameters" if unit.resident else "kept" if unit in idle else "gathered"
            now[name] += unit.whole.untyped_storage().nbytes()
        now["masters"] += 0 if same and unit.resident else unit.master.nbytes
        now["wide"] += 0 if unit.wide is None else unit.wide.nbytes
    return now


def _gradients_now(gradients: Gradients) -> dict[str, int]:
    trees = [*gradients.mine.values(), *gradients.sums.values()]
    waiting = [w.value for tree in trees for w in tree.nodes.values() if w.value]
    waiting += [w.value for _, w in gradients.growing.values() if w.value]
    sums = [strip for found in waiting for strip in found.strips]
    sums += [strip for m in gradients.results.values() if m.common is None for strip in m.strips or ()]
    shown = [p.grad for u in gradients.units for n, p in u.params.items() if p.grad is not gradients.guards[n]]
    common = [c.data for c in gradients.commons.values() if c]
    return {
        "leaf": _bytes([*gradients.held.values(), *(g for g in shown if g is not None)]),
        "sums": _bytes(sums),
        "pool": gradients.pool.nbytes,
        "others": _bytes(gradients.at_once.tensors if gradients.at_once else ()),
        "common": _bytes(common) // gradients.mesh.copies.size,
    }


# ---------------------------------------------------------------- of optimizers


def _state_of(optimizer: Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def _states_predicted(optimizer: Optimizer, binding: Binding) -> int:
    """Bytes of an optimizer's state from the second step on. For one that is not known: what it has now."""
    kind, total = type(optimizer).__name__, 0
    wide = {unit.pieces[n] for unit in binding.engine.units if unit.dtypes.stochastic for n in unit.pieces}
    for group in optimizer.param_groups:
        states = states_of(kind, group)
        if states is None:
            return _bytes(_state_of(optimizer))
        for piece in group["params"]:
            itemsize = 4 if piece in wide else piece.dtype.itemsize
            total += states * piece.numel() * itemsize + (0 if kind in UNCOUNTED else 4)
    return total


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())  # pyright: ignore[reportPrivateUsage]
