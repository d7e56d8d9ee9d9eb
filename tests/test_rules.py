"""The table of rules: its text, and that every line of it matters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
import torch

import shoal
from shoal.comm.threads import run
from shoal.rules import Moment, Op, Rule, Rules, explain, rules
from shoal.strategy import NAMED, Shard, Strategy
from tests.engine.test_models import Stack
from tests.engine.trials import Numbers, Result, adamw, inputs

DDP = """\
ddp: shard=NOTHING, a copy is 1 rank, cut=even, precision=float32, numerics=exact
  after backward   last leaf   reduce  gradients: each owner gets its shard of the copy's sums
  after backward   last leaf   agree   gradients: sum over copies, divided by the weights
  after update     every step  gather  parameters: shards -> whole, inside a copy"""
ZERO1 = """\
zero1: shard=OPTIMIZER, a copy is the world, cut=even, precision=float32, numerics=exact
  after backward   last leaf   reduce  gradients: each owner gets its shard of the copy's sums
  after backward   last leaf   agree   gradients: sum over copies, divided by the weights
  after update     every step  gather  parameters: shards -> whole, inside a copy"""
ZERO2 = """\
zero2: shard=GRADIENTS, a copy is the world, cut=even, precision=float32, numerics=exact
  after backward   every leaf  reduce  gradients: each owner gets its shard of the copy's sums
  after backward   last leaf   agree   gradients: sum over copies, divided by the weights
  after update     every step  gather  parameters: shards -> whole, inside a copy"""
PARAMETERS = """
  before forward   every leaf  gather  parameters: shards -> whole, inside a copy
  after forward    every leaf  free    parameters: drop the whole, keep the shard
  before backward  every leaf  gather  parameters: shards -> whole, inside a copy
  after backward   every leaf  free    parameters: drop the whole, keep the shard
  after backward   every leaf  reduce  gradients: each owner gets its shard of the copy's sums
  after backward   last leaf   agree   gradients: sum over copies, divided by the weights"""
ZERO3 = "zero3: shard=PARAMETERS, a copy is the world, cut=even, precision=float32, numerics=exact" + PARAMETERS
HYBRID = (
    "hybrid: shard=PARAMETERS, a copy is the ranks of one host, cut=even, precision=float32, numerics=exact"
    + PARAMETERS
)
TEXTS = {"ddp": DDP, "zero1": ZERO1, "zero2": ZERO2, "zero3": ZERO3, "hybrid": HYBRID}


@pytest.mark.parametrize("name", NAMED)
def test_the_table(name: str) -> None:
    assert Strategy.named(name).explain() == explain(Strategy.named(name)) == TEXTS[name]


def test_the_table_of_a_grid() -> None:
    assert "a copy is 3 ranks" in Strategy(shard=Shard.PARAMETERS, ranks_per_copy=3).explain()


# -------------------------------------------------------------------- every rule matters


WORLDS = {"ddp": (2, 1), "zero1": (2, 2), "zero2": (2, 2), "zero3": (2, 2), "hybrid": (4, 2)}
"""Per name the world and the ranks of a copy. bfloat16, so that a gather after the update matters for ddp too."""


class Seen(NamedTuple):
    """What can be checked from outside."""

    equality: Result
    memory: dict[str, int]
    traffic: dict[str, int]


def observe(name: str, table: Rules | None = None) -> Seen:
    """Two steps of eight leaves: results, the most bytes of parameters and gradients at any moment, and bytes sent."""
    world, ranks_per_copy = WORLDS[name]
    strategy = Strategy(shard=NAMED[name].shard, ranks_per_copy=ranks_per_copy, leaves=8, precision="bfloat16")

    def rank_main(_rank: int) -> Seen:
        with shoal.init(strategy, run_dir="none", device="cpu") as job:
            model = Stack(6)
            model, optimizer = job.prepare(model, adamw(model))
            most = {"parameters": 0, "gradients": 0}

            def look(*_: object) -> None:
                now = job.memory()
                most.update({k: max(v, now[k]) for k, v in most.items()})

            for module in [model.last, *model.blocks]:
                module.register_forward_pre_hook(look)
                next(module.parameters()).register_post_accumulate_grad_hook(look)
            for number in job.loader(Numbers(16), global_batch=8, shuffle=False):
                model(inputs(0, int(number), 3, 5)).square().mean().backward()
                look()
                optimizer.step()
                optimizer.zero_grad()
            return Seen(Result(job.state_dict(model), job.state_dict(optimizer), []), most, job.traffic)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal.engine.residence.AHEAD", 0)  # else all of so small a model is gathered ahead, freed or not
        if table is not None:
            patch.setattr("shoal.job.rules", lambda _s: table)
            patch.setattr("shoal.data.feed.rules", lambda _s: table)
        return run(world, rank_main)[0]


@cache
def unbroken(name: str) -> Seen:
    return observe(name)


def failing(name: str, table: Rules) -> set[str]:
    """The checks that fail under a broken table; an error is as good as other numbers."""
    want = unbroken(name)
    try:
        got = observe(name, table)
    except Exception:
        return {"equality"}
    found = {
        "equality": any(not torch.equal(v, want.equality.model[k]) for k, v in got.equality.model.items()),
        "memory": any(v > want.memory[k] for k, v in got.memory.items()),
        "traffic": got.traffic != want.traffic,
    }
    return {check for check, fails in found.items() if fails}


def broken() -> Iterator[tuple[str, Rules, str, str]]:
    """Per strategy and rule: the table without it, and with its `last` the other way; the check that has to fail."""
    for name in NAMED:
        table = rules(Strategy.named(name))
        for i, rule in enumerate(table):
            rest = table[:i], table[i + 1 :]
            what = f"{rule.moment.value}: {rule.op.value}"
            yield name, rest[0] + rest[1], f"{name} without {what}", "memory" if rule.op is Op.FREE else "equality"
            if rule.moment is not Moment.AFTER_UPDATE:  # there is only one a step
                other = (*rest[0], rule._replace(last=not rule.last), *rest[1])
                check = {"after backward: reduce": "traffic", "after backward: free": "memory"}.get(what, "equality")
                yield name, other, f"{name} {what}, {'every' if rule.last else 'last'} leaf", check


@pytest.mark.parametrize(("name", "table", "check"), [pytest.param(n, t, c, id=i) for n, t, i, c in broken()])
def test_every_rule_matters(name: str, table: Rules, check: str) -> None:
    assert check in failing(name, table)


@pytest.mark.parametrize("name", NAMED)
def test_the_unbroken_table_fails_no_check(name: str) -> None:
    assert failing(name, rules(Strategy.named(name))) == set()


@pytest.mark.parametrize("name", NAMED)
def test_numbers_are_those_of_one_process(name: str) -> None:
    want = unbroken("ddp").equality.model
    for key, value in unbroken(name).equality.model.items():
        assert torch.equal(value, want[key]), key


def test_a_rule_too_many_is_seen() -> None:
    """Gathering parameters that rest everywhere is paid for on the wire."""
    table = (*rules(Strategy.named("zero1")), Rule(Moment.AFTER_UPDATE, Op.GATHER))
    assert failing("zero1", table) == {"traffic"}
