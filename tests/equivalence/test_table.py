"""The heart of the suite: every strategy x world x leaves x optimizer x precision ends in the bits of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from shoal.strategy import Cut, Shard, Strategy
from tests.equivalence.models import Outcome, adamw, on_threads, sgd

STRATEGIES = {"ddp": Shard.NOTHING, "zero1": Shard.OPTIMIZER, "zero2": Shard.GRADIENTS, "zero3": Shard.PARAMETERS}
OPTIMIZERS = {"sgd": sgd, "adamw": adamw}
GRID = [(name, world, None) for name in STRATEGIES for world in (1, 2, 3, 4)]
GRID += [("zero3", 4, 2), ("zero3", 6, 3), ("zero3", 6, 2), ("zero1", 4, 2), ("zero2", 4, 2)]


@cache
def one_process(leaves: int, optimizer: str, precision: str) -> Outcome:
    return on_threads(1, "ddp", leaves=leaves, precision=precision, make_optimizer=OPTIMIZERS[optimizer])


@pytest.mark.every(3)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("optimizer", "common"), [("sgd", False), ("adamw", False), ("adamw", True)])
@pytest.mark.parametrize("leaves", [4, 12])
@pytest.mark.parametrize(("name", "world", "ranks_per_copy"), GRID)
def test_equals_one_process(
    name: str, world: int, ranks_per_copy: int | None, leaves: int, optimizer: str, precision: str, common: bool
) -> None:
    """`common`: ranks share memory, as on one host."""
    strategy = Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy)
    make = OPTIMIZERS[optimizer]
    got = on_threads(
        world, strategy, leaves=leaves, precision=precision, make_optimizer=make, order=world, common=common
    )
    assert got == one_process(leaves, optimizer, precision)


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize("name", STRATEGIES)
def test_any_number_of_leaves(name: str, leaves: int) -> None:
    """World and leaves need not divide each other; a rank may have no leaf at all. 120 samples a step, 56 in all."""
    want = on_threads(1, "ddp", leaves=leaves, global_batch=120)
    assert on_threads(3, name, leaves=leaves, global_batch=120) == want


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("cut", list(Cut))
def test_cuts_and_overlap_change_nothing(name: str, cut: Cut, overlap: bool) -> None:
    strategy = Strategy(shard=STRATEGIES[name], cut=cut)
    assert on_threads(3, strategy, leaves=4, overlap=overlap) == one_process(4, "adamw", "float32")


@pytest.mark.every(3)
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize(("leaves", "clip"), [(3, None), (4, 0.5), (6, None)])
@pytest.mark.parametrize(("name", "world", "ranks_per_copy"), [g for g in GRID if g[1] in (2, 3, 4)])
def test_pending_updates_change_nothing(
    name: str, world: int, ranks_per_copy: int | None, leaves: int, clip: float | None, common: bool
) -> None:
    """Nor does it in which order they are done, nor what a scheduler has set meanwhile."""
    strategy = Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy)
    got = on_threads(world, strategy, leaves=leaves, clip=clip, pending=True, common=common, order=world)
    assert got == clipped(leaves, clip)


@pytest.mark.parametrize("size", [60_000, 100])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_size_of_units_changes_nothing(name: str, size: int) -> None:
    """Two blocks that travel as one, or every module by itself."""
    assert on_threads(3, name, leaves=4, units=size) == one_process(4, "adamw", "float32")


@pytest.mark.every(3)
@pytest.mark.parametrize("memory", ["300KiB", "500KiB", "550KiB"])
@pytest.mark.parametrize("leaves", [2, 4, 6])
@pytest.mark.parametrize(("world", "ranks_per_copy", "common"), [(2, 2, False), (4, 2, False), (2, 2, True)])
def test_budgets_change_nothing(
    world: int, ranks_per_copy: int, common: bool, leaves: int, memory: str
) -> None:  # fmt: skip
    """Not what stays whole in a leaf, nor from one leaf to the next: at the first budget next to nothing, then all."""
    strategy = Strategy(shard=Shard.PARAMETERS, ranks_per_copy=ranks_per_copy)
    got = on_threads(world, strategy, leaves=leaves, memory=memory, common=common, order=leaves)
    assert got == one_process(leaves, "adamw", "float32")


@pytest.mark.every(3)
@pytest.mark.parametrize(("leaves", "precision", "common"), [(4, "float32", False), (6, "bfloat16", True)])
@pytest.mark.parametrize(("name", "world", "ranks_per_copy"), [g for g in GRID if g[1] in (1, 2, 3, 4)])
def test_layerwise_updates_change_nothing(
    name: str, world: int, ranks_per_copy: int | None, leaves: int, precision: str, common: bool
) -> None:
    """Nor does it when some parameters are never touched, or ranks have unequal numbers of leaves."""
    strategy = Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy)
    how = {"leaves": leaves, "precision": precision, "clip": None, "epochs": 2}
    assert on_threads(world, strategy, layerwise=True, common=common, order=world, **how) == unclipped(
        leaves, precision
    )


@cache
def unclipped(leaves: int, precision: str) -> Outcome:
    return on_threads(1, "ddp", leaves=leaves, precision=precision, clip=None, epochs=2)


@cache
def clipped(leaves: int, clip: float | None) -> Outcome:
    return on_threads(1, "ddp", leaves=leaves, clip=clip)


@pytest.mark.every(3)
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize(("leaves", "clip"), [(3, None), (4, 0.5), (6, None)])
@pytest.mark.parametrize(
    ("name", "ranks_per_copy", "ranks_per_host"),
    [("ddp", None, (2,)), ("ddp", None, (3,)), ("ddp", None, (1, 3)), ("ddp", None, (1, 1, 1, 1)), ("ddp", None, (6,)),
     ("zero1", 2, (2, 2))],
    ids=str,
)  # fmt: skip
def test_one_round_instead_of_two_changes_nothing(
    name: str, ranks_per_copy: int | None, ranks_per_host: tuple[int, ...], leaves: int, clip: float | None,
    pending: bool,
) -> None:  # fmt: skip
    world, strategy = sum(ranks_per_host), Strategy(shard=STRATEGIES[name], ranks_per_copy=ranks_per_copy)
    got = on_threads(
        world, strategy, leaves=leaves, clip=clip, pending=pending, ranks_per_host=ranks_per_host, order=world,
        one_round="1MiB",
    )  # fmt: skip
    assert got == clipped(leaves, clip)


@pytest.mark.parametrize("leaves", [1, 2, 5, 10])
def test_one_round_with_any_number_of_leaves(leaves: int) -> None:
    """Steps with all leaves, and steps with some, whose sums are not the ones that were expected."""
    want = on_threads(1, "ddp", leaves=leaves, global_batch=40)
    assert on_threads(3, "ddp", leaves=leaves, global_batch=40, one_round="1MiB") == want


ON_HOSTS = [(name, hosts) for name in STRATEGIES for hosts in ((2, 2), (2, 1), (1, 3))]


@pytest.mark.parametrize(("leaves", "pending"), [(4, False), (6, True)])
@pytest.mark.parametrize(("name", "ranks_per_host"), [*ON_HOSTS, ("hybrid", (2, 2)), ("hybrid", (2, 2, 2))], ids=str)
def test_hosts_change_nothing(name: str, ranks_per_host: tuple[int, ...], leaves: int, pending: bool) -> None:
    """Inside a host ranks have memory in common; what crosses to another is added up, or passed on, by hosts."""
    world = sum(ranks_per_host)
    got = on_threads(
        world, name, leaves=leaves, pending=pending, common=True, ranks_per_host=ranks_per_host, order=leaves
    )
    assert got == clipped(leaves, 0.5)


@pytest.mark.parametrize(
    ("ranks_per_host", "said"),
    [((2, 1), ["; exchange in two levels, 2 + 1 ranks on 2 hosts"]), ((1, 1, 1), []), ((3,), [])],
)
def test_two_levels_are_told(
    ranks_per_host: tuple[int, ...], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    on_threads(3, "zero1", leaves=3, ranks_per_host=ranks_per_host)
    line = capsys.readouterr().err.splitlines()[0]
    assert line.split("numerics exact")[1:] == (said or [""])


def test_one_round_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for one_round, end in (
        (10, "numerics exact"),
        (2**20, "numerics exact; gradients in one round, as they are small"),
    ):
        on_threads(2, "ddp", leaves=3, one_round=one_round)
        assert capsys.readouterr().err.splitlines()[0].endswith(end)


def test_several_copies_on_a_host_change_nothing() -> None:
    strategy = Strategy(shard=Shard.PARAMETERS, ranks_per_copy=2)
    got = on_threads(8, strategy, leaves=8, common=True, ranks_per_host=(4, 4), order=1)
    assert got == clipped(8, 0.5)


@pytest.mark.parametrize("order", range(5))
def test_who_runs_first_changes_nothing(order: int) -> None:
    assert on_threads(4, "zero3", leaves=4, order=order) == one_process(4, "adamw", "float32")


class Doubles(torch.optim.SGD):
    """Writes to the gradients that it is given."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(2)
        super().step()


def doubled(model: nn.Module) -> torch.optim.Optimizer:
    return Doubles(model.parameters(), lr=0.05, momentum=0.9)


def several(model: nn.Module) -> torch.optim.Optimizer:
    """With `foreach`, torch adds the momentum to the gradients themselves."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True)


def hooked(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = sgd(model)

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.clamp_(-1e-3, 1e-3).mul_(0.5)

    optimizer.register_step_pre_hook(before)
    return optimizer


@pytest.mark.parametrize("make", [doubled, several, hooked])
@pytest.mark.parametrize("name", STRATEGIES)
def test_updates_that_write_to_gradients(name: str, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """Each rank its own, even where the step's gradient lies in memory of them all."""
    want = on_threads(1, "ddp", leaves=4, make_optimizer=make)
    assert on_threads(2, name, leaves=4, make_optimizer=make, common=True) == want


def test_leaves_are_part_of_the_numbers() -> None:
    """So that the table is seen to be able to fail."""
    assert one_process(4, "adamw", "float32") != one_process(12, "adamw", "float32")
