"""`layerwise=True`: one unit of gradients at a time, and what cannot be had with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shoal
from shoal.comm.threads import run
from shoal.engine.ledger import FIRST_STEP
from shoal.errors import AwayError, OptimizerError, OrderError, SettingError, ShoalError
from shoal.strategy import Strategy

WIDTH, BLOCKS = 64, 8
UNIT = (WIDTH * WIDTH + WIDTH) * 4
"""Bytes of a block's gradients."""


class Net(nn.Module):
    """`spare` is trained, and touched by some leaves of some steps only."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.spare = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor, *, spare: bool = False) -> torch.Tensor:
        for block in self.blocks:
            change = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            x = x + change.tanh()
        return x + self.spare.sum() if spare else x


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(
    rank: int, strategy: str | Strategy, *, leaves: int = 2, steps: int = 3, recompute: bool = False, **settings: object
) -> list[float]:
    """Only leaf 1 touches `spare`, and not in the last step."""
    with shoal.init(strategy, leaves=leaves, run_dir="none", device="cpu", **settings) as job:
        model = Net(recompute=recompute)
        model, optimizer = job.prepare(model, adamw(model))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(steps):
            acted, turn = False, 0
            while not acted:
                spare = rank == job.world_size - 1 and turn == 0 and step < steps - 1
                x = torch.randn(4, WIDTH, requires_grad=True)
                model(x, spare=spare).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                acted, turn = job.stepped, turn + 1
            scheduler.step()
        with job.whole(model):
            return [float(p.detach().double().sum()) for p in model.parameters()]


@pytest.mark.parametrize("how", ["plain", "recompute", "fast", "budget", "twig"])
@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3"])
def test_the_same_numbers(name: str, how: str) -> None:
    """Also for a parameter that only one rank has touched, and that rests in the last step."""
    settings: dict[str, object] = {
        "plain": {}, "recompute": {"recompute": True}, "fast": {"numerics": "fast"}, "budget": {"memory": "4MiB"},
        "twig": {"twig": 2, "leaves": 8},
    }[how]  # fmt: skip
    world = 3 if how == "plain" else 2
    plain = run(world, lambda r: train(r, name, **{"leaves": 2 * world, **settings}))
    early = run(world, lambda r: train(r, name, **{"leaves": 2 * world, **settings}, layerwise=True), seed=3)
    assert early == plain


@pytest.mark.parametrize(("world", "leaves"), [(1, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_one_unit_of_gradients(name: str, world: int, leaves: int) -> None:
    """From the second step on: those of a block, those that are under way, and sums of leaves before."""

    def rank_main(_rank: int, layerwise: bool) -> tuple[int, int]:
        with shoal.init(name, leaves=leaves, run_dir="none", device="cpu", layerwise=layerwise) as job:
            model = Net()
            model, optimizer = job.prepare(model, adamw(model))
            engine = job._bindings[""].engine
            most = [0]

            def look(*_: object) -> None:
                now = job.memory()
                under_way = sum(j.nbytes for j in engine.gradients.journeys.under_way.values())
                peaks = {e.name: e for e in now.entries if e.kind == "gradients"}
                for entry in peaks.values():
                    assert entry.now <= entry.peak, entry
                if job.step:
                    kept = peaks["gradient buffers kept"].now
                    most[0] = max(most[0], now["gradients"] - kept + under_way)

            for module in model.blocks:
                module.weight.register_post_accumulate_grad_hook(look)
            for _ in range(3):
                acted = False
                while not acted:
                    model(torch.randn(4, WIDTH, requires_grad=True)).square().mean().backward()
                    look()
                    optimizer.step()
                    look()
                    optimizer.zero_grad()
                    acted = job.stepped
            rest = job.memory()
            assert [e.now for e in rest.entries if e.kind == "gradients"] == [
                e.rest for e in rest.entries if e.kind == "gradients"
            ]
            entries = {e.name: e for e in rest.entries}
            steady = sum(e.peak for e in rest.entries if e.kind == "gradients" and e.name != FIRST_STEP)
            assert (entries[FIRST_STEP].peak > 0) == layerwise
            assert entries[FIRST_STEP].setting == "layerwise"
            return most[0], steady

    early = run(world, lambda r: rank_main(r, True))
    plain = run(world, lambda r: rank_main(r, False))
    for (most, steady), (without, _) in zip(early, plain, strict=True):
        waiting = 0 if leaves == world else BLOCKS * UNIT // (1 if name == "ddp" else 2)
        assert most <= steady
        assert UNIT <= most <= 3 * UNIT + waiting
        assert without >= BLOCKS * UNIT // 2 > 3 * UNIT or name != "ddp"


def prepared(rank: int, make: Callable[[nn.Module], object], **settings: object) -> None:
    with shoal.init("zero2", run_dir="none", device="cpu", layerwise=True, **settings) as job:
        model = Net()
        job.prepare(model, make(model))


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    halves = [list(model.blocks[:4].parameters()), [*model.blocks[4:].parameters(), model.spare]]
    return [torch.optim.SGD(half, lr=0.1) for half in halves]


def hooked(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = adamw(model)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


REFUSED: dict[str, tuple[type[ShoalError], str, Callable[[nn.Module], object], dict[str, object]]] = {
    "float16": (SettingError, r'layerwise=True with precision="float16"\n.*overflow.*\n.*bfloat16', adamw, {"precision": "float16"}),
    "adafactor": (
        OptimizerError, r"layerwise=True with Adafactor, whose step may need all gradients at once\n.*\n.*AdamW",
        lambda m: torch.optim.Adafactor(m.parameters()), {},
    ),
    "lamb": (OptimizerError, "layerwise=True with LAMB", lambda m: shoal.optim.LAMB(m.parameters(), lr=0.1), {}),
    "hooks": (OptimizerError, "layerwise=True with AdamW.*\n.*\n.*without step hooks", hooked, {}),
    "two": (OptimizerError, "layerwise=True with 2 optimizers over one model: SGD, SGD\n.*\n.*one optimizer with groups", two, {}),
    "pending": (SettingError, r"layerwise=True with pending=True\n.*\n.*pending=False, or layerwise=False", adamw, {"pending": True}),
    "overlap": (SettingError, "layerwise=True with overlap=False\n.*last.*\n.*layerwise=False, or overlap=True", adamw, {"overlap": False}),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_needs_all_gradients_is_refused(why: str) -> None:
    error, text, make, settings = REFUSED[why]
    with pytest.raises(error, match=text):
        run(2, lambda r: prepared(r, make, **settings))


def misused(_rank: int, misuse: Callable[[shoal.Job, nn.Module, torch.optim.Optimizer], None]) -> None:
    """In the second step, between backward and `step()`."""
    with shoal.init("zero2", run_dir="none", device="cpu", layerwise=True) as job:
        model = Net()
        model, optimizer = job.prepare(model, adamw(model))
        for step in range(2):
            model(torch.randn(4, WIDTH)).square().mean().backward()
            if step:
                misuse(job, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()


def test_clipping_is_refused() -> None:
    with pytest.raises(SettingError, match=r"clip_grad_norm with layerwise=True\n.*norm.*\n.*layerwise=False"):
        run(2, lambda r: misused(r, lambda job, _m, _o: job.clip_grad_norm(1.0)))


def test_a_grad_scaler_is_refused() -> None:
    def unscale(_job: shoal.Job, _model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)

    text = r"layerwise=True: the gradient of '.*' is used and gone before optimizer.step\(\)\n.*GradScaler"
    with pytest.raises(AwayError, match=text):
        run(2, lambda r: misused(r, unscale))


def test_hooks_that_come_later_are_refused() -> None:
    def register(_job: shoal.Job, _model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: None)

    with pytest.raises(OptimizerError, match="layerwise=True with AdamW"):
        run(2, lambda r: misused(r, register))


def test_there_is_no_way_back(tmp_path: Path) -> None:
    """A step that has begun to update is neither saved, nor given up."""
    with pytest.raises(OrderError, match=r"job\.save in the middle of a step"):
        run(2, lambda r: misused(r, lambda job, _m, _o: job.save(tmp_path)))
    with pytest.raises(OrderError, match=r"zero_grad\(\) came after this leaf's gradients had been handed on"):
        run(2, lambda r: misused(r, lambda _j, _m, optimizer: optimizer.zero_grad()))


def test_a_small_model_of_one_unit_waits_for_no_votes() -> None:
    """In one round it would: its gradient would be there with the votes, after backward."""

    def main(rank: int, *, layerwise: bool) -> list[float]:
        with shoal.init("ddp", leaves=2, layerwise=layerwise, one_round="1MiB", run_dir="none") as job:
            net = nn.Linear(4, 4)
            net, optimizer = job.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
            for step in range(4):
                net(torch.full((2, 4), 1.0 + step + rank)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            return [float(x) for values in job.state_dict(net).values() for x in values.flatten()]  # on rank 0

    want, got = (run(2, lambda rank, how=how: main(rank, layerwise=how)) for how in (False, True))
    assert got == want
    assert len(got[0]) == 20
