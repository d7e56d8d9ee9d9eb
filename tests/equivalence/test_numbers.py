"""What is part of the numbers (precision, masters, twigs): the same bits as one process with the same of it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.strategy import Shard, Strategy
from tests.engine.trials import Numbers, assert_bits, inputs
from tests.equivalence.models import Outcome, on_threads, sgd

SHARDS = {"ddp": Shard.NOTHING, "zero1": Shard.OPTIMIZER, "zero2": Shard.GRADIENTS, "zero3": Shard.PARAMETERS}
PLACES = [(name, world, None) for name in SHARDS for world in (1, 2, 3, 4)]
PLACES += [("zero3", 4, 2), ("zero1", 6, 3)]
KINDS: dict[str, dict[str, object]] = {
    "float16": {"precision": "float16"},
    "stochastic": {"precision": "bfloat16", "masters": False},
    "twig 2": {"twig": 2},
    "twig 3": {"twig": 3, "precision": "float16"},
    "twig 5": {"twig": 5},
}


@cache
def alone(kind: str, leaves: int) -> Outcome:
    return on_threads(1, "ddp", leaves=leaves, **KINDS[kind])


@pytest.mark.every(7)
@pytest.mark.parametrize("leaves", [4, 12])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "world", "ranks_per_copy"), PLACES)
def test_equals_one_process(name: str, world: int, ranks_per_copy: int | None, kind: str, leaves: int) -> None:
    strategy = Strategy(shard=SHARDS[name], ranks_per_copy=ranks_per_copy)
    assert on_threads(world, strategy, leaves=leaves, order=world, **KINDS[kind]) == alone(kind, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_each_changes_the_numbers(kind: str) -> None:
    """So that the table is seen to be able to fail. Twigs of two are what the tree begins with anyway."""
    assert (alone(kind, 12) == on_threads(1, "ddp", leaves=12)) == (kind == "twig 2")


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_twigs_and_any_number_of_leaves(name: str, leaves: int) -> None:
    want = on_threads(1, "ddp", leaves=leaves, twig=2, global_batch=210)
    assert on_threads(3, name, leaves=leaves, twig=2, global_batch=210) == want


def test_a_twig_by_hand() -> None:
    """Five leaves in twigs of three: ((a + b) + c) + (d + e)."""
    torch.manual_seed(0)
    start = torch.randn(3, 70)

    def rank_main(_rank: int) -> Tensor:
        with shoal.init("zero2", leaves=5, twig=3, run_dir="none") as job:
            model = nn.Linear(70, 3, bias=False)
            with torch.no_grad():
                model.weight.copy_(start)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
            for number in job.loader(Numbers(5), global_batch=5, shuffle=False):
                model(inputs(0, int(number), 4, 70)).square().sum().backward()
                optimizer.step()
            return job.state_dict(model).get("weight", start)

    grads: list[Tensor] = []
    for number in range(5):
        weight = start.clone().requires_grad_()
        nn.functional.linear(inputs(0, number, 4, 70), weight).square().sum().backward()
        grads.append(weight.grad)
    a, b, c, d, e = grads
    want = start - ((a + b + c) + (d + e)) / 5
    assert_bits(run(2, rank_main)[0], want, "weight")


# ---------------------------------------------------------------- float16


class Planted(nn.Module):
    """A gradient that overflows in one leaf of one step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        x = self.blocks[0](x)
        x = self.blocks[1](x) * factor
        return self.blocks[2](x)


def train(strategy: str, world: int, step: int, leaf: int) -> tuple[dict[str, Tensor], list[float], list[bool]]:
    def rank_main(_rank: int) -> tuple[dict[str, Tensor], list[float], list[bool]]:
        with shoal.init(strategy, leaves=4, precision="float16", run_dir="none") as job:
            model = Planted()
            model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), units=["blocks.1"])
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            scales, acted = [job.loss_scale()], list[bool]()
            for number in job.loader(Numbers(16), global_batch=4, shuffle=False):
                at = divmod(int(number), 4)
                out = model(inputs(*at, 2, 9), 3e4 if at == (step, leaf) else 1e-3)
                (out.square().mean() * (1e3 if at == (step, leaf) else 1e-3)).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                acted.append(job.stepped)
                if job.stepped:
                    scales.append(job.loss_scale())
            assert scheduler.last_epoch == 4, "a step that was left out is a step for schedules"
            return job.state_dict(model), scales, acted

    return run(world, rank_main)[0]


@pytest.mark.parametrize(
    ("strategy", "world", "rank"), [("ddp", 1, 0), ("ddp", 4, 2), ("zero3", 2, 0), ("zero2", 4, 2)]
)
def test_an_overflow_is_named_and_left_out_by_all(
    strategy: str, world: int, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    state, scales, acted = train(strategy, world, step=1, leaf=2)
    want, _, _ = train("ddp", 1, step=1, leaf=2)
    for name, value in want.items():
        assert_bits(state[name], value, name)
    assert scales == [65536.0, 65536.0, 32768.0, 32768.0, 32768.0]
    assert acted.count(True) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "overflowed" in line]
    assert said[0].startswith("shoal: the gradient of 'blocks.")
    owner = {("zero3", 2): 0, ("ddp", 1): 0}.get((strategy, world), 2)
    assert said[0].endswith(f"overflowed in leaf 2 of step 1 (rank {owner}): no update, loss scale 65536 -> 32768")
    assert rank == owner


def test_a_loss_that_is_never_finite() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", precision="float16", run_dir="none") as job:
            model = nn.Linear(3, 3)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
            for _ in range(60):
                (model(torch.ones(1, 3)).sum() * float("inf")).backward()
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(shoal.errors.ModelError) as e:
        run(2, rank_main)
    assert "the gradient of 'weight' is not finite at any loss scale" in str(e.value)


def test_gradients_that_the_user_sees_are_not_scaled() -> None:
    def rank_main(_rank: int) -> tuple[Tensor, float | None]:
        with shoal.init("ddp", precision="float16", run_dir="none") as job:
            model = nn.Linear(64, 1, bias=False)
            nn.init.constant_(model.weight, 0.5)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
            x = torch.ones(1, 64, requires_grad=True)
            (model(x).sum() / 4).backward()
            norm = job.clip_grad_norm(1e9)
            optimizer.step()
            assert x.grad is not None
            return x.grad, norm

    grad, norm = run(1, rank_main)[0]
    assert grad.tolist() == [[0.125] * 64]
    assert norm == 2.0


def test_a_grad_scaler_is_refused() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", run_dir="none") as job:
            model = nn.Linear(3, 3)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(model(torch.ones(1, 3)).sum()).backward()
            scaler.step(optimizer)

    with pytest.raises(shoal.errors.AwayError) as e:
        run(1, rank_main)
    assert "GradScaler" in str(e.value)
    assert 'precision="float16"' in str(e.value)


# ---------------------------------------------------------------- per-module precision, autocast, rounding


class Normed(nn.Module):
    """Records the dtype that its norm computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 65), nn.LayerNorm(65), nn.Linear(65, 2)
        self.seen: list[torch.dtype] = []
        self.norm.register_forward_hook(lambda _m, args, out: self.seen.extend([args[0].dtype, out.dtype]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("named", ["LayerNorm", "norm"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_norms_in_float32(name: str, precision: str, named: str) -> None:
    def rank_main(_rank: int) -> tuple[dict[str, Tensor], list[torch.dtype]]:
        with shoal.init(name, leaves=2, precision=precision, run_dir="none") as job:
            model = Normed()
            model, optimizer = job.prepare(model, sgd(model), float32=[named])
            for number in job.loader(Numbers(6), global_batch=2, shuffle=False):
                model(inputs(0, int(number), 5, 6)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            return job.state_dict(model), model.seen

    (alone, seen), (state, _) = run(1, rank_main)[0], run(2, rank_main)[0]
    assert set(seen) == {torch.float32}
    for key, value in alone.items():
        assert_bits(state[key], value, key)


def test_an_unknown_module_in_float32() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", precision="bfloat16", run_dir="none") as job:
            model = Normed()
            job.prepare(model, sgd(model), float32=["LayerNrom"])

    with pytest.raises(shoal.errors.ModelError, match="did you mean 'LayerNorm'"):
        run(1, rank_main)


@pytest.mark.parametrize("name", SHARDS)
def test_autocast(name: str) -> None:
    """The user's own mixed precision: bits as in one process."""

    def rank_main(_rank: int) -> dict[str, Tensor]:
        with shoal.init(name, leaves=4, run_dir="none") as job:
            model = Normed()
            model, optimizer = job.prepare(model, sgd(model))
            for number in job.loader(Numbers(12), global_batch=4, shuffle=False):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(inputs(0, int(number), 5, 6)).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return job.state_dict(model)

    alone, state = run(1, rank_main)[0], run(3, rank_main)[0]
    for key, value in alone.items():
        assert_bits(state[key], value, key)


def test_rounding_by_chance_is_right_on_average() -> None:
    from shoal.engine.rounding import round_into

    values = torch.full((200_000,), 1.0 + 0.3 / 128)  # 0.3 of the way between two neighbours
    out = torch.empty(200_000, dtype=torch.bfloat16)
    round_into(out, values, 5, 0)
    assert sorted(set(out.tolist())) == [1.0, 1.0078125]
    assert (out != 1.0).double().mean().item() == pytest.approx(0.3, abs=0.005)
    again = torch.empty(100, dtype=torch.bfloat16)
    round_into(again, values[:100], 5, 150_000)
    assert torch.equal(again, out[150_000:150_100])
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), -1.5, 0.0, -0.0])
    round_into(again[:6], odd, 1, 0)
    assert torch.equal(again[:6].float().nan_to_num(7), odd.nan_to_num(7))
