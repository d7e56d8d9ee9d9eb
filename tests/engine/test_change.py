"""Models that change between steps: frozen, thawed, grown; the same bits as one process that does the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

import shoal
from shoal.comm.arena import Arena
from shoal.comm.shared_memory import Shared
from shoal.comm.threads import run
from shoal.errors import DivergedError, OptimizerError, OrderError, SaveError
from tests.pool import Pool

LEAVES = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3)))
        self.head = nn.Linear(12, 3)
        self.extra: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) if self.extra is None else self.head(x) + self.extra(x)


Change = Callable[[Net, Optimizer], None]


def thaw(net: Net, optimizer: Optimizer) -> None:
    net.head.requires_grad_(True)
    optimizer.add_param_group({"params": list(net.head.parameters()), "lr": 0.02})


def grow(net: Net, optimizer: Optimizer) -> None:
    torch.manual_seed(5)
    net.extra = nn.Linear(12, 3)
    optimizer.add_param_group({"params": list(net.extra.parameters())})


def shrink(net: Net, optimizer: Optimizer) -> None:
    gone = set(net.body[2].parameters())
    net.body = net.body[:2]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in gone]
    for param in gone:
        optimizer.state.pop(param, None)


def made(*, frozen_head: bool) -> tuple[Net, AdamW]:
    torch.manual_seed(3)
    net = Net()
    net.head.requires_grad_(not frozen_head)
    return net, AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)


def loss_of(net: nn.Module, step: int, leaf: int) -> Tensor:
    inputs = torch.randn(2, 12, generator=torch.Generator().manual_seed(100 * step + leaf))
    out: Tensor = net(inputs)
    return out.square().mean()


NUMBERS = cast("torch.utils.data.Dataset[int]", range(6 * LEAVES))


def train(what: str, strategy: str, ranks_per_copy: int | None = None) -> dict[str, Tensor]:
    changes, frozen_head = CHANGES[what]
    with shoal.init(strategy, leaves=LEAVES, ranks_per_copy=ranks_per_copy, run_dir="none") as job:
        net, optimizer = made(frozen_head=frozen_head)
        net, optimizer, scheduler = job.prepare(net, optimizer, StepLR(optimizer, 2))
        for number in job.loader(NUMBERS, global_batch=LEAVES, shuffle=False):
            step, leaf = divmod(int(number), LEAVES)
            loss_of(net, step, leaf).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if job.stepped and job.step % 2 == 0 and changes[job.step // 2 - 1 :]:
                with job.change(net):
                    changes[job.step // 2 - 1](net, optimizer)
        state, moments = job.state_dict(net), job.state_dict(optimizer)
        return {**state, **_flat(moments)}  # type: ignore[dict-item]


def _flat(moments: dict[str, object]) -> dict[str, Tensor]:
    states: dict[int, dict[str, Tensor]] = moments.get("state", {})  # type: ignore[assignment]
    return {f"{i}/{key}": value for i, state in states.items() for key, value in state.items()}


def sum_of_leaves(net: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Leaves added along shoal's tree (four of them: pairs), and divided."""
    grads: list[list[Tensor | None]] = []
    for leaf in range(LEAVES):
        optimizer.zero_grad()
        loss_of(net, step, leaf).backward()
        grads.append([p.grad for p in net.parameters()])
    for param, parts in zip(net.parameters(), zip(*grads, strict=True), strict=True):
        a, b, c, d = (part if part is not None else torch.zeros_like(param) for part in parts)
        param.grad = None if parts[0] is None else ((a + b) + (c + d)) / LEAVES + 0.0


def alone(changes: Sequence[Change], frozen_head: bool) -> dict[str, Tensor]:
    """The same in plain PyTorch."""
    net, optimizer = made(frozen_head=frozen_head)
    scheduler = StepLR(optimizer, 2)
    for step in range(6):
        sum_of_leaves(net, optimizer, step)
        optimizer.step()
        scheduler.step()
        if step % 2 and changes[step // 2 :]:
            optimizer.zero_grad()
            changes[step // 2](net, optimizer)
    return {**net.state_dict(), **_flat(optimizer.state_dict())}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not different


CHANGES: dict[str, tuple[list[Change], bool]] = {
    "thaw": ([thaw], True), "grow": ([grow], False), "thaw, then grow": ([thaw, grow], True), "shrink": ([shrink], False),
}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize(
    ("strategy", "world", "ranks_per_copy"),
    [("ddp", 1, None), ("ddp", 2, None), ("zero1", 3, None), ("zero2", 2, None), ("zero3", 3, None), ("hybrid", 4, 2)],
)
def test_equals_plain_pytorch(strategy: str, world: int, ranks_per_copy: int | None, what: str) -> None:
    ours = run(world, lambda _rank: train(what, strategy, ranks_per_copy))[0]
    assert_equal(ours, alone(*CHANGES[what]))


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_in_memory_that_processes_share(pool: Pool, strategy: str) -> None:
    ours = pool.run(train, "thaw, then grow", strategy, env={"SHOAL_CARRIER": "shared"})[0]
    assert_equal(ours, alone(*CHANGES["thaw, then grow"]))


def change_often(strategy: str) -> list[int]:
    with shoal.init(strategy, leaves=LEAVES, run_dir="none") as job:
        net, optimizer = job.prepare(*made(frozen_head=False))
        arena, held = arena_of(job), list[int]()
        for step in range(12):
            for leaf in range(LEAVES // job.world_size):
                loss_of(net, step, leaf).backward()
                optimizer.step()
            with job.change(net):
                pass
            on_its_way = arena.under_way
            held.append(sum(arena.taken.values()) - on_its_way)
        return held


def arena_of(job: shoal.Job) -> Arena:
    carrier = job._mesh.world.carrier  # pyright: ignore[reportPrivateUsage]
    while not isinstance(carrier, Shared):
        carrier = getattr(carrier, "host", None) or carrier.inner  # type: ignore[attr-defined]
    return carrier.arena


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_changes_use_the_memory_that_ranks_had_in_common_again(pool: Pool, strategy: str) -> None:
    for held in pool.run(change_often, strategy, env={"SHOAL_CARRIER": "shared"}):
        assert len(set(held)) == 1, held


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_freezing_and_thawing_what_was_trained_needs_no_change(strategy: str) -> None:
    def rank_main(_rank: int) -> dict[str, Tensor]:
        with shoal.init(strategy, leaves=LEAVES, run_dir="none") as job:
            net, optimizer = job.prepare(*made(frozen_head=False))
            for number in job.loader(NUMBERS, global_batch=LEAVES, shuffle=False):
                step, leaf = divmod(int(number), LEAVES)
                net.body[0].requires_grad_(step not in (2, 3))
                loss_of(net, step, leaf).backward()
                optimizer.step()
                optimizer.zero_grad()
            return {**job.state_dict(net), **_flat(job.state_dict(optimizer))}  # type: ignore[dict-item]

    def plain() -> dict[str, Tensor]:
        net, optimizer = made(frozen_head=False)
        for step in range(6):
            net.body[0].requires_grad_(step not in (2, 3))
            sum_of_leaves(net, optimizer, step)
            optimizer.step()
        return {**net.state_dict(), **_flat(optimizer.state_dict())}

    assert_equal(run(2, rank_main)[0], plain())


def test_what_was_saved_after_a_change_loads_into_the_changed_model(tmp_path: Path) -> None:
    def before(_rank: int) -> dict[str, object]:
        with shoal.init("zero3", leaves=LEAVES, run_dir="none") as job:
            net, optimizer = job.prepare(*made(frozen_head=True))
            with job.change(net):
                grow(net, optimizer)
            loss_of(net, 0, job.rank).backward()
            optimizer.step()
            loss_of(net, 0, 2 + job.rank).backward()
            optimizer.step()
            job.save(tmp_path)
            return job.state_dict(net)

    def after(_rank: int) -> dict[str, object]:
        with shoal.init("zero1", leaves=LEAVES, run_dir="none") as job:
            net, optimizer = made(frozen_head=True)
            grow(net, optimizer)
            job.prepare(net, optimizer)
            assert job.load(tmp_path) == 1
            return job.state_dict(net)

    saved = run(2, before)[0]
    assert_equal(run(3, after)[0], saved)  # type: ignore[arg-type]


def test_refusals() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", leaves=2, run_dir="none") as job:
            net, optimizer = job.prepare(*made(frozen_head=True))
            loss_of(net, 0, 0).backward()
            with pytest.raises(OrderError, match="in the middle of a step"), job.change(net):
                pass
            optimizer.step()
            optimizer.zero_grad()
            loss_of(net, 0, 1).backward()
            optimizer.step()
            optimizer.zero_grad()
            net.head.requires_grad_(True)
            with pytest.raises(OrderError, match=r"'head.weight' was frozen in prepare and is trained now") as error:
                net(torch.zeros(1, 12))
            assert "job.change(model)" in (error.value.remedy or "")
            net.head.requires_grad_(False)
            with pytest.raises(OptimizerError, match="parameters that the model does not have"), job.change(net):
                optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})

    run(1, rank_main)


def test_another_model_may_come_after_a_change() -> None:
    def rank_main(_rank: int) -> tuple[dict[str, object], dict[str, object]]:
        with shoal.init("zero3", leaves=2, run_dir="none") as job:
            first, first_optimizer = job.prepare(*made(frozen_head=True), name="first")
            with job.change(first):
                thaw(first, first_optimizer)
            second, second_optimizer = job.prepare(*made(frozen_head=False), name="second")
            (loss_of(first, 0, job.rank) + loss_of(second, 0, job.rank)).backward()
            first_optimizer.step()
            second_optimizer.step()
            return job.state_dict(first), job.state_dict(second)

    for state in run(2, rank_main)[0]:
        assert state["head.weight"].shape == (3, 12)  # type: ignore[attr-defined]


def test_a_change_that_fails_leaves_the_model_to_the_user_and_the_job_to_the_others() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", leaves=2, run_dir="none") as job:
            first, first_optimizer = job.prepare(*made(frozen_head=False), name="first")
            second, second_optimizer = job.prepare(*made(frozen_head=False), name="second")
            gone = weakref.ref(job._all_bound()[0].engine)  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(RuntimeError, match="no"), job.change(first):
                raise RuntimeError("no")
            gc.collect()
            assert gone() is None
            third, third_optimizer = job.prepare(*made(frozen_head=False), name="third")
            loss_of(first, 0, 0).backward()  # plain PyTorch
            first_optimizer.step()
            with pytest.raises(OrderError, match="was not prepared by this job"):
                job.state_dict(first)
            for _ in job.loader(range(4), global_batch=2):  # type: ignore[arg-type]
                (loss_of(second, job.step, job.rank) + loss_of(third, job.step, job.rank)).backward()
                for optimizer in (second_optimizer, third_optimizer):
                    optimizer.step()
                    optimizer.zero_grad()
            assert job.step == 2

    run(2, rank_main)


def test_no_two_units_have_one_number_though_one_model_grows() -> None:
    """Ranks ask each other for units by their numbers."""

    def rank_main(_rank: int) -> tuple[int, int]:
        with shoal.init("zero3", leaves=2, run_dir="none") as job:
            first, optimizer = job.prepare(*made(frozen_head=False), name="first")
            second, second_optimizer = job.prepare(*made(frozen_head=True), name="second")
            with job.change(first):
                first.head.requires_grad_(False)  # what is frozen is a unit of its own
            bindings = job._all_bound()  # pyright: ignore[reportPrivateUsage]
            numbers = [unit.index for binding in bindings for unit in binding.engine.units]
            (loss_of(first, 0, job.rank) + loss_of(second, 0, job.rank)).backward()
            optimizer.step()
            second_optimizer.step()
            return len(numbers), len(set(numbers))

    for units, numbers in run(2, rank_main):
        assert units == numbers


def test_what_was_saved_before_a_change_is_not_taken_for_what_is_there_now(tmp_path: Path) -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", leaves=2, run_dir="none") as job:
            net, optimizer = job.prepare(*made(frozen_head=True))
            loss_of(net, 0, job.rank).backward()
            optimizer.step()
            job.save(tmp_path)
            with job.change(net):
                grow(net, optimizer)
            with pytest.raises(SaveError, match="is there already"):
                job.save(tmp_path)
            job.save(tmp_path / "grown")
            assert (tmp_path / "grown" / "step-1").is_dir()

    run(2, rank_main)


def averaged(strategy: str, ranks_per_copy: int | None) -> tuple[dict[str, Tensor], int]:
    """The head is thawed after two steps, a layer is new after four."""
    with shoal.init(strategy, leaves=LEAVES, ranks_per_copy=ranks_per_copy, run_dir="none") as job:
        net, optimizer = job.prepare(*made(frozen_head=True))
        average = job.ema(net, 0.75)
        for number in job.loader(NUMBERS, global_batch=LEAVES, shuffle=False):
            step, leaf = divmod(int(number), LEAVES)
            loss_of(net, step, leaf).backward()
            optimizer.step()
            optimizer.zero_grad()
            if job.stepped and job.step in (2, 4):
                with job.change(net):
                    (thaw if job.step == 2 else grow)(net, optimizer)
        with average.whole():
            return {n: p.detach().clone() for n, p in net.named_parameters()}, sum(
                map(torch.numel, average.pieces.values())
            )


@pytest.mark.parametrize(
    ("strategy", "world", "ranks_per_copy"),
    [("ddp", 2, None), ("zero1", 3, None), ("zero3", 3, None), ("hybrid", 4, 2)],
)
def test_an_average_goes_on(strategy: str, world: int, ranks_per_copy: int | None) -> None:
    net, optimizer = made(frozen_head=True)
    want = {n: p.detach().clone() for n, p in net.named_parameters()}
    for step in range(6):
        sum_of_leaves(net, optimizer, step)
        optimizer.step()
        for name, param in net.named_parameters():
            want[name].lerp_(param.detach(), 0.25)
        if step in (1, 3):
            optimizer.zero_grad()
            (thaw if step == 1 else grow)(net, optimizer)
            want = {n: want.get(n, p.detach().clone()) for n, p in net.named_parameters()}
    found = run(world, lambda _rank: averaged(strategy, ranks_per_copy))
    for got, _ in found:
        assert_equal(got, want)
    if strategy == "zero3":
        assert sum(count for _, count in found) == sum(map(torch.numel, want.values()))


class Image(nn.Module):
    """A weight whose dimensions lie in another order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.filter = nn.Conv2d(3, 8, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(x)


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16", "masters": False}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3"])
def test_what_a_change_leaves_alone_is_as_it_was(strategy: str, settings: dict[str, object]) -> None:
    def rank_main(rank: int) -> None:
        with shoal.init(strategy, leaves=2, run_dir="none", **settings) as job:
            net = Image()
            net, optimizer = job.prepare(net, AdamW(net.parameters(), lr=0.01))
            average = job.ema(net, 0.75)
            for step in range(2):
                inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2 * step + rank))
                net(inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

            def now() -> dict[str, Tensor]:
                states = {**job.state_dict(net), **_flat(job.state_dict(optimizer))}
                averages = {f"average of {name}": piece.clone() for name, piece in average.pieces.items()}
                return cast("dict[str, Tensor]", {**states, **averages})

            before = now()
            with job.change(net):
                pass
            assert_equal(now(), before)

    run(2, rank_main)


def test_ranks_that_change_differently_are_named() -> None:
    def rank_main(rank: int) -> None:
        with shoal.init("zero3", run_dir="none") as job:
            net, optimizer = job.prepare(*made(frozen_head=True))
            with job.change(net):
                if rank:
                    thaw(net, optimizer)

    with pytest.raises(DivergedError, match="ranks prepare different things"):
        run(2, rank_main)
