"""The outside reference: a plain PyTorch loop without shoal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from tests.equivalence.models import Everything, adamw, samples, sgd

STRATEGIES = ["ddp", "zero1", "zero2", "zero3"]


class Smooth(nn.Module):
    """No batch statistics and no random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(11, 67), nn.Tanh(), nn.Linear(67, 67), nn.Tanh(), nn.Linear(67, 11))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("precision", ["float32"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("name", STRATEGIES)
def test_one_rank_and_one_leaf_are_plain_pytorch(name: str, optimizer: object, precision: str) -> None:
    batches = [(torch.randn(8, 11), torch.randn(8, 11)) for _ in range(4)]

    def plain() -> dict[str, Tensor]:
        shoal.seed(3, 0)
        model = Everything()
        opt = optimizer(model)
        for step, (x, y) in enumerate(batches):
            shoal.seed(3, step, 0)
            opt.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            opt.step()
        return model.state_dict()

    def with_shoal(_rank: int) -> dict[str, Tensor]:
        with shoal.init(name, seed=3, run_dir="none", precision=precision) as job:
            model = Everything()
            model, opt = job.prepare(model, optimizer(model))
            for x, y in batches:
                opt.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                opt.step()
            return job.state_dict(model)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    want, got = plain(), run(1, with_shoal)[0]
    torch.set_num_threads(threads)
    assert want.keys() == got.keys()
    for key in want:
        assert torch.equal(want[key], got[key]), key


@pytest.mark.parametrize(("world", "leaves"), [(1, 4), (2, 2), (3, 12), (4, 4)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_leaves_and_ranks_stay_with_the_whole_batch(name: str, world: int, leaves: int) -> None:
    """float64, 5 steps of 48 samples, the last of 20: within 1e-9 of one batch."""
    data = samples(212)
    x, y = (t.double() for t in data.tensors)

    def plain() -> Tensor:
        torch.manual_seed(1)
        model = Smooth().double()
        opt = adamw(model)
        for start in range(0, 212, 48):
            opt.zero_grad()
            nn.functional.mse_loss(model(x[start : start + 48]), y[start : start + 48]).backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def with_shoal(_rank: int) -> Tensor | None:
        with shoal.init(name, leaves=leaves, run_dir="none", device="cpu") as job:
            torch.manual_seed(1)
            model = Smooth().double()
            model, opt = job.prepare(model, adamw(model))
            loader = job.loader(torch.utils.data.TensorDataset(x, y), global_batch=48, shuffle=False)
            for a, b in loader:
                nn.functional.mse_loss(model(a), b).backward()
                opt.step()
                opt.zero_grad()
            state = job.state_dict(model)
            return torch.cat([v.flatten() for v in state.values()]) if job.rank == 0 else None

    want, got = plain(), run(world, with_shoal)[0]
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-9


def test_a_step_by_hand() -> None:
    """Two ranks, one weight: w - lr * mean(g). With w = 2, loss = w * x: g = x, so 2 - 0.5 * (3 + 5) / 2 = 0."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * x

    for name in STRATEGIES:

        def rank_main(rank: int, name: str = name) -> float:
            with shoal.init(name, run_dir="none") as job:
                model = Line()
                model, opt = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
                model(torch.tensor([3.0, 5.0])[rank]).sum().backward()
                opt.step()
                with job.whole(model):
                    return model.w.item()

        assert run(2, rank_main) == [0.0, 0.0]


def test_weights_by_hand() -> None:
    """Leaves of 3 and 1 samples: (1 * g0 + 1/3 * g1) / (4/3)."""

    def rank_main(rank: int) -> float:
        with shoal.init("zero2", run_dir="none") as job:
            model = nn.Linear(1, 1, bias=False)
            nn.init.constant_(model.weight, 0.0)
            model, opt = job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
            out = model(torch.tensor([[3.0], [7.0]][rank]))
            job.weight([3, 1][rank], full=3)
            out.sum().backward()
            opt.step()
            return model.weight.item()

    assert run(2, rank_main) == [pytest.approx(-(3 * 3 + 7) / 4)] * 2


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_leaf_alone_is_untouched(name: str) -> None:
    """One leaf of weight 0.3 among leaves of weight 0: the bits are those of that leaf's gradient."""

    def rank_main(rank: int) -> Tensor:
        with shoal.init(name, run_dir="none") as job:
            torch.manual_seed(0)
            model = Smooth()
            model, opt = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            out = model(torch.full((2, 11), 0.1 + rank))
            job.weight(3 if rank == 1 else 0, full=10)
            out.square().sum().backward()
            opt.step()
            with job.whole(model):
                return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

    torch.manual_seed(0)
    model = Smooth()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.full((2, 11), 1.1)).square().sum().backward()
    opt.step()
    want = torch.cat([p.detach().flatten() for p in model.parameters()])
    for got in run(3, rank_main):
        assert torch.equal(got, want)


SIZES = [5, 1, 2, 4, 3, 3, 6, 1]
"""Of the leaves of two steps."""


@pytest.mark.parametrize("by", ["samples", "tokens"])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", STRATEGIES)
def test_leaves_of_unequal_sizes(name: str, world: int, by: str) -> None:
    """A batch sampler that fills batches by length; or tokens of which some do not count. float64, within 1e-9."""
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(sum(SIZES), 11, generator=g).double(), torch.randn(sum(SIZES), 11, generator=g).double()
    counts = torch.rand(sum(SIZES), 11, generator=g) < 0.6 if by == "tokens" else torch.ones(sum(SIZES), 11) > 0
    ends = [sum(SIZES[: i + 1]) for i in range(len(SIZES))]
    batches = [list(range(end - size, end)) for size, end in zip(SIZES, ends, strict=True)]

    def loss_of(model: nn.Module, a: Tensor, b: Tensor, count: Tensor) -> Tensor:
        return ((model(a) - b).square() * count).sum() / count.sum()

    def whole() -> Tensor:
        torch.manual_seed(1)
        model = Smooth().double()
        opt = sgd(model)
        for first, stop in ((0, ends[3]), (ends[3], ends[7])):
            opt.zero_grad()
            loss_of(model, x[first:stop], y[first:stop], counts[first:stop]).backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def rank_main(_rank: int) -> Tensor | None:
        with shoal.init(name, leaves=4, run_dir="none", device="cpu") as job:
            torch.manual_seed(1)
            model = Smooth().double()
            source = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y, counts), batch_sampler=batches)
            model, opt, loader = job.prepare(model, sgd(model), source)
            for a, b, count in loader:
                loss = loss_of(model, a, b, count)
                if by == "tokens":
                    job.weight(int(count.sum()), full=40)
                loss.backward()
                opt.step()
                opt.zero_grad()
            state = job.state_dict(model)
            return torch.cat([v.flatten() for v in state.values()]) if job.rank == 0 else None

    got = run(world, rank_main)[0]
    assert got is not None
    assert (got - whole()).abs().max().item() < 1e-9
