"""Several optimizers over one model, several models in one job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.errors import OptimizerError, OrderError
from shoal.strategy import Shard, Strategy
from tests.engine.trials import PLACES, Numbers, assert_bits, averaged, inputs

State = dict[str, Tensor]


class Stack(nn.Module):
    """Matrices for one optimizer, vectors for another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(13, 70), nn.Tanh(), nn.Linear(70, 13)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=1e-2)]


def plain_two(steps: int, leaves: int) -> State:
    shoal.seed(0, 0)
    model = Stack()
    optimizers = two(model)
    for step in range(steps):
        found: list[list[Tensor]] = []
        for leaf in range(leaves):
            model(inputs(step, leaf, 4, 13)).square().mean().backward()
            found.append([p.grad for p in model.parameters()])
            model.zero_grad()
        for i, p in enumerate(model.parameters()):
            p.grad = averaged([grads[i] for grads in found])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("place", PLACES)
def test_muon_and_adamw_over_one_model(place: str, tmp_path: Path) -> None:
    world, strategy = PLACES[place]

    def rank_main(_rank: int) -> tuple[State, list[bool], list[object], object]:
        with shoal.init(strategy, leaves=4, run_dir="none") as job:
            model = Stack()
            model, (muon, adamw) = job.prepare(model, two(model))
            acted: list[bool] = []
            rates: list[object] = []
            scheduler = torch.optim.lr_scheduler.StepLR(adamw, 2, gamma=1.0)
            for number in job.loader(Numbers(12), global_batch=4, shuffle=False):
                model(inputs(*divmod(int(number), 4), 4, 13)).square().mean().backward()
                muon.step()
                muon.zero_grad()
                acted.append(job.stepped)
                adamw.step()
                adamw.zero_grad()
                scheduler.step()
                assert job.stepped == acted[-1]
            rates = [scheduler.last_epoch, job.step]
            job.save(tmp_path)
            return job.state_dict(model), acted, rates, job.state_dict(muon)

    state, acted, counted, optimizer = run(world, rank_main)[0]
    for name, value in plain_two(3, 4).items():
        assert_bits(state[name], value, name)
    assert acted.count(True) == 3
    assert counted == [3, 3]
    assert len(optimizer["state"]) == 6

    def resumed(_rank: int) -> State:
        with shoal.init("zero3", run_dir="none") as job:
            model = Stack()
            model, _ = job.prepare(model, two(model))
            job.load(tmp_path)
            return job.state_dict(model)

    for name, value in run(3, resumed)[0].items():
        assert_bits(value, state[name], name)


def test_one_of_two_optimizers_is_left_out() -> None:
    """Its parameters keep their values; the next leaf begins all the same."""

    def rank_main(_rank: int) -> State:
        with shoal.init("zero3", run_dir="none") as job:
            model = Stack()
            model, (muon, adamw) = job.prepare(model, two(model))
            before = job.state_dict(model)
            for step in range(3):
                model(inputs(step, job.rank, 4, 13)).square().mean().backward()
                adamw.step()
                adamw.zero_grad()
                muon.zero_grad()
            assert job.step == 3 or job.step == 2  # the last one is open until something follows
            model(inputs(9, job.rank, 4, 13)).sum().backward()
            muon.step()
            adamw.step()
            after = job.state_dict(model)
            return {n: after[n] - before[n] for n in after}

    changed = run(2, rank_main)[0]
    assert all(bool(v.any()) for v in changed.values())


def test_a_parameter_of_two_optimizers() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", run_dir="none") as job:
            model = Stack()
            job.prepare(model, [torch.optim.SGD(model.parameters(), lr=1.0), torch.optim.AdamW(model.parameters())])

    with pytest.raises(OptimizerError) as e:
        run(1, rank_main)
    assert "'blocks.0.0.weight' is updated by two optimizers, SGD and AdamW" in str(e.value)


# ---------------------------------------------------------------- two models


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 90), nn.BatchNorm1d(90), nn.Tanh(), nn.Linear(90, 7))


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 80), nn.BatchNorm1d(80), nn.Tanh(), nn.Linear(80, 1))


Gan = Callable[["Parts", Tensor], None]


class Parts:
    """What a GAN's loop has."""

    def __init__(self) -> None:
        self.g, self.d = generator(), critic()
        self.opt_g = torch.optim.Adam(self.g.parameters(), lr=1e-2)
        self.opt_d = torch.optim.SGD(self.d.parameters(), lr=0.1, momentum=0.9)


def critic_first(p: Parts, real: Tensor) -> None:
    """As in the tutorial: the generator's loss goes through the critic after its step."""
    p.d.zero_grad()
    fake = p.g(torch.randn(6, 5))
    (p.d(real).square().mean() - p.d(fake.detach()).mean()).backward()
    p.opt_d.step()
    p.g.zero_grad()
    p.d(fake).mean().backward()
    p.opt_g.step()


def generator_first(p: Parts, real: Tensor) -> None:
    fake = p.g(torch.randn(6, 5))
    p.d(fake).mean().backward()
    p.opt_g.step()
    p.opt_g.zero_grad()
    p.opt_d.zero_grad()
    (p.d(real).square().mean() - p.d(fake.detach()).mean()).backward()
    p.opt_d.step()
    p.opt_d.zero_grad()


def plain_gan(gan: Gan, steps: int) -> State:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shoal.seed(0, 0)
    parts = Parts()
    for step in range(steps):
        shoal.seed(0, step, 0)
        gan(parts, inputs(step, 0, 6, 7))
    torch.set_num_threads(threads)
    return {f"g.{n}": v for n, v in parts.g.state_dict().items()} | {
        f"d.{n}": v for n, v in parts.d.state_dict().items()
    }


def train_gan(gan: Gan, world: int, strategy: str | Strategy, steps: int, path: Path | None = None) -> State:
    def rank_main(_rank: int) -> State:
        with shoal.init(strategy, leaves=world, run_dir="none") as job:
            parts = Parts()
            job.prepare(parts.g, parts.opt_g, name="generator")
            job.prepare(parts.d, parts.opt_d, name="critic")
            start = job.load(path) if path is not None and path.exists() else 0
            for number in job.loader(Numbers(world * (steps - start)), global_batch=world, shuffle=False):
                step, leaf = divmod(int(number), world)
                gan(parts, inputs(start + step, leaf, 6, 7))
            if path is not None:
                job.save(path)
            assert job.step == steps
            g, d = job.state_dict(parts.g), job.state_dict(parts.d)
            return {f"g.{n}": v for n, v in g.items()} | {f"d.{n}": v for n, v in d.items()}

    return run(world, rank_main)[0]


GANS = [critic_first, generator_first]


@pytest.mark.parametrize("gan", GANS)
@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_a_gan_alone_is_plain_pytorch(gan: Gan, name: str) -> None:
    found = train_gan(gan, 1, name, 4)
    for key, value in plain_gan(gan, 4).items():
        assert_bits(found[key], value, key)


@pytest.mark.parametrize("gan", GANS)
@pytest.mark.parametrize("shard", [Shard.OPTIMIZER, Shard.GRADIENTS, Shard.PARAMETERS])
def test_a_gan_under_every_strategy(gan: Gan, shard: Shard, tmp_path: Path) -> None:
    want = train_gan(gan, 2, "ddp", 4)
    found = train_gan(gan, 2, Strategy(shard=shard), 4)
    train_gan(gan, 2, Strategy(shard=shard), 2, tmp_path / "half")
    resumed = train_gan(gan, 2, "zero1", 4, tmp_path / "half")
    for key, value in want.items():
        assert_bits(found[key], value, key)
        assert_bits(resumed[key], value, key)


def test_gradients_that_were_not_zeroed() -> None:
    def forgetful(p: Parts, real: Tensor) -> None:
        fake = p.g(torch.randn(6, 5))
        (p.d(real).square().mean() - p.d(fake.detach()).mean()).backward()
        p.opt_d.step()
        p.d(fake).mean().backward()
        p.opt_g.step()

    with pytest.raises(OrderError) as e:
        train_gan(forgetful, 2, "zero3", 2)
    assert "still has gradients of a forward that came after its own optimizer's step" in str(e.value)


def test_one_model_steps_twice() -> None:
    def eager(p: Parts, real: Tensor) -> None:
        for _ in range(2):
            p.opt_d.zero_grad()
            p.d(real).mean().backward()
            p.opt_d.step()
        p.g(torch.randn(6, 5)).mean().backward()
        p.opt_g.step()

    with pytest.raises(OrderError) as e:
        train_gan(eager, 2, "ddp", 2)
    assert "stepped again before those of the job's other models" in str(e.value)


def test_a_critic_of_several_batches() -> None:
    """The generator steps with every third batch only."""
    count = [0]

    def wasserstein(p: Parts, real: Tensor) -> None:
        p.opt_d.zero_grad()
        (p.d(real).mean() - p.d(p.g(torch.randn(6, 5)).detach()).mean()).backward()
        p.opt_d.step()
        count[0] += 1
        if count[0] % 3 == 0:
            p.opt_g.zero_grad()
            p.d(p.g(torch.randn(6, 5))).mean().backward()
            p.opt_g.step()

    want = train_gan(wasserstein, 1, "ddp", 6)
    count[0] = 0
    found = train_gan(wasserstein, 1, "zero3", 6)
    for key, value in want.items():
        assert_bits(found[key], value, key)


def test_models_by_name() -> None:
    def nameless(_rank: int) -> None:
        with shoal.init("ddp", run_dir="none") as job:
            parts = Parts()
            job.prepare(parts.g, parts.opt_g, name="generator")
            job.prepare(parts.d, parts.opt_d, name="critic")
            with pytest.raises(OrderError, match="which with model="):
                job.clip_grad_norm(1.0)
            job.prepare(generator(), torch.optim.SGD(critic().parameters(), lr=1.0))

    with pytest.raises(OrderError) as e:
        run(1, nameless)
    assert 'name="generator"' in str(e.value)


def test_buffers_that_nobody_touched_aside_stay_as_they_are() -> None:
    """The first model has nothing to do for the second. A mean of three equal numbers may be another number."""

    def rank_main(_rank: int) -> State:
        with shoal.init("ddp", leaves=6, run_dir="none") as job:
            first = nn.Sequential(nn.Linear(1, 128), nn.BatchNorm1d(128), nn.Linear(128, 1))
            second = nn.Linear(1, 1)
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second)]
            job.prepare(first, optimizers[0], name="first")
            job.prepare(second, optimizers[1], name="second")
            for x in job.loader(Numbers(57), global_batch=60):
                for model, optimizer in zip((first, second), optimizers, strict=True):
                    model(x.float()[:, None]).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            return job.state_dict(first)

    want, found = run(1, rank_main)[0], run(3, rank_main)[0]
    for key, value in want.items():
        assert_bits(found[key], value, key)
