"""Real processes over every carrier: the bits of one process, and the bytes of the dry run."""

from __future__ import annotations

import gc
import os
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shoal
from shoal.comm.meter import dry_run
from shoal.comm.pairwise import Gloo
from shoal.comm.sockets import sockets
from shoal.strategy import Strategy
from tests.equivalence.models import Outcome, on_threads, trainer
from tests.equivalence.test_dry_run import program
from tests.equivalence.test_table import STRATEGIES
from tests.pool import Pool

LEAVES = 4


@cache
def one_process(precision: str) -> Outcome:
    return on_threads(1, "ddp", leaves=LEAVES, precision=precision)


def train(strategy: Strategy | str, settings: dict[str, object]) -> Outcome | None:
    return trainer(strategy, timeout=20.0, **settings)(int(os.environ["RANK"]))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("carrier", ["gloo", "shared"])
def test_equals_one_process(name: str, world: int, carrier: str, pool: Pool) -> None:
    results = pool.run(train, name, {"leaves": LEAVES, "carrier": carrier}, world=world)
    assert results == [one_process("float32")] + [None] * (world - 1)


@pytest.mark.parametrize(("world", "leaves", "batch"), [(2, 4, 24), (3, 5, 40), (3, 2, 40)])
def test_one_round(world: int, leaves: int, batch: int, pool: Pool) -> None:
    """Where ranks announce what they receive, and where other sums come than they have announced."""
    how = {"leaves": leaves, "global_batch": batch, "carrier": "gloo", "one_round": "1MiB"}
    results = pool.run(train, "ddp", how, world=world)
    assert results == [on_threads(1, "ddp", leaves=leaves, global_batch=batch), *[None] * (world - 1)]


def posts(carrier: str) -> tuple[list[tuple[str, bool]], int]:
    """Of the last steps, what was sent, and whether others had heard that it would be received; what is left of that."""
    seen: list[tuple[str, bool]] = []
    post, lives = Gloo.post, list[Gloo]()

    def looked(self: Gloo, label: str, sends: Any, receives: Any) -> Any:
        seen.append((" ".join(label.split()[:2]), label in self._expected))
        lives[:] = [self]
        return post(self, label, sends, receives)

    Gloo.post = looked
    try:
        with shoal.init("ddp", leaves=4, one_round="1MiB", carrier=carrier, run_dir="none") as job:
            model, optimizer = job.prepare(net := torch.nn.Linear(4, 4), torch.optim.SGD(net.parameters(), lr=0.1))
            for step in range(6):
                if step == 3:
                    seen.clear()
                    with job.change(model):
                        pass
                for _ in range(4 // job.world_size):
                    model(torch.ones(2, 4)).sum().backward()
                    optimizer.step()
                optimizer.zero_grad()
            gc.collect()  # an engine that was replaced lies in a circle
            return seen, len(lives[0]._expected)
    finally:
        Gloo.post = post


def test_what_comes_every_step_is_announced(pool: Pool) -> None:
    """Nothing is expected for ever: not what an earlier model had announced, nor what comes in shared memory."""
    for seen, left in pool.run(posts, "gloo"):
        first = seen.index(("agree copies", False))
        assert [known for what, known in seen[first + 1 :] if what in ("agree copies", "meet world")].count(False) == 0
        assert [what for what, _ in seen].count("agree copies") == 3
        assert left == 2
    assert [left for _, left in pool.run(posts, "shared")] == [0, 0]


@pytest.mark.parametrize("carrier", ["gloo", "shared"])
@pytest.mark.parametrize(
    ("name", "settings"), [("zero1", {}), ("zero3", {"memory": "16MiB"})], ids=["zero1", "zero3, a budget"]
)
def test_layerwise_updates_and_budgets(name: str, settings: dict[str, object], carrier: str, pool: Pool) -> None:
    """No transfer waits for one that waits for it, nor is anything overwritten that others read."""
    how = {"leaves": LEAVES, "carrier": carrier, "layerwise": True, "clip": None, **settings}
    results = pool.run(train, name, how, world=2)
    assert results == [on_threads(1, "ddp", leaves=LEAVES, clip=None), None]


def test_hybrid_equals_one_process(pool: Pool) -> None:
    """Two hosts of two ranks."""
    results = pool.run(train, "hybrid", {"leaves": LEAVES, "precision": "bfloat16"}, world=4, ranks_per_host=2)
    assert results[0] == one_process("bfloat16")


def traffic(strategy: Strategy, carrier: str, one_round: str) -> dict[str, int]:
    os.environ["SHOAL_CARRIER"] = carrier
    return program(strategy, LEAVES, "float32", one_round)(int(os.environ["RANK"]))


@pytest.mark.parametrize(
    ("name", "ranks_per_copy", "carrier", "one_round"),
    [("ddp", None, "gloo", "1MiB")]
    + [(n, r, c, "0") for c in ("gloo", "shared") for n in STRATEGIES for r in (None, 2) if not (n == "ddp" and r)],
)
def test_bytes_equal_the_dry_run(
    name: str, ranks_per_copy: int | None, carrier: str, one_round: str, pool: Pool
) -> None:
    world = 4 if ranks_per_copy else 3
    strategy = Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy)
    measured = pool.run(traffic, strategy, carrier, one_round, world=world)
    ours, shared = program(strategy, LEAVES, "float32", one_round), carrier == "shared"
    assert measured == [dry_run(rank, world, ours, shared=shared) for rank in range(world)]


# ---------------------------------------------------------------- beside torch.distributed


def three_jobs() -> tuple[list[Outcome | None], list[int]]:
    """One after the other, and how many connections are open after each."""
    outcomes, opened = [], []
    for strategy in ("zero3", "ddp", "zero3"):
        outcomes.append(train(strategy, {"leaves": LEAVES}))
        gc.collect()
        opened.append(len(sockets()))
    return outcomes, opened


def test_jobs_one_after_the_other(pool: Pool) -> None:
    results = pool.run(three_jobs)
    assert results[0][0] == [one_process("float32")] * 3
    for _, opened in results:
        assert opened[-1] < opened[0] + 5, opened  # some close a moment later, on the other side


def beside(first: str) -> tuple[list[Outcome | None], list[float]]:
    """The user's own process group, set up before the job, in it, or around several jobs."""
    sums = []

    def own() -> None:
        ours = torch.tensor([1.0 + dist.get_rank()])
        dist.all_reduce(ours)
        sums.append(ours.item())

    outcomes: list[Outcome | None] = []
    if first == "torch":
        dist.init_process_group("gloo")
        own()
    outcomes.append(train("zero3", {"leaves": LEAVES}))
    if first == "shoal":
        dist.init_process_group("gloo")
    own()
    if first == "torch":
        dist.destroy_process_group()  # the store that both used goes on
    outcomes.append(train("zero1", {"leaves": LEAVES}))
    if first == "shoal":
        own()
    return outcomes, sums


@pytest.mark.parametrize("first", ["torch", "shoal"])
def test_a_process_group_of_the_users_own(first: str, pool: Pool) -> None:
    (outcomes, sums), (_, others) = pool.run(beside, first)
    assert outcomes == [one_process("float32")] * 2
    assert sums == others == [3.0, 3.0]


def inside() -> float:
    """The user's group and the job's in turns, over one store."""
    with shoal.init("zero3", run_dir="none", timeout=20.0) as job:
        dist.init_process_group("gloo")
        model = torch.nn.Linear(3, 2)
        model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        losses = torch.zeros(1)
        for _ in range(4):
            loss = model(torch.ones(2, 3) * job.rank).sum()
            loss.backward()
            losses += loss.detach()
            dist.all_reduce(losses)
            optimizer.step()
    return losses.item()


def test_a_process_group_inside_the_job(pool: Pool) -> None:
    first, second = pool.run(inside)
    assert first == second


def own_store() -> float:
    """A group over a store of the user's own, at the very address that the job is told."""
    rank = int(os.environ["RANK"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with shoal.init("ddp", run_dir="none", timeout=10.0) as job:
        return job.mean(job.rank) or 0.0


def test_a_store_of_the_users_own(pool: Pool) -> None:
    assert pool.run(own_store) == [0.5, 0.5]
