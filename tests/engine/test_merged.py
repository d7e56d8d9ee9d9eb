"""Units of several blocks, and several units of one: chosen by size, and no numbers change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextvars import copy_context

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shoal
from shoal.comm.group import current
from shoal.comm.meter import Meter
from shoal.engine.units import neighbours
from shoal.strategy import Strategy
from tests.engine.test_conditional import CASES, Chosen, choosing, reference
from tests.engine.test_models import Block, Stack, square
from tests.engine.trials import Leaf, adamw, assert_same, plain, train

BLOCK = 4 * sum(p.numel() for p in Block().parameters())
PAIRS = BLOCK + 1
ALL = 100 * BLOCK
PLACES = ["ddp", "zero2", "zero3", "hybrid"]


# -------------------------------------------------------------------- what is chosen


def test_neighbours_up_to_a_size() -> None:
    sizes = {"a.0": 4, "a.1": 5, "a.2": 6, "a.3": 3, "b.0": 1, "b.1": 1, "b.2": 12, "b.3": 2, "": 1}
    assert neighbours(sizes, 10) == [["a.0", "a.1", "a.2"], ["a.3"], ["b.0", "b.1"], ["b.2"], ["b.3"], [""]]
    assert neighbours(sizes, 0) == [[name] for name in sizes]


class Wide(Stack):
    """Much in it belongs to no block."""

    def __init__(self) -> None:
        super().__init__(4)
        self.embed, self.head = nn.Embedding(300, 100), nn.Linear(2, 20_000)
        self.norm = nn.LayerNorm(5)


def explained(make_model: Callable[[], nn.Module], units: int | list[str] | None) -> list[str]:
    with shoal.init("zero3", run_dir="none", device="cpu") as job:
        model, _ = (m := make_model()), job.prepare(m, adamw(m), units=units)
        text = job.explain()
    assert text.startswith(Strategy.named("zero3").settled(1, 1).explain())
    assert model is m
    return text.split("\n\n")[1].splitlines()


def test_what_explain_says() -> None:
    assert explained(Wide, 30_000) == [
        "  unit  modules                 parameters       MiB",
        "     0  blocks.0 to blocks.1        10,342      0.04  2 neighbours, merged up to 0.0286 MiB",
        "     1  blocks.2 to blocks.3        10,342      0.04  2 neighbours, merged up to 0.0286 MiB",
        "     2  embed                       30,000      0.11  one of 3 pieces of (root), 0.3 MiB, cut between modules",
        "     3  head                        60,000      0.23  one of 3 pieces of (root), 0.3 MiB, cut between modules",
        "     4  first and 2 more               556      0.00  one of 3 pieces of (root), 0.3 MiB, cut between modules",
    ]
    assert explained(lambda: Wide().requires_grad_(False).requires_grad_(True), ["blocks.1"])[1:] == [
        "     0  blocks.1         5,171      0.02",
        "     1  (root)         106,069      0.40  what belongs to no block",
    ]


# -------------------------------------------------------------------- what may happen to them


@pytest.mark.every(3)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [PAIRS, ALL])
@pytest.mark.parametrize("case", ["layer drop, per leaf", "a block in some steps", "the first block later"])
def test_blocks_that_only_some_leaves_use(case: str, size: int, place: str) -> None:
    """In the first leaf, or only later: a plan knows of visits, not of blocks."""
    make_model, leaf = CASES[case]
    got = train(place, make_model, leaf, make_optimizer=adamw, steps=4, units=size)
    assert_same(got, reference(case))


class Calls(Stack):
    """Its first block runs one of another unit, and then goes on with its own parameters."""

    def __init__(self) -> None:
        super().__init__(4)
        self.blocks[0] = Outer(self.blocks[3])


class Outer(Block):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]  # hidden from torch: it belongs to the list

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.into(x))
        return super().forward(self.other[0](x))


class Recomputed(Stack):
    def __init__(self, reentrant: bool) -> None:
        super().__init__(4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


def to_and_fro(model: nn.Module, step: int, number: int) -> Tensor:
    return choosing(lambda _s, _n: [0, 2, 1, 3, 0])(model, step, number)


def two_losses(model: nn.Module, step: int, number: int) -> Tensor:
    """The first goes through the first blocks only."""
    choosing(lambda _s, _n: [0])(model, step, number).backward()
    return choosing(lambda _s, _n: [1, 2, 3])(model, step, number)


SHAPES: dict[str, tuple[Callable[[], nn.Module], Leaf]] = {
    "a block inside another": (Calls, square),
    "recomputed": (lambda: Recomputed(False), square),
    "recomputed in a backward of its own": (lambda: Recomputed(True), square),
    "to and fro": (lambda: Chosen(4), to_and_fro),
    "two losses": (lambda: Chosen(4), two_losses),
    "pieces of blocks": (Wide, square),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [100, PAIRS, ALL])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, size: int, place: str) -> None:
    make_model, leaf = SHAPES[shape]
    assert_same(train(place, make_model, leaf, units=size), plain(make_model, leaf))


@pytest.mark.every(3)
@pytest.mark.parametrize("how", ["layerwise", "one layerwise", "a little room", "room"])
@pytest.mark.parametrize("size", [100, PAIRS])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_updated_early_or_kept(shape: str, size: int, how: str) -> None:
    """As `layerwise=` and `memory=` have it. The budgets have room for the largest unit, and for everything."""
    make_model, leaf = SHAPES[shape]
    place = (1 if how == "one layerwise" else 2, "zero3")
    budget = {"a little room": "1060KiB" if shape == "pieces of blocks" else "400KiB", "room": "8MiB"}.get(how)
    settings: dict[str, object] = {"layerwise": True} if budget is None else {"memory": budget}
    assert_same(train(place, make_model, leaf, units=size, **settings), plain(make_model, leaf))


def test_a_unit_stays_while_its_blocks_run() -> None:
    """In the very first leaf, where each gather is agreed on by itself."""
    found: list[list[bool]] = []

    def make_model() -> nn.Module:
        model = Stack(4)
        seen: list[bool] = []
        found.append(seen)

        def look(_module: nn.Module, _args: object, _out: object) -> None:
            seen.append(bool(model.blocks[0].into.weight.isfinite().all()))

        for block in model.blocks:
            block.register_forward_hook(look)
        return model

    train((2, "zero3"), make_model, square, leaves=2, units=PAIRS, steps=1)
    assert found == [[True, True, False, False]] * 2


# -------------------------------------------------------------------- how many transfers


def tiny(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))


def transfers(strategy: str, layers: int, units: int) -> Counter[str]:
    """Of the third step of rank 0 of two, by verb, without those in which ranks only meet."""

    def program(meter: Meter) -> Counter[str]:
        current.set(meter)
        with shoal.init(strategy, run_dir="none") as job:
            with job.device:
                model = tiny(layers)
            model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters()), units=units)
            for _ in range(3):
                before = meter.transfers.copy()
                model(torch.zeros(2, 64, device=job.device)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            return meter.transfers - before

    found = copy_context().run(program, Meter(0, 2))
    return Counter({verb: n for verb, n in found.items() if verb != "meet"})


@pytest.mark.parametrize(("strategy", "per_unit"), [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3)])
def test_transfers_are_bounded_by_bytes_not_by_layers(strategy: str, per_unit: int) -> None:
    nbytes, size = 200 * (64 * 64 + 64) * 4, 2**19
    found = transfers(strategy, 200, size)
    units = nbytes // size + 1
    assert 0 < found.total() <= per_unit * units, found
    assert transfers(strategy, 200, 0).total() > 390  # two for each layer, but for what is kept


# -------------------------------------------------------------------- time


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_world_of_one_costs_little(strategy: str) -> None:
    """Processor time of steps of 1,000 parameters, beside the plain loop's. `benchmarks/overhead.py` tells more."""
    import time

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        begin = time.process_time()
        for _ in range(5):
            model(torch.ones(4, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - begin

    with shoal.init(strategy, run_dir="none", device="cpu") as job:
        plain_model, model = tiny(500), tiny(500)
        plain_optimizer = adamw(plain_model)
        model, optimizer = job.prepare(model, adamw(model), units=2**20)
        ratios = [steps(model, optimizer) / steps(plain_model, plain_optimizer) for _ in range(6)]
    assert sorted(ratios[1:])[2] < 1.5, ratios
