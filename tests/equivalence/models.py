"""Small models with everything that can go wrong in them, and the program that trains them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import shoal
from shoal.comm.threads import run
from shoal.strategy import Strategy


class Everything(nn.Module):
    """Dropout, batch norm, tied and frozen weights, odd sizes, a weight used three times, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(11, 37)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(37, 131), nn.Tanh(), nn.Dropout(0.2), nn.Linear(131, 37)) for _ in range(3)
        )
        self.blocks[1][0].weight.requires_grad_(False)
        self.norm = nn.BatchNorm1d(37)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.randn(9))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.out = nn.Linear(11, 37, bias=False)
        self.out.weight = self.into.weight  # tied

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        x = self.blocks[0](x)  # used again
        return (self.norm(x) * self.scale) @ self.out.weight


class Outcome(NamedTuple):
    """sha256 of parameters and buffers, of optimizer state, and the losses."""

    model: str
    optimizer: str
    losses: tuple[float, ...]


MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 3e-3}], lr=1e-2)


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def state_digest(state: dict[str, object]) -> str:
    flat = {f"{i}.{k}": v for i, s in state["state"].items() for k, v in s.items()}
    return digest({k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in flat.items()})


def outcome(job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> Outcome | None:
    """On rank 0."""
    state, rest = job.state_dict(model), job.state_dict(optimizer)
    return Outcome(digest(state), state_digest(rest), tuple(losses)) if job.rank == 0 else None


def samples(count: int = 56) -> TensorDataset:
    g = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(count, 11, generator=g), torch.randn(count, 11, generator=g))


def trainer(
    strategy: str | Strategy, *, make_optimizer: MakeOptimizer = adamw, clip: float | None = 0.5, epochs: int = 1,
    global_batch: int = 24, make_model: Callable[[], nn.Module] = Everything, units: int | None = None,
    loading: Mapping[str, object] | None = None, **settings: object,
) -> Callable[[int], Outcome | None]:  # fmt: skip
    """The program of one rank: train and return the outcome on rank 0. 56 samples: the last step is short."""

    def rank_main(_rank: int) -> Outcome | None:
        with shoal.init(strategy, run_dir="none", device="cpu", **settings) as job:
            model = make_model()
            model, optimizer = job.prepare(model, make_optimizer(model), units=units)
            loader = job.loader(samples(), global_batch=global_batch, **(loading or {}))
            losses: list[float] = []
            for _ in range(epochs):
                losses += epoch(job, model, optimizer, loader, clip)
            return outcome(job, model, optimizer, losses)

    return rank_main


def epoch(
    job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer, loader: object, clip: float | None
) -> list[float]:
    losses: list[float] = []
    for x, y in loader:
        loss = nn.functional.mse_loss(model(x).float(), y)
        loss.backward()
        if clip is not None:
            job.clip_grad_norm(clip)
        optimizer.step()
        optimizer.zero_grad()
        value = job.mean(loss.detach())
        if value is not None:
            losses.append(value)
    return losses


def on_threads(
    world: int, strategy: str | Strategy, *, order: int | None = None, common: bool = False,
    ranks_per_host: Sequence[int] = (), **kw: object,
) -> Outcome:  # fmt: skip
    result = run(world, trainer(strategy, **kw), seed=order, common=common, ranks_per_host=ranks_per_host)[0]
    assert result is not None
    return result
