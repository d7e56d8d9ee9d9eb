"""shoal's own optimizers: alone they are torch's kind, on shards they give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import shoal
from shoal.comm.threads import run
from shoal.engine.optim import granule
from shoal.errors import OptimizerError
from shoal.optim import LAMB, LARS, AdamW8bit
from shoal.optim.adam8 import pack, unpack
from shoal.strategy import Cut, Shard, Strategy
from tests.engine.trials import PLACES, Numbers, assert_bits, assert_same, inputs, plain, train

PLACES_AND_CUTS = PLACES | {
    "zero3x4": (4, Strategy(shard=Shard.PARAMETERS)),
    "by parameter": (3, Strategy(shard=Shard.OPTIMIZER, cut=Cut.PARAMETER)),
}


class Odd(nn.Module):
    """Sizes that no block divides, a scalar, an empty, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(23, 201), nn.Tanh(), nn.Linear(201, 23)) for _ in range(2))
        self.blocks[0][0].bias.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.unused = nn.Parameter(torch.randn(300))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x * self.scale + self.nothing.sum()


def grouped(model: nn.Module) -> list[dict[str, object]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 2e-3},
    ]


OPTIMIZERS = {
    "lars": lambda m: LARS(grouped(m), lr=0.5, weight_decay=0.01),
    "lamb": lambda m: LAMB(grouped(m), lr=1e-2),
    "adamw8bit": lambda m: AdamW8bit(grouped(m), lr=1e-2),
}


def loss_of(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 6, 23)).square().mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("place", PLACES_AND_CUTS)
def test_equals_the_optimizer_alone(place: str, name: str) -> None:
    got = train(PLACES_AND_CUTS[place], Odd, loss_of, make_optimizer=OPTIMIZERS[name], steps=4)
    assert_same(got, plain(Odd, loss_of, make_optimizer=OPTIMIZERS[name], steps=4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_on_at_another_place(name: str, tmp_path: Path) -> None:
    """Saved on three ranks under ZeRO-3, continued on two under ZeRO-1, and by one."""

    def rank_main(world: int, strategy: str, start: int, stop: int) -> dict[str, Tensor]:
        def body(_rank: int) -> dict[str, Tensor]:
            with shoal.init(strategy, leaves=4, run_dir="none") as job:
                model = Odd()
                model, optimizer = job.prepare(model, OPTIMIZERS[name](model))
                if start:
                    job.load(tmp_path)
                for number in job.loader(Numbers(4 * (stop - start)), global_batch=4, shuffle=False):
                    loss_of(model, *divmod(int(number) + 4 * start, 4)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if not start:
                    job.save(tmp_path)
                return job.state_dict(model)

        return run(world, body)[0]

    want = plain(Odd, loss_of, make_optimizer=OPTIMIZERS[name], steps=5).model
    rank_main(3, "zero3", 0, 2)
    for world, strategy in ((2, "zero1"), (1, "ddp"), (4, "zero3")):
        for key, value in rank_main(world, strategy, 2, 5).items():
            assert_bits(value, want[key], key)


def test_state_from_before_is_cut_with_its_parameters() -> None:
    """An AdamW8bit that has stepped already, then spread over three ranks."""

    def begun(model: nn.Module) -> Optimizer:
        optimizer = AdamW8bit(grouped(model), lr=1e-2)
        loss_of(model, 9, 9).backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    assert_same(train((3, "zero3"), Odd, loss_of, make_optimizer=begun), plain(Odd, loss_of, make_optimizer=begun))


def test_cuts_fall_between_blocks() -> None:
    assert granule(AdamW8bit([nn.Parameter(torch.randn(5))]), None) == 256

    def rank_main(_rank: int) -> list[int]:
        with shoal.init("zero3", run_dir="none") as job:
            model = nn.Linear(100, 100, bias=False)
            model, optimizer = job.prepare(model, AdamW8bit(model.parameters()))
            return [p.numel() for group in optimizer.param_groups for p in group["params"]]

    sizes = [n for part in run(3, rank_main) for n in part]
    assert sum(sizes) == 10_000
    assert [n % 256 for n in sizes[:-1]] == [0, 0]


def test_eight_bits_are_near() -> None:
    torch.manual_seed(0)
    values = torch.randn(1000) * torch.logspace(-3, 2, 1000)
    codes, scales = torch.zeros(1000, dtype=torch.int8), torch.zeros(4)
    pack(values, codes, scales)
    blocks = nn.functional.pad(values, (0, 24)).view(4, 256).abs().amax(1)
    error = nn.functional.pad((unpack(codes, scales) - values).abs(), (0, 24)).view(4, 256)
    assert bool((error <= blocks[:, None] / 254 * 1.001).all())


def test_eight_bits_train_as_well() -> None:
    """Both fit the same random net; the state is a quarter."""

    def fit(make: object) -> tuple[float, int]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 4))
        target = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
        optimizer = make(model.parameters(), lr=3e-3)
        for _ in range(150):
            x = torch.randn(64, 16)
            loss = nn.functional.mse_loss(model(x), target(x).detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.dim())
        return loss.item(), held

    (eight, small), (full, large) = fit(AdamW8bit), fit(torch.optim.AdamW)
    assert eight < 1.3 * full
    assert small < 0.27 * large


def test_lamb_scales_to_the_parameter() -> None:
    """One step at rate r without decay moves every parameter by r times its norm."""
    p = nn.Parameter(torch.full((10,), 3.0))
    optimizer = LAMB([p], lr=0.01, weight_decay=0.0)
    p.grad = torch.randn(10)
    before = p.detach().clone()
    optimizer.step()
    assert (p.detach() - before).norm().item() == pytest.approx(0.01 * before.norm().item(), rel=1e-5)


def test_lars_scales_to_the_parameter() -> None:
    p = nn.Parameter(torch.full((10,), 3.0))
    p.grad = torch.randn(10) * 1e6
    before = p.detach().clone()
    LARS([p], lr=1.0, trust=0.01).step()
    assert (p.detach() - before).norm().item() == pytest.approx(0.01 * before.norm().item(), rel=1e-5)


@pytest.mark.parametrize("make", [LARS, LAMB])
def test_a_negative_rate(make: type[Optimizer]) -> None:
    with pytest.raises(OptimizerError, match="lr=-1"):
        make([nn.Parameter(torch.ones(1))], lr=-1.0)


def test_a_whole_matrix_optimizer_is_no_elementwise_one() -> None:
    with pytest.raises(OptimizerError, match="elementwise=True with Muon"):
        granule(torch.optim.Muon([nn.Parameter(torch.ones(2, 2))]), True)


def test_a_granule_that_does_not_fit() -> None:
    class Hundred(torch.optim.SGD):
        granule = 100

    with pytest.raises(OptimizerError, match=r"Hundred\.granule is 100"):
        granule(Hundred([nn.Parameter(torch.ones(1))], lr=1.0), None)
