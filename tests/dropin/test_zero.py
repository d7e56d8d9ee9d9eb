"""`shoal.ZeroRedundancyOptimizer` and `shoal.ZeRO` beside torch's own, on real processes over gloo."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import shoal
from shoal.comm.group import Group
from shoal.comm.threads import Threads
from shoal.dropin import mean
from shoal.dropin.states import packed, unpacked
from shoal.dropin.world import world
from shoal.errors import DivergedError, OptimizerError, OrderError, StrategyError
from tests.dropin.test_ddp import batch, on_threads
from tests.pool import Pool

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch compiles scripts as it is imported
    from torch.distributed.optim import ZeroRedundancyOptimizer as TorchZero

Make = Callable[..., torch.optim.Optimizer]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 2))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:3], "lr": 0.02}, {"params": params[3:]}]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, first: int, count: int) -> None:
    for step in range(first, first + count):
        model(batch(step, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train(wrap: Callable[[nn.Module], nn.Module], make: Make, kind: str) -> Any:
    """Groups, a schedule, the state to one rank and back into a fresh optimizer."""
    rank = dist.get_rank()
    model = wrap(net())
    optimizer = make(groups(model), getattr(torch.optim, kind), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(2):
        steps(model, optimizer, rank, step, 1)
        schedule.step()
    optimizer.consolidate_state_dict(to=1)
    state = optimizer.state_dict() if rank == 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own of broadcast_object_list
        box = [state]
        dist.broadcast_object_list(box, 1)
    again = make(groups(model), getattr(torch.optim, kind), lr=0.3)
    again.load_state_dict(copy.deepcopy(box[0]))  # torch's writes into what it is given
    steps(model, again, rank, 5, 1)
    rates = [g["lr"] for g in again.param_groups]
    return dict(model.module.state_dict()), state, rates


def plain(kind: str) -> Any:
    dist.init_process_group("gloo")
    try:
        ours = train(shoal.DistributedDataParallel, shoal.ZeroRedundancyOptimizer, kind)
        return train(TorchDDP, TorchZero, kind), ours
    finally:
        world().leave()


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Muon"])
def test_beside_torch(pool: Pool, kind: str) -> None:
    """The same bits at two ranks, and a state dict of the same entries."""
    if kind == "Muon":
        results = pool.run(matrices, world=2)
        assert all(torch.equal(a, b) for want, got in results for a, b in zip(want, got, strict=True))
        return
    for rank, (want, got) in enumerate(pool.run(plain, kind, world=2)):
        assert all(torch.equal(got[0][k], v) for k, v in want[0].items())
        assert got[2] == want[2]
        if rank != 1:
            assert got[1] is want[1] is None
            continue
        assert got[1]["state"].keys() == want[1]["state"].keys()
        for number, state in want[1]["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(got[1]["state"][number][key]), torch.as_tensor(value)), key
        assert [g["params"] for g in got[1]["param_groups"]] == [g["params"] for g in want[1]["param_groups"]]


def matrices() -> Any:
    """An optimizer that reads whole matrices: no parameter is cut."""
    dist.init_process_group("gloo")

    def one(wrap: Callable[[nn.Module], nn.Module], make: Make) -> list[Tensor]:
        model = wrap(nn.Sequential(*(m for m in net() if isinstance(m, nn.Linear))).requires_grad_(True))
        optimizer = make([p for p in model.parameters() if p.dim() == 2], torch.optim.Muon, lr=0.05)
        steps(model, optimizer, dist.get_rank(), 0, 2)
        return [p.detach() for p in model.parameters()]

    try:
        return one(TorchDDP, TorchZero), one(shoal.DistributedDataParallel, shoal.ZeroRedundancyOptimizer)
    finally:
        world().leave()


# -------------------------------------------------------------------- on threads


def ddp(rank: int) -> list[Tensor]:
    model = shoal.DistributedDataParallel(net())
    steps(model, torch.optim.Adam(model.parameters(), lr=0.05), rank, 0, 3)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("cap", [None, 64])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_spelling_of_tutorials(stage: int, cap: int | None) -> None:
    """The same bits as Adam under DistributedDataParallel; stage 2 needs no wrapper, and keeps its part of gradients."""

    def main(rank: int) -> list[Tensor]:
        model = net()
        if stage == 2:
            with torch.no_grad():
                model[0].weight.add_(float(rank))  # rank 0's values count
        run_ = shoal.DistributedDataParallel(model) if stage == 1 else model
        optimizer = shoal.ZeRO(
            model.parameters(), optimizer=torch.optim.Adam, lr=0.05, bucket_bytes_cap=cap, stage=stage
        )
        held = sum(p.numel() for state in [optimizer.optim.param_groups] for g in state for p in g["params"])
        assert (held < sum(p.numel() for p in model.parameters())) is (world().size > 1)
        steps(run_, optimizer, rank, 0, 3)
        run_(batch(0, rank)).sum().backward()
        kept = sum(p.grad is not None for p in model.parameters())
        assert (kept < len(list(model.parameters()))) is (stage == 2)
        assert set(optimizer.state) == {p for g in optimizer.optim.param_groups for p in g["params"]}
        return [p.detach() for p in model.parameters()]

    for size in (1, 2, 3) if stage == 1 else (2, 3):
        want, _ = on_threads(size, ddp)
        got, said = on_threads(size, main)
        assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
        assert "differ" not in said


def test_gradients_that_nobody_averages_are_said() -> None:
    def main(stage: int, rank: int) -> None:
        model = net()
        steps(model, shoal.ZeRO(model.parameters(), optimizer=torch.optim.SGD, lr=0.1, stage=stage), rank, 0, 2)

    _, said = on_threads(2, partial(main, 1))
    assert said.count("the ranks' gradients differ, and each parameter follows those of one rank alone") == 1
    assert "shoal.DistributedDataParallel(model) averages them, or shoal.ZeRO(..., stage=2)" in said
    _, said = on_threads(2, partial(main, 2))
    assert "differ" not in said


def test_parameters_come_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which some ranks have more than others."""
    rounds: list[int] = []
    one_round = mean._round

    def counted(group: Group, parts: Any) -> Any:
        rounds.append(group.rank)
        return one_round(group, parts)

    def main(rank: int) -> list[Tensor]:
        model = net()
        optimizer = shoal.ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.05)
        steps(shoal.DistributedDataParallel(model), optimizer, rank, 0, 3)
        return [p.detach() for p in model.parameters()]

    want, _ = on_threads(3, ddp)
    monkeypatch.setattr(mean, "CAP", 1e-5)
    monkeypatch.setattr(mean, "_round", counted)
    for got in on_threads(3, main)[0]:
        assert all(torch.equal(a, b) for a, b in zip(got, want[0], strict=True))
    assert rounds.count(0) > 6 + 3  # of all parameters as rank 0 has them, then in three steps


@pytest.mark.parametrize("exchanges", [1, 2, 3])
def test_after_every_exchange_carriers_let_go_of_memory(exchanges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rank 0's values, of gradients, of updated parameters."""
    rests: list[int] = []

    def main(rank: int) -> None:
        model = net()
        wrapped = shoal.DistributedDataParallel(model)
        optimizer = shoal.ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.05)
        if exchanges > 1:
            wrapped(batch(0, rank)).square().mean().backward()
        if exchanges > 2:
            optimizer.step()

    monkeypatch.setattr(Threads, "rest", lambda self: rests.append(self.rank))
    on_threads(2, main)
    assert sorted(rests) == [0] * exchanges + [1] * exchanges


class Forks(nn.Module):
    """Rank 0 leaves a layer out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return self.always(self.sometimes(x) if rank else x)


def test_stage_2_averages_what_only_some_ranks_use() -> None:
    """As stage 1 does under DistributedDataParallel."""

    def main(stage: int, rank: int) -> list[Tensor]:
        model = Forks()
        run_ = shoal.DistributedDataParallel(model) if stage == 1 else model
        optimizer = shoal.ZeRO(model.parameters(), optimizer=torch.optim.Adam, lr=0.05, stage=stage)
        for step in range(3):
            run_(batch(step, rank), rank).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    want, got = (on_threads(2, partial(main, stage))[0] for stage in (1, 2))
    for each in got:
        assert all(torch.equal(a, b) for a, b in zip(each, want[0], strict=True))
    assert not torch.equal(want[0][2], Forks().sometimes.weight)


def test_in_stage_2_unequal_batches_are_named() -> None:
    def main(rank: int) -> None:
        model = net()
        optimizer = shoal.ZeRO(model.parameters(), optimizer=torch.optim.SGD, lr=0.1, stage=2)
        steps(model, optimizer, rank, 0, 2)
        if rank:
            model(batch(2, rank)).square().mean().backward()
        world().leave()

    with pytest.raises(DivergedError, match=r"with shoal.ZeRO\(stage=2\): rank 0 has come to .*; rank 1 ends a b") as e:
        on_threads(2, main)
    assert "as many batches on all ranks, or stage=1" in (e.value.remedy or "")


def test_one_more_group_on_the_way() -> None:
    """The same bits as the optimizer without ranks, state of earlier groups included."""

    def train(make: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
        model = net()
        late = [nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(40))]
        optimizer = make(groups(model))
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": late, "lr": 0.5})
            (model(batch(step, 0) * late[0]) * late[1].sum()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in (*model.parameters(), *late)]

    want = train(partial(torch.optim.Adam, lr=0.05))
    for size in (2, 3):
        make = partial(shoal.ZeroRedundancyOptimizer, optimizer_class=torch.optim.Adam, lr=0.05)
        for got in on_threads(size, lambda _rank, make=make: train(make))[0]:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_closure_is_called_once() -> None:
    def main(_rank: int) -> tuple[float, int]:
        model = net()
        optimizer = shoal.ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        calls: list[int] = []

        def closure() -> float:
            calls.append(1)
            loss = model(batch(0, 0)).square().mean()
            loss.backward()
            return float(loss.detach())

        return optimizer.step(closure), len(calls)

    found, _ = on_threads(2, main)
    assert found[0][0] > 0
    assert [calls for _, calls in found] == [1, 1]


def test_state_is_where_it_was_brought() -> None:
    def main(rank: int) -> None:
        model = net()
        optimizer = shoal.ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
        steps(model, optimizer, 0, 0, 1)
        with pytest.raises(OrderError, match=rf"state_dict\(\) on rank {rank}[\s\S]*consolidate_state_dict\(to={rank}"):
            optimizer.state_dict()
        with pytest.raises(OrderError, match=r"consolidate_state_dict\(to=5\) in a group of 2[\s\S]*such as to=0"):
            optimizer.consolidate_state_dict(to=5)
        optimizer.consolidate_state_dict()
        if rank == 0:
            plain = torch.optim.Adam(net().parameters(), lr=0.1)
            plain.load_state_dict(optimizer.state_dict())
            assert len(plain.state) == 6
        else:
            with pytest.raises(OrderError, match="on rank 1"):
                optimizer.state_dict()
        steps(model, optimizer, 0, 1, 1)
        with pytest.raises(OrderError, match=f"on rank {rank}"):
            optimizer.state_dict()
        with pytest.raises(OptimizerError, match=r"groups of \[2\] parameters[\s\S]*groups of \[6\][\s\S]*same model"):
            optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0, 1]}]})

    on_threads(2, main)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[list[nn.Parameter]], object]]] = {
    "no class": (
        OptimizerError,
        "the class itself, such as torch.optim.Adam",
        lambda p: shoal.ZeroRedundancyOptimizer(p, torch.optim.SGD(p, lr=0.1)),
    ),
    "LBFGS": (
        OptimizerError,
        "with LBFGS, which reads the gradients of all parameters at once",
        lambda p: shoal.ZeroRedundancyOptimizer(p, torch.optim.LBFGS),
    ),
    "overlap": (
        StrategyError,
        'job = shoal.init("zero1")',
        lambda p: shoal.ZeroRedundancyOptimizer(p, torch.optim.SGD, overlap_with_ddp=True, lr=0.1),
    ),
    "stage 3": (
        StrategyError,
        'job = shoal.init("zero3"); model, optimizer = job.prepare(model, optimizer)',
        lambda p: shoal.ZeRO(p, optimizer=torch.optim.SGD, stage=3, lr=0.1),
    ),
    "stage 4": (StrategyError, "stage=1 or stage=2", lambda p: shoal.ZeRO(p, optimizer=torch.optim.SGD, stage=4)),
    "no bytes": (
        StrategyError,
        "bytes, such as 25 * 2**20",
        lambda p: shoal.ZeRO(p, optimizer=torch.optim.SGD, bucket_bytes_cap=0),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    kind, text, make = REFUSED[name]
    with pytest.raises(kind) as e:
        make(list(net().parameters()))
    assert text in str(e.value)


def test_state_travels_as_numbers_not_as_code() -> None:
    state = {3: {"step": 2, "m": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "who": None, "on": True, "x": 0.5}}
    found = unpacked(*packed(state))
    assert {k: v for k, v in found[3].items() if k != "m"} == {k: v for k, v in state[3].items() if k != "m"}
    assert torch.equal(found[3]["m"], state[3]["m"])
    with pytest.raises(OptimizerError, match=r"state 'f' is a builtin_function_or_method[\s\S]*tensors, numbers"):
        packed({0: {"f": print}})
