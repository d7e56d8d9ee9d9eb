"""Optimizers over pieces: torch's own, the user's own, with groups, schedulers and state from before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import shoal
from shoal.comm.threads import run
from shoal.engine.optim import granule
from shoal.errors import AwayError, OptimizerError, OrderError
from shoal.strategy import Cut, Shard, Strategy
from tests.engine.trials import PLACES, MakeOptimizer, Numbers, Result, assert_same, inputs, plain, train


class Small(nn.Module):
    """Parameters that a cut goes through, and others that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(7, 37), nn.Linear(37, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.table = nn.Parameter(torch.randn(5, 3, 11) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.into(x)) * self.scale) + self.table.sum((1, 2))[:3]


class Matrices(nn.Module):
    """What Muon takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 37, bias=False), nn.Linear(37, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def loss_of(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 4, 7)).square().mean()


class Lion(Optimizer):
    """The user's own; every element for itself."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.sub_(torch.sign(0.9 * average + 0.1 * p.grad), alpha=group["lr"])
                average.mul_(0.99).add_(p.grad, alpha=0.01)


class Normed(Lion):
    """The user's own, with the norm of the whole parameter."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / (p.grad.norm() + 1e-3), alpha=group["lr"])


class Shaped(Lion):
    """The user's own, which cannot do anything with flat parameters; its state has another shape than they."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() == 2:
                    rows = self.state[p].setdefault("rows", torch.zeros(p.shape[0]))
                    rows.add_(p.grad.square().sum(1))
                    p.sub_(p.grad / (rows[:, None] + 1).sqrt(), alpha=group["lr"])
                elif p.grad is not None and p.numel() == 192:
                    raise ValueError("what is this?")


O = torch.optim  # noqa: E741
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda m: O.SGD(m.parameters(), lr=0.1),
    "SGD with everything": lambda m: O.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD fused": lambda m: O.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda m: O.Adam(m.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True),
    "Adam foreach": lambda m: O.Adam(m.parameters(), lr=0.01, foreach=True),
    "Adam with a tensor": lambda m: O.Adam(m.parameters(), lr=torch.tensor(0.01)),
    "AdamW": lambda m: O.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda m: O.AdamW(m.parameters(), lr=0.01, fused=True, maximize=True),
    "Adagrad": lambda m: O.Adagrad(m.parameters(), lr=0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda m: O.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "Adadelta": lambda m: O.Adadelta(m.parameters(), lr=1.0),
    "NAdam": lambda m: O.NAdam(m.parameters(), lr=0.01),
    "RAdam": lambda m: O.RAdam(m.parameters(), lr=0.01),
    "Adamax": lambda m: O.Adamax(m.parameters(), lr=0.01),
    "ASGD": lambda m: O.ASGD(m.parameters(), lr=0.05),
    "Rprop": lambda m: O.Rprop(m.parameters(), lr=0.01),
    "Adafactor": lambda m: O.Adafactor(m.parameters(), lr=0.05),
    "user's, by element": lambda m: Lion(m.parameters()),
    "user's, with a norm": lambda m: Normed(m.parameters()),
    "user's, with rows": lambda m: Shaped(m.parameters()),
}
WHOLE = {"Adafactor", "user's, with a norm", "user's, with rows"}


@cache
def reference(name: str) -> Result:
    return plain(Small, loss_of, make_optimizer=OPTIMIZERS[name], steps=4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_as_plain_pytorch(name: str, place: str) -> None:
    assert_same(train(place, Small, loss_of, make_optimizer=OPTIMIZERS[name], steps=4), reference(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_which_may_be_cut_anywhere(name: str) -> None:
    """Torch's by name, others by trying them; 0: parameters stay whole."""
    assert granule(OPTIMIZERS[name](Small()), None) == (0 if name in WHOLE else 64)


@pytest.mark.parametrize("place", PLACES)
def test_muon(place: str) -> None:
    def make(model: nn.Module) -> Optimizer:
        return O.Muon(model.parameters(), lr=0.02)

    assert_same(train(place, Matrices, loss_of, make_optimizer=make), plain(Matrices, loss_of, make_optimizer=make))


@pytest.mark.parametrize("cut", list(Cut))
def test_the_users_word_counts(cut: Cut) -> None:
    """`elementwise=False` keeps parameters whole; `elementwise=True` for an optimizer with a norm gives other numbers."""

    def go(make: MakeOptimizer, elementwise: bool) -> tuple[Tensor, int]:
        def rank_main(_rank: int) -> tuple[Tensor, int]:
            with shoal.init(Strategy(shard=Shard.OPTIMIZER, cut=cut), leaves=2, run_dir="none") as job:
                model = Matrices()
                model, optimizer = job.prepare(model, make(model), elementwise=elementwise)
                for number in job.loader(Numbers(2), global_batch=2, shuffle=False):
                    loss_of(model, 0, int(number)).backward()
                    optimizer.step()
                return torch.cat([p.detach().flatten() for p in model.parameters()]), len(
                    optimizer.param_groups[0]["params"]
                )

        return run(2, rank_main)[0]

    want = plain(Matrices, loss_of, make_optimizer=OPTIMIZERS["user's, with a norm"], steps=1, leaves=2)
    flat = torch.cat([v.flatten() for v in want.model.values()])
    values, pieces = go(lambda m: Normed(m.parameters()), False)
    assert torch.equal(values, flat)
    assert pieces == 1
    if cut is Cut.EVEN:
        values, pieces = go(lambda m: Normed(m.parameters()), True)
        assert not torch.equal(values, flat)


# -------------------------------------------------------------------- refusals


def refused(make: Callable[[nn.Module], Optimizer], world: int = 2, **kw: object) -> str:
    def rank_main(_rank: int) -> None:
        with shoal.init("zero1", run_dir="none") as job:
            model = Small()
            job.prepare(model, make(model), **kw)

    with pytest.raises(OptimizerError) as e:
        run(world, rank_main)
    assert "try:" in str(e.value)
    return str(e.value)


def test_lbfgs_is_refused() -> None:
    assert "LBFGS evaluates its closure several times a step" in refused(lambda m: O.LBFGS(m.parameters()))


def test_foreign_parameters_are_refused() -> None:
    text = refused(lambda m: O.SGD([*m.parameters(), *nn.Linear(3, 5).parameters()], lr=0.1))
    assert "holds 2 parameters that the model does not have; the first has shape (5, 3)" in text
    assert "make the optimizer from model.parameters()" in text


def test_state_that_cannot_be_cut_is_refused() -> None:
    def make(model: nn.Module) -> Optimizer:
        optimizer = Lion(model.parameters())
        for p in model.parameters():
            optimizer.state[p]["rows"] = torch.zeros(2, 3)
        return optimizer

    text = refused(make)
    assert "state 'rows' of 'into.weight' has shape (2, 3) and cannot be cut as its parameter of shape (37, 7)" in text
    assert "prepare(..., elementwise=False)" in text


def test_parameters_added_later_are_refused() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("zero1", run_dir="none") as job:
            model = Small()
            model, optimizer = job.prepare(model, O.SGD(model.out.parameters(), lr=0.1))
            optimizer.add_param_group({"params": model.into.parameters()})
            loss_of(model, 0, 0).backward()
            optimizer.step()

    with pytest.raises(AwayError, match=r"the gradient of 'into.weight' is not a whole tensor of this rank"):
        run(2, rank_main)


def test_thawing_later_is_refused() -> None:
    """Whether a parameter is trained decides where it lives."""

    def rank_main(_rank: int) -> None:
        with shoal.init("zero1", run_dir="none") as job:
            model = Small()
            model.into.requires_grad_(False)
            model, optimizer = job.prepare(model, O.SGD(model.parameters(), lr=0.1))
            loss_of(model, 0, 0).backward()
            optimizer.step()
            model.into.requires_grad_(True)
            loss_of(model, 0, 0).backward()

    with pytest.raises(OrderError) as e:
        run(2, rank_main)
    assert "'into.weight' was frozen in prepare and is trained now" in str(e.value)
    assert "requires_grad_() before job.prepare" in str(e.value)


@pytest.mark.parametrize("place", PLACES)
def test_freezing_later_is_allowed(place: str) -> None:
    def leaf(model: nn.Module, step: int, number: int) -> Tensor:
        model.into.requires_grad_(step == 0)
        return loss_of(model, step, number)

    make = OPTIMIZERS["AdamW"]
    assert_same(train(place, Small, leaf, make_optimizer=make), plain(Small, leaf, make_optimizer=make))


# -------------------------------------------------------------------- groups, state, schedulers


def grouped(model: nn.Module) -> Optimizer:
    return O.AdamW(
        [
            {"params": [model.table, model.out.bias], "lr": 0.03, "name": "first"},
            {"params": list(model.into.parameters()), "weight_decay": 0.2, "betas": (0.5, 0.9)},
            {"params": [model.out.weight]},
        ],
        lr=0.01,
    )


@pytest.mark.parametrize("place", PLACES)
def test_groups_keep_order_and_settings(place: str) -> None:
    """And what the user changes in them between steps counts. `scale` is trained by nobody."""
    steps = 0

    def change(optimizer: Optimizer) -> None:
        optimizer.param_groups[1]["lr"] *= 0.5

    def each(_job: shoal.Job, _model: nn.Module, optimizer: Optimizer) -> None:
        nonlocal steps
        steps += 1
        change(optimizer)
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        assert [s["weight_decay"] for s in settings] == [0.01, 0.2, 0.01]
        assert settings[0]["name"] == "first"

    class Halving(O.AdamW):
        def step(self) -> None:
            super().step()
            change(self)

    def grouped_and_halving(model: nn.Module) -> Optimizer:
        optimizer = grouped(model)
        optimizer.__class__ = Halving
        return optimizer

    got = train(place, Small, loss_of, make_optimizer=grouped, each=each)
    want = plain(Small, loss_of, make_optimizer=grouped_and_halving)
    assert_same(got, want)
    assert steps == 3 * PLACES[place][0]
    for mine, theirs in zip(got.optimizer["param_groups"], want.optimizer["param_groups"], strict=True):
        assert mine == theirs


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "SGD with everything", "Adafactor", "Rprop"])
@pytest.mark.parametrize("place", PLACES)
def test_state_from_before_is_cut(place: str, name: str) -> None:
    """Two steps in plain PyTorch, then prepare, then two more."""
    first = plain(Small, loss_of, make_optimizer=OPTIMIZERS[name], steps=2)

    def make_model() -> nn.Module:
        model = Small()
        model.load_state_dict(first.model)
        return model

    def make_optimizer(model: nn.Module) -> Optimizer:
        optimizer = OPTIMIZERS[name](model)
        optimizer.load_state_dict(copy.deepcopy(first.optimizer))
        return optimizer

    want = plain(make_model, loss_of, make_optimizer=make_optimizer, steps=2)
    assert_same(train(place, make_model, loss_of, make_optimizer=make_optimizer, steps=2), want)


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda o: O.lr_scheduler.StepLR(o, 2, gamma=0.3),
    "OneCycleLR": lambda o: O.lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    "LambdaLR": lambda o: O.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "SequentialLR": lambda o: O.lr_scheduler.SequentialLR(
        o, [O.lr_scheduler.LinearLR(o, 0.1, total_iters=2), O.lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


def scheduled(
    strategy: str, world: int, name: str, when: str
) -> tuple[dict[str, Tensor], list[float], dict[str, object]]:
    """Four steps of four leaves with a scheduler that is stepped after every leaf."""

    def rank_main(_rank: int) -> tuple[dict[str, Tensor], list[float], dict[str, object]]:
        with shoal.init(strategy, leaves=4, run_dir="none") as job:
            model = Small()
            optimizer = OPTIMIZERS["AdamW"](model)
            if when == "given":
                model, optimizer, scheduler = job.prepare(model, optimizer, SCHEDULERS[name](optimizer))
            elif when == "before":
                scheduler = SCHEDULERS[name](optimizer)
                model, optimizer = job.prepare(model, optimizer)
            else:
                model, optimizer = job.prepare(model, optimizer)
                scheduler = SCHEDULERS[name](optimizer)
            rates: list[float] = []
            for number in job.loader(Numbers(16), global_batch=4, shuffle=False):
                loss_of(model, *divmod(int(number), 4)).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if job.stepped:
                    rates.append(optimizer.param_groups[0]["lr"])
            return job.state_dict(model), rates, scheduler.state_dict()

    return run(world, rank_main)[0]


@cache
def plain_schedule(name: str) -> tuple[dict[str, Tensor], list[float]]:
    rates: list[float] = []

    def make(model: nn.Module) -> Optimizer:
        optimizer = OPTIMIZERS["AdamW"](model)
        scheduler = SCHEDULERS[name](optimizer)
        step = optimizer.step

        def both() -> None:
            step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])

        both._wrapped_by_lr_sched = True
        optimizer.step = both
        return optimizer

    return plain(Small, loss_of, make_optimizer=make, steps=4).model, rates


@pytest.mark.parametrize("when", ["given", "before", "after"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_wait_for_steps_that_act(name: str, when: str) -> None:
    """Whether `prepare` is given them or not: leaves of one step are one step for them."""
    model, rates = plain_schedule(name)
    for strategy, world in (("ddp", 2), ("zero3", 1), ("zero2", 3)):
        got, seen, state = scheduled(strategy, world, name, when)
        assert seen == rates
        assert "step" not in state
        for key, value in model.items():
            assert torch.equal(got[key], value), key


def test_a_plateau_scheduler_made_after_prepare() -> None:
    """Torch tells nobody of it; it is found at the first step."""

    def rank_main(_rank: int) -> list[float]:
        with shoal.init("ddp", leaves=4, run_dir="none") as job:
            model = Small()
            model, optimizer = job.prepare(model, O.SGD(model.parameters(), lr=1.0))
            scheduler = O.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            rates: list[float] = []
            for number in job.loader(Numbers(12), global_batch=4):
                loss_of(model, 0, int(number)).backward()
                optimizer.step()
                scheduler.step(1.0)
                rates.append(optimizer.param_groups[0]["lr"])
            return rates

    assert run(2, rank_main)[0] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_another_scheduler_in_the_middle_of_training() -> None:
    def rank_main(_rank: int) -> list[float]:
        with shoal.init("zero2", leaves=4, run_dir="none") as job:
            model = Small()
            model, optimizer = job.prepare(model, O.SGD(model.parameters(), lr=1.0))
            scheduler = O.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            rates: list[float] = []
            for number in job.loader(Numbers(16), global_batch=4, shuffle=False):
                if int(number) // 4 == 2 and len(rates) == 4:
                    scheduler = O.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
                loss_of(model, 0, int(number)).backward()
                optimizer.step()
                scheduler.step()
                rates.append(optimizer.param_groups[0]["lr"])
            return rates

    assert run(2, rank_main)[0] == pytest.approx([1.0, 0.5, 0.5, 0.25, 0.25, 0.025, 0.025, 0.0025])
