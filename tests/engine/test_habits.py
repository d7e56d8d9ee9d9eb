"""Habits from plain PyTorch and from torch's DistributedDataParallel, under every strategy."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import shoal
from shoal.comm.threads import run
from shoal.errors import AwayError, OrderError
from tests.engine.test_models import Stack, square
from tests.engine.trials import PLACES, Result, assert_same, averaged, inputs, plain, train

EVERYWHERE = pytest.mark.parametrize("place", PLACES)


def half_batches(model: nn.Module, step: int, number: int) -> Tensor:
    """A script that accumulates by itself: loss / k, all but the last under no_sync."""
    with getattr(model, "no_sync", nullcontext)():
        (square(model, step, number) / 2).backward()
    loss = square(model, step + 100, number) / 2
    loss.backward()
    return loss.detach()


@EVERYWHERE
def test_accumulation_makes_one_larger_leaf(place: str) -> None:
    assert_same(train(place, Stack, half_batches), plain(Stack, half_batches))


@EVERYWHERE
def test_accumulated_batches_of_a_loader(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One leaf a rank: the mean over ranks of each rank's sum, as torch's wrapper has it."""
    world, strategy = PLACES[place]

    def leaf(model: nn.Module, batches: list[Tensor]) -> None:
        for batch in batches:
            (model(batch).square().mean() / len(batches)).backward()

    def rank_main(_rank: int) -> dict[str, Tensor]:
        with shoal.init(strategy, run_dir="none", device="cpu") as job:
            model = Stack()
            loader = DataLoader(inputs(0, 0, 8 * world, 5), batch_size=2)
            model, optimizer, loader = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05), loader)
            held: list[Tensor] = []
            for batch in loader:
                held.append(batch)
                if len(held) == 2:
                    leaf(model, held)
                    optimizer.step()
                    optimizer.zero_grad()
                    held.clear()
            return job.state_dict(model)

    got = run(world, rank_main)[0]
    shoal.seed(0, 0)
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = inputs(0, 0, 8 * world, 5).split(2)  # counted out in turns: rank r has batches r, r + world, ...
    for step in range(2):
        grads: list[list[Tensor]] = []
        for rank in range(world):
            leaf(model, [data[(2 * step + k) * world + rank] for k in range(2)])
            grads.append([p.grad for p in model.parameters()])
            optimizer.zero_grad()
        for p, parts in zip(model.parameters(), zip(*grads, strict=True), strict=True):
            p.grad = averaged(list(parts))
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.allclose(got[name], value, atol=1e-7), name
    said = f"a leaf is the 2 batches between two calls of optimizer.step(), {world} a step: {world} x 2 x 2 samples"
    assert said in capsys.readouterr().err


@EVERYWHERE
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_either_way(place: str, to_none: bool) -> None:
    def rank_main(_rank: int) -> Result:
        with shoal.init(PLACES[place][1], leaves=4, run_dir="none", device="cpu") as job:
            model = Stack()
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
            loader = job.loader(list(range(8)), global_batch=4, shuffle=False)
            for number in loader:
                optimizer.zero_grad(set_to_none=to_none)
                square(model, *divmod(int(number), 4)).backward()
                optimizer.step()
                assert all(p.grad is None or "held by shoal" in repr(p.grad) for p in model.parameters())
            return Result(job.state_dict(model), job.state_dict(optimizer), [])

    want = plain(Stack, square, steps=2)
    assert_same(run(PLACES[place][0], rank_main)[0], Result(want.model, want.optimizer, []))


@EVERYWHERE
def test_full_backward_hooks_see_whole_gradients(place: str) -> None:
    """On the root and on blocks; the numbers stay plain PyTorch's."""
    seen: list[tuple[str, int]] = []

    def hooked() -> nn.Module:
        model = Stack()
        for name in ("blocks.0", "last"):
            model.get_submodule(name).register_full_backward_hook(
                lambda _m, _into, out, name=name: seen.append((name, out[0].numel()))
            )
        return model

    got = train(place, hooked, square)
    count, sizes = len(seen), set(seen)
    seen.clear()
    assert_same(got, plain(hooked, square))
    assert (count, sizes) == (len(seen), set(seen))


# -------------------------------------------------------------------- names of torch's wrapper


@EVERYWHERE
def test_names_of_the_wrapper(place: str) -> None:
    def rank_main(_rank: int) -> None:
        model = Stack()
        with shoal.init(PLACES[place][1], run_dir="none", device="cpu") as job:
            job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            assert model.module is model
            assert [n for n, _ in model.named_modules()] == [n for n, _ in Stack().named_modules()]
            with job.whole(model):
                assert list(model.module.state_dict()) == list(Stack().state_dict())
                assert not hasattr(copy.deepcopy(model), "module")
        assert not hasattr(model, "module")
        assert not hasattr(model, "no_sync")

    run(PLACES[place][0], rank_main)


def test_a_model_keeps_names_of_its_own() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    with shoal.init(run_dir="none", device="cpu") as job:
        model = Wrapper()
        job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert isinstance(model.module, nn.Linear)
    assert isinstance(model.module, nn.Linear)


# -------------------------------------------------------------------- what parameters show


SHOWN = {  # is p.data there between steps? is this rank's piece of a parameter smaller?
    "ddp": (True, False),
    "zero1": (True, True),
    "zero2": (True, True),
    "zero3": (False, True),
    "hybrid": (False, True),
}


@EVERYWHERE
def test_what_parameters_show(place: str) -> None:
    """The table of docs/migrate/ddp.md."""
    here, cut = SHOWN[place]

    def rank_main(_rank: int) -> None:
        with shoal.init(PLACES[place][1], run_dir="none", device="cpu") as job:
            model = Stack()
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            p = model.blocks[1].into.weight
            for step in range(2):
                assert p.shape == p.data.shape == (68, 68)
                assert p.grad is None
                assert bool(p.data.isnan().all()) is not here
                square(model, step, job.rank).backward()
                assert "held by shoal" in repr(p.grad)
                with job.gradients() as last:
                    assert last
                    assert p.grad.shape == (68, 68)
                    assert p.grad.norm() > 0
                assert "held by shoal" in repr(p.grad)
                optimizer.step()
                optimizer.zero_grad()
            held = sum(q.numel() for group in optimizer.param_groups for q in group["params"])
            assert (held < sum(q.numel() for q in model.parameters())) is cut

    run(PLACES[place][0], rank_main)


@EVERYWHERE
def test_gradients_are_those_of_the_step(place: str) -> None:
    """Read between backward and step: the leaves' mean, bit for bit, on a step's last leaf only."""
    shown: list[dict[str, Tensor]] = []

    def rank_main(rank: int) -> None:
        with shoal.init(PLACES[place][1], leaves=4, run_dir="none", device="cpu") as job:
            model = Stack()
            model.spare = nn.Linear(3, 3)  # which no leaf touches
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            for number in job.loader(list(range(4)), global_batch=4, shuffle=False):
                square(model, 0, int(number)).backward()
                with job.gradients(model) as last:
                    grads = {n: p.grad.clone() for n, p in model.named_parameters() if last and p.grad is not None}
                optimizer.step()
                assert last == job.stepped
            shown.append(grads)

    run(PLACES[place][0], rank_main)
    shoal.seed(0, 0)
    model = Stack()
    parts: list[dict[str, Tensor]] = []
    for number in range(4):
        square(model, 0, number).backward()
        parts.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    want = {n: averaged([grads[n] for grads in parts]) for n in parts[0]}
    for grads in shown:
        assert grads.keys() == want.keys()
        assert all(torch.equal(grads[n], want[n]) for n in want)


@EVERYWHERE
def test_clip_grad_value(place: str) -> None:
    """Clamps the step's gradients, not the leaves'."""
    limit = 0.003

    def rank_main(_rank: int) -> tuple[list[bool | None], dict[str, Tensor]]:
        with shoal.init(PLACES[place][1], leaves=4, run_dir="none", device="cpu") as job:
            model = Stack()
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
            said: list[bool | None] = []
            for number in job.loader(list(range(4)), global_batch=4, shuffle=False):
                square(model, 0, int(number)).backward()
                said.append(job.clip_grad_value(limit))
                optimizer.step()
            return said, job.state_dict(model)

    said, got = run(PLACES[place][0], rank_main)[0]
    assert said == [None] * (len(said) - 1) + [True]
    shoal.seed(0, 0)
    model = Stack()
    for number in range(4):
        (square(model, 0, number) / 4).backward()
    nn.utils.clip_grad_value_(model.parameters(), limit)
    assert any((p.grad.abs() == limit).any() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for name, value in model.state_dict().items():
        assert torch.allclose(got[name], value, atol=1e-6), name


@pytest.mark.parametrize("limit", [-1.0, math.inf, math.nan])
def test_a_limit_that_is_none(limit: float) -> None:
    with shoal.init(run_dir="none", device="cpu") as job:
        model = nn.Linear(2, 1)
        job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(OrderError, match=r"job.clip_grad_value\((-1|inf|nan)\)[\s\S]*a limit of at least 0"):
            job.clip_grad_value(limit)


# -------------------------------------------------------------------- averages kept by hand


@EVERYWHERE
def test_an_average_kept_by_hand(place: str) -> None:
    """A copy made before prepare works where parameters are whole; elsewhere it is NaN at once, and job.ema is right."""

    def rank_main(_rank: int) -> tuple[bool, bool]:
        with shoal.init(PLACES[place][1], run_dir="none", device="cpu") as job:
            model = Stack()
            shadow = copy.deepcopy(model)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            average = job.ema(model, 0.5)
            square(model, 0, job.rank).backward()
            optimizer.step()
            with torch.no_grad():
                for mean, p in zip(shadow.parameters(), model.parameters(), strict=True):
                    mean.lerp_(p, 0.5)
            ours = job.state_dict(average)
            whole = all(not p.isnan().any() for p in shadow.parameters())
            same = not ours or all(torch.allclose(ours[n], p) for n, p in shadow.named_parameters())
            return whole, same

    here = SHOWN[place][0]
    assert all(found == ((True, True) if here else (False, found[1])) for found in run(PLACES[place][0], rank_main))


@pytest.mark.parametrize("place", ["zero3", "hybrid"])
def test_an_average_by_torch_is_refused_by_name(place: str) -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init(PLACES[place][1], run_dir="none", device="cpu") as job:
            model = Stack()
            job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))

    with pytest.raises(AwayError, match=r"job\.ema"):
        run(PLACES[place][0], rank_main)


def test_gradients_of_cells_are_refused() -> None:
    with shoal.init(run_dir="none", device="cpu") as job:
        model = nn.Linear(2, 1)
        job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        binding = job._find(model)
        object.__setattr__(binding, "strategy", shoal.Strategy(tensor=2))
        with pytest.raises(OrderError, match=r"job.gradients with tensor=2[\s\S]*clip_grad_norm"), job.gradients():
            pass
