"""The stand-in for a job: the same script by torch alone, and what a comparison with it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import shoal
from shoal.against import Near, Part, near
from shoal.comm.threads import run
from shoal.errors import BatchError, SettingError
from shoal.plain import PlainJob
from shoal.settings import resolve
from shoal.trace import By, Trace
from shoal.verify import compare
from tests.pool import Pool

States = list[dict[str, Tensor]]
Script = Callable[[shoal.Job], States]


def data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    g = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(44, 6, generator=g, dtype=dtype), torch.randn(44, 1, generator=g, dtype=dtype))


def mlp(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 70), nn.Tanh(), *extra, nn.Linear(70, 1))


def state(*models: nn.Module) -> dict[str, Tensor]:
    return {f"{i}/{n}": v.clone() for i, m in enumerate(models) for n, v in m.state_dict().items()}


def with_everything(job: shoal.Job) -> States:
    """Dropout, batch norm, a scheduler, clipping, evaluation in the middle, and a mean."""
    model = mlp(nn.Dropout(0.2), nn.BatchNorm1d(70))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer, loader, scheduler = job.prepare(
        model, optimizer, DataLoader(data(), batch_size=8, shuffle=True), scheduler
    )
    states: States = []
    for epoch in range(2):
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y) * (1 + torch.rand(()))
            loss.backward()
            assert job.clip_grad_norm(0.3) > 0.3 or epoch
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            assert job.mean(loss) == loss.item()
            states.append({**state(model), "drawn": torch.rand(2)})
        model.eval()
        for x, _ in job.loader(data(), global_batch=22):
            with torch.no_grad():
                states.append({"seen": model(x), "drawn": torch.rand(2)})
        model.train()
    return states


def with_its_own_batches(job: shoal.Job) -> States:
    model = mlp(nn.Dropout(0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.prepare(model, optimizer)
    states: States = []
    for step in range(3):
        job.weight(3, full=4) if step % 2 else None
        x = torch.randn(4, 6)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (job.step, job.stepped, job.leaves) == (step + 1, True, 1)
        states.append({**state(model), "x": x})
    return states


def with_micro_steps(job: shoal.Job) -> States:
    model = mlp(nn.Dropout(0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.prepare(model, optimizer)
    states: States = []
    for _ in range(3):
        for _ in job.micro_steps(4):
            (model(torch.randn(4, 6)).square().mean() / 4).backward()
        job.clip_grad_norm(0.01)
        optimizer.step()
        optimizer.zero_grad()
        states.append(state(model))
    return states


def with_two_models(job: shoal.Job) -> States:
    generator, critic = nn.Linear(3, 6), mlp()
    opt_g, opt_c = torch.optim.Adam(generator.parameters()), torch.optim.Adam(critic.parameters())
    job.prepare(generator, opt_g, name="generator")
    _, _, loader = job.prepare(critic, opt_c, DataLoader(data(), batch_size=8), name="critic")
    states: States = []
    for x, _ in loader:
        opt_g.zero_grad()
        fake = generator(torch.randn(len(x), 3))
        critic(fake).mean().backward()
        opt_g.step()
        opt_c.zero_grad()
        (critic(x).mean() - critic(fake.detach()).mean()).backward()
        opt_c.step()
        states.append(state(generator, critic))
    return states


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Callable[..., PlainJob]]:
    """Makes a stand-in; torch's threads are as before in the end."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    folders = (tmp_path / str(number) for number in range(9))

    def made(by: By, **settings: object) -> PlainJob:
        folder = next(folders)
        folder.mkdir()
        return PlainJob(Trace(folder, 10**6, by), resolve(settings, environ={}, cwd=None))

    yield made
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("script", [with_everything, with_its_own_batches, with_micro_steps, with_two_models])
def test_one_rank_and_one_leaf_have_torchs_bits(script: Script, plain: Callable[..., PlainJob]) -> None:
    def rank_main(_rank: int) -> States:
        with shoal.init(seed=3, run_dir="none", device="cpu") as job:
            return script(job)

    report = compare(run(1, rank_main)[0], script(plain(By.ALONE, seed=3)))
    assert report.equal, report


def smooth(job: shoal.Job, reduction: str = "mean", clip: float = 0.3) -> States:
    """No random numbers, no batch norm: one batch of all leaves' samples computes the same."""
    dtype = torch.float64
    model = mlp().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model, optimizer, loader = job.prepare(model, optimizer, DataLoader(data(dtype), batch_size=4, shuffle=True))
    states: States = []
    for x, y in loader:
        nn.functional.mse_loss(model(x), y, reduction=reduction).backward()
        job.clip_grad_norm(clip)
        optimizer.step()
        optimizer.zero_grad()
        if job.stepped:
            states = kept(states, job, model)
    return states


def wrong(job: shoal.Job) -> States:
    """A sum in the place of a mean."""
    return smooth(job, "sum", 1e9)


def under_shoal(script: Script) -> States:
    def rank_main(_rank: int) -> States:
        with shoal.init("zero3", leaves=3, run_dir="none", device="cpu") as job:
            return script(job)

    return run(2, rank_main)[0]


def test_leaves_are_near_one_batch_of_all_their_samples(plain: Callable[..., PlainJob]) -> None:
    """11 batches: the last step has two leaves."""
    report = near(under_shoal(smooth), smooth(plain(By.WHOLE, leaves=3)))
    assert (report.equal, report.steps) == (True, 4), report
    assert 0 < report.apart < 1e-14


def test_a_loss_that_is_no_mean_is_named(plain: Callable[..., PlainJob]) -> None:
    report = near(under_shoal(wrong), wrong(plain(By.WHOLE, leaves=3)))
    assert (report.equal, report.step, report.name) == (False, 0, "0.weight"), report
    assert report.apart > 1e-6


def of_one_rank(script: str, folder: Path) -> States:
    with PlainJob(Trace(folder, 10**6, By.DDP), resolve({"leaves": 2}, environ={}, cwd=None)) as job:
        return globals()[script](job)


def kept(states: States, job: shoal.Job, model: nn.Module) -> States:
    now = job.state_dict(model)
    return states + ([{k: v.clone() for k, v in now.items()}] if now else [])


def weighed(job: shoal.Job) -> States:
    """Leaves of unequal weight, which the script says itself."""
    model = mlp(nn.Dropout(0.3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.prepare(model, optimizer)
    states: States = []
    for _ in range(4):
        job.weight(3 - 2 * job.rank, full=4)
        model(torch.randn(4, 6, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        states = kept(states, job, model)
    return states


def accumulated(job: shoal.Job) -> States:
    """Micro-steps that add up, two in each leaf."""
    model = mlp(nn.Dropout(0.3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.prepare(model, optimizer)
    states: States = []
    for _ in range(4):
        for _ in job.micro_steps(4):
            (model(torch.randn(4, 6, dtype=torch.float64)).square().mean() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        states = kept(states, job, model)
    return states


@pytest.mark.parametrize("script", [smooth, weighed, accumulated])
def test_leaves_are_near_torchs_ddp(script: Script, pool: Pool, tmp_path: Path) -> None:
    def rank_main(_rank: int) -> States:
        with shoal.init("zero2", leaves=2, run_dir="none", device="cpu") as job:
            return script(job)

    report = near(run(2, rank_main)[0], pool.run(of_one_rank, script.__name__, tmp_path)[0])
    assert report.equal, report
    assert report.steps >= 4


def test_why_a_whole_batch_would_not_do(plain: Callable[..., PlainJob]) -> None:
    found = {}
    for script in (with_everything, with_its_own_batches, with_micro_steps, with_two_models, smooth):
        job = plain(By.ALONE)
        script(job)
        found[script.__name__] = job._feed.unlike_whole
    assert found == {
        "with_everything": "BatchNorm1d takes its statistics from each leaf",
        "with_its_own_batches": "the script draws its own batches",
        "with_micro_steps": "",
        "with_two_models": "random numbers are drawn in every leaf",
        "smooth": "",
    }


def test_what_is_saved_is_not_there_in_the_end(tmp_path: Path, plain: Callable[..., PlainJob]) -> None:
    job = plain(By.ALONE)
    model = mlp()
    job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert job.save(tmp_path / "checkpoint").name == "step-0"
    assert not (tmp_path / "checkpoint").exists()
    with job.whole(model):
        assert job.state_dict(model).keys() == model.state_dict().keys()
    assert (job.loss_scale(), job.world_size, job.main) == (1.0, 1, True)


def test_refusals(plain: Callable[..., PlainJob]) -> None:
    with pytest.raises(SettingError, match="precision=bfloat16 has no plain counterpart"):
        plain(By.ALONE, precision="bfloat16")
    with torch.device("meta"):
        model = mlp()
    job = plain(By.WHOLE, leaves=3)
    with pytest.raises(SettingError, match="a model on the meta device has no plain counterpart"):
        job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(SettingError, match=r"job\.ema has no plain counterpart"):
        job.ema(model, 0.9)
    with pytest.raises(BatchError, match="does not divide into leaves=3"):
        job.micro_steps(4)
    with pytest.raises(BatchError, match="does not divide into leaves=3"):
        job.loader(data(), global_batch=4)


def test_a_script_in_float64(tmp_path: Path, plain: Callable[..., PlainJob]) -> None:
    """What it reads and what its losses are compared with, too."""
    trace = Trace(tmp_path, 10**6, By.ALONE, double=True)
    job = PlainJob(trace, resolve({}, environ={}, cwd=None))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = job.prepare(model, optimizer, DataLoader(data(), batch_size=22))
    for x, y in loader:
        assert (x.dtype, y.dtype) == (torch.float64, torch.float64)
        assert model(x.float()).dtype == torch.float64
        nn.functional.binary_cross_entropy(model(x).sigmoid(), y.sigmoid()).backward()
        optimizer.step()
    first, second = trace.states()
    assert first["0.weight"].dtype == torch.float64
    assert not first["0.weight"].equal(second["0.weight"])


def test_what_is_too_far_is_named() -> None:
    one = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.ones(3)}
    close = {"a": torch.tensor([0, 9e-10], dtype=torch.float64)}  # only what is expected counts
    assert near([one, one], [one, close]) == Near(equal=True, steps=2, apart=pytest.approx(9e-10))
    assert str(near([one], [close])) == "within 9.0e-10 after each of 1 steps"
    far = near([one, one], [one, {"b": torch.tensor([1.0, 1.5, 2.0])}])
    assert (far.step, far.name, far.differing) == (1, "b", 2)
    assert str(far) == "different after step 1: 'b' by up to 1.0e+00, and 1e-09 may be"
    assert not near([one], [{"b": torch.tensor([1.0, 1.0, float("nan")])}]).equal
    assert near([close], [one]).why == "'b' is not there under shoal"
    assert near([{"b": torch.ones(2)}], [{"b": torch.ones(3)}]).why == "'b' is (2,) under shoal"
    assert str(near([one, one], [one])) == "different after step 1: 2 steps under shoal, 1 without it"
    assert str(Part(what="these", why="they cannot be")) == "these: left out, as they cannot be"
