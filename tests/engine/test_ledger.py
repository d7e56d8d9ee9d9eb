"""The ledger: what it predicts is what tensors take, and what ZeRO's formulas say."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import shoal
from shoal.comm.arena import WARM
from shoal.comm.group import Kept
from shoal.comm.pool import LEAST
from shoal.comm.threads import run
from shoal.engine.ledger import (
    KINDS,
    Entry,
    Memory,
    Plan,
    UnitBill,
    carrier_entries,
    gathered_at_most,
    gradients_at_most,
    gradients_kept,
    staging_at_most,
    staging_at_rest,
    states_of,
)
from shoal.strategy import NAMED, Shard, Strategy

WIDTH = 64
BLOCKS = 6


class Net(nn.Module):
    """Blocks of one size between two layers that belong to the root."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(BLOCKS))
        self.last = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.last(x)


class Seen(NamedTuple):
    """Of one rank: the ledger between two steps, the most of every kind at any moment, and numbers of the model."""

    rest: Memory
    most: dict[str, int]
    most_in_all: int
    parameters: int
    optimizer: int


def seen(
    world: int, strategy: Strategy, *, leaves: int, common: bool = False, width: int = WIDTH, **settings: object
) -> list[Seen]:  # fmt: skip
    def rank_main(_rank: int) -> Seen:
        with shoal.init(strategy, leaves=leaves, run_dir="none", device="cpu", **settings) as job:
            model = Net(width)
            parameters = sum(p.numel() for p in model.parameters())
            model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters()))
            most = dict.fromkeys([*KINDS, "all"], 0)

            def look(*_: object) -> None:
                now = job.memory()
                most.update({k: max(most[k], now[k]) for k in KINDS})
                most["all"] = max(most["all"], now.total)

            for module in [model.first, *model.blocks, model.last]:
                module.register_forward_pre_hook(look)
                module.weight.register_post_accumulate_grad_hook(look)
            for _ in range(2):
                acted = False
                while not acted:
                    model(torch.randn(4, 8)).square().mean().backward()
                    look()
                    optimizer.step()
                    optimizer.zero_grad()
                    acted = job.stepped
            states = [v for s in optimizer.state.values() for v in s.values()]
            return Seen(job.memory(), most, most.pop("all"), parameters, sum(v.nbytes for v in states))

    return run(world, rank_main, common=common)


@pytest.mark.every(2)
@pytest.mark.parametrize("leaves", [4, 8])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("common", [False, True], ids=["apart", "common"])
@pytest.mark.parametrize(("name", "one_round"), [*((name, 0) for name in NAMED), ("ddp", 2**20)])
def test_predicted_is_measured(name: str, one_round: int, common: bool, precision: str, leaves: int) -> None:
    per_copy = 2 if name == "hybrid" else None
    strategy = Strategy(shard=NAMED[name].shard, ranks_per_copy=per_copy, precision=precision)
    for rank in seen(4, strategy, leaves=leaves, common=common, one_round=one_round):
        for entry in rank.rest.entries:
            assert entry.now == entry.rest, entry
        [others] = [e for e in rank.rest.entries if e.name == "gradients of others"]
        assert bool(others.rest) == bool(one_round and not common)
        assert rank.rest["optimizer"] == rank.optimizer
        for kind in KINDS:
            peak = sum(e.peak for e in rank.rest.entries if e.kind == kind)
            assert rank.most[kind] <= peak, (kind, rank.rest)
        assert rank.rest.rest == rank.rest.total <= rank.most_in_all <= rank.rest.peak


# ---------------------------------------------------------------- ZeRO's formulas


def formula(name: str, world: int, *, mixed: bool) -> float:
    """Bytes per parameter with Adam (Rajbhandari et al. 2020, section 3) but for gradients, which do not rest."""
    compute, masters, states = (2, 4, 8) if mixed else (4, 0, 8)
    cut = compute if not (masters and name == "zero3") else 0  # where all is cut, masters alone rest
    return {
        "ddp": compute + masters + states,
        "zero1": compute + (masters + states) / world,
        "zero2": compute + (masters + states) / world,
        "zero3": (cut + masters + states) / world,
    }[name]


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3"])
def test_formulas(name: str, precision: str, world: int) -> None:
    """Nothing rests but the state, which is the formula's."""
    for rank in seen(world, NAMED[name], leaves=world, precision=precision, width=128):
        state = rank.parameters * formula(name, world, mixed=precision == "bfloat16")
        assert rank.rest.total == pytest.approx(state, rel=0.03)


def test_what_all_see_has_both_dtypes() -> None:
    """Where ranks have the whole in common, each keeps its part of it beside its masters."""
    for rank in seen(4, NAMED["zero3"], leaves=4, precision="bfloat16", common=True, width=128):
        state = rank.rest["parameters"] + rank.rest["masters"] + rank.rest["optimizer"]
        assert state == pytest.approx(rank.parameters * (2 + 4 + 8) / 4, rel=0.03)


# ---------------------------------------------------------------- arithmetic


def unit(numel: int, mine: int, **other: object) -> UnitBill:
    facts = {"compute": 4, "master": 4, "reduce": 4, "trainable": True, "resident": False}
    return UnitBill(numel=numel, used=numel, mine=mine, **{**facts, **other})


def plan(*units: UnitBill, **other: object) -> Plan:
    facts = {"pending": 1, "every_leaf": True, "turns": 1, "pool": 2, "least": 0, "in_flight": 1000, "ranks": 2}
    return Plan(shard=Shard.PARAMETERS, units=units, **{**facts, **other})


def test_gathered_units() -> None:
    """One, the next, and the one around them."""
    block, root = unit(100, 50, around=40 * 4), unit(40, 20)
    assert gathered_at_most([root, block, block, block]) == (40 + 100 + 100) * 4
    assert gathered_at_most([root]) == 160
    assert gathered_at_most([unit(40, 20, resident=True), unit(40, 20, common=2)]) == 0


def test_gradient_buffers() -> None:
    block = unit(100, 50)
    assert gradients_kept(plan(block, block, block, unit(40, 20), unit(30, 15, trainable=False))) == 2 * 200 + 80
    assert gradients_at_most(plan(block)) == (400, 200, 200)
    assert gradients_at_most(plan(block, every_leaf=False, pending=3, turns=4)) == (400, 1200, 200)
    assert gradients_at_most(plan(unit(100, 100, common_gradient=2), every_leaf=False)) == (400, 0, 0)


def test_staging() -> None:
    block = unit(100, 50)
    assert staging_at_most(plan(block, ranks=1)) == 0
    assert staging_at_most(plan(block, received=1.5)) == 1.5 * staging_at_most(plan(block, received=0.5)) > 0
    assert staging_at_most(plan(block, block)) == 800
    assert staging_at_most(plan(*[block] * 10)) == 1000 + 400
    assert staging_at_most(plan(block, every_leaf=False, pending=3)) == 1200


def test_what_malloc_keeps_by_itself_does_not_wait() -> None:
    small, large = unit(2**20, 2**19), unit(2**25, 2**24)
    facts = {"least": LEAST, "in_flight": 2**30}
    assert gradients_kept(plan(small, large, **facts)) == 4 * 2**24
    assert staging_at_rest(plan(small, small, **facts)) == WARM < staging_at_most(plan(small, small, **facts))
    assert staging_at_rest(plan(small, large, **facts)) == WARM + 4 * 2**25
    assert staging_at_rest(plan(unit(100, 50), **facts)) == 400
    assert staging_at_rest(plan(small, large, ranks=1, **facts)) == 0


def test_states() -> None:
    found = [states_of("AdamW", {"amsgrad": a}) for a in (False, True)] + [states_of("SGD", {"momentum": 0.9})]
    assert found == [2, 3, 1]
    assert states_of("LARS", {"momentum": 0.9}) == 1
    assert states_of("Theirs", {}) is None


def test_an_optimizer_that_is_not_known_is_measured() -> None:
    class Theirs(torch.optim.Adam):
        pass

    def rank_main(_rank: int) -> list[int]:
        with shoal.init("zero1", run_dir="none", device="cpu") as job:
            model = Net()
            model, optimizer = job.prepare(model, Theirs(model.parameters()), elementwise=True)
            found = [entry for entry in job.memory().entries if entry.kind == "optimizer"]
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
            found += [entry for entry in job.memory().entries if entry.kind == "optimizer"]
            return [found[0].rest, found[1].rest - found[1].now]

    assert run(2, rank_main) == [[0, 0]] * 2


# ---------------------------------------------------------------- what is printed

TABLE = """\
rank 0, MiB
                              now  at rest  at most  lifetime       setting
gathered units               1.00     0.00     2.00  gathered       units
masters *                    3.00     3.00     3.00  always         masters
staging                      0.50     1.50     1.50  in flight      carrier
in all                       4.50     4.50     6.50
* ranks of this host share it: this rank's part
measured: pages              9.00"""


def entry(name: str, kind: str, now: float, rest: float, peak: float, *about: str, shared: bool = False) -> Entry:
    bytes_of = [int(n * 2**20) for n in (now, rest, peak)]
    return Entry(
        name=name, kind=kind, now=bytes_of[0], rest=bytes_of[1], peak=bytes_of[2], lifetime=about[0], setting=about[1],
        shared=shared,
    )  # fmt: skip


def test_the_table() -> None:
    """Entries of nothing are left out of the text, not of the mapping."""
    memory = Memory(
        entries=(
            entry("gathered units", "parameters", 1, 0, 2, "gathered", "units"),
            entry("masters", "masters", 3, 3, 3, "always", "masters", shared=True),
            entry("optimizer state", "optimizer", 0, 0, 0, "always", "strategy"),
            entry("staging", "staging", 0.5, 1.5, 1.5, "in flight", "carrier"),
        ),
        title="rank 0",
        measure=lambda: {"pages": 9 * 2**20},
    )
    assert str(memory) == TABLE
    assert memory.measured == {"pages": 9 * 2**20}
    assert dict(memory) == {
        "parameters": 2**20, "masters": 3 * 2**20, "gradients": 0, "optimizer": 0, "staging": 2**19, "other": 0,
    }  # fmt: skip
    with pytest.raises(KeyError, match="money"):
        memory["money"]


def test_the_carrier_tells() -> None:
    kept = Kept(1, 2, 4) + Kept(10, 20, 40, stages=False)
    assert kept == Kept(11, 22, 44, stages=True)
    block = unit(100, 50)
    staging, rings = carrier_entries(plan(block), kept)
    assert (staging.now, staging.rest, rings.now) == (33, 400, 44)
    assert next(carrier_entries(plan(block), Kept(stages=False))).peak == 0


def test_what_the_user_asks_for_is_on_the_bill() -> None:
    def rank_main(_rank: int) -> list[int]:
        with shoal.init("zero3", run_dir="none", device="cpu") as job:
            model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
            model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            found = [job.memory()["other"]]
            average = job.ema(model, 0.9)
            found.append(job.memory()["other"])
            with job.whole(model):
                found.append(job.memory()["other"])
            found.append(job.memory()["other"])
            assert average.pieces
            return found

    whole = (64 * 64 + 3 * 64) * 4
    ranks = run(2, rank_main)
    for nothing, average, lent, after in ranks:
        assert (nothing, after, lent) == (0, average, average + whole)
    assert sum(average for _, average, _, _ in ranks) == whole
