"""Claims about what is learned, and about time that is counted in rounds: small models, ranks that are threads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from finding import Claim, Finding, Seen
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from shoal import init
from shoal.comm.threads import run

CLASSES, FEATURES = 10, 20


@dataclass(frozen=True, kw_only=True)
class Data:
    """Points around ten centres; `wrong` of the training labels are drawn by lot."""

    train: TensorDataset
    held_out: TensorDataset

    @classmethod
    def drawn(cls, samples: int, wrong: float) -> Data:
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(CLASSES, FEATURES, generator=generator)

        def points(count: int, wrong: float) -> TensorDataset:
            labels = torch.randint(0, CLASSES, (count,), generator=generator)
            x = centres[labels] + 1.2 * torch.randn(count, FEATURES, generator=generator)
            lots = torch.randint(0, CLASSES, (count,), generator=generator)
            drawn = torch.rand(count, generator=generator) < wrong
            return TensorDataset(x, torch.where(drawn, lots, labels))

        return cls(train=points(samples, wrong), held_out=points(2000, 0.0))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Accuracies, the loss on all training samples, and every parameter."""

    train: float
    held_out: float
    loss: float
    parameters: Tensor


def train(
    data: Data,
    strategy: str,
    world: int,
    *,
    leaves: int,
    batch: int,
    epochs: int,
    rate: float = 0.1,
    adam: bool = False,
) -> Trained:
    """An ordinary loop on so many ranks; `batch` is that of a step."""

    def rank_main(_rank: int) -> Trained:
        with init(strategy, leaves=leaves, seed=3, run_dir="none", device="cpu") as job:
            torch.manual_seed(0)
            model: nn.Module = nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, CLASSES))
            weights = model.parameters()
            made = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.0) if adam else torch.optim.SGD(weights, lr=rate)
            model, optimizer = job.prepare(model, made)
            loader = job.loader(data.train, global_batch=batch)
            for _ in range(epochs):
                for inputs, labels in loader:
                    cross_entropy(model(inputs), labels).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            with job.whole(model), torch.no_grad():
                return Trained(
                    train=accuracy(model, data.train), held_out=accuracy(model, data.held_out),
                    loss=cross_entropy(model(data.train.tensors[0]), data.train.tensors[1]).item(),
                    parameters=torch.cat([p.detach().flatten().clone() for p in model.parameters()]),
                )  # fmt: skip

    return run(world, rank_main)[0]


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    inputs, labels = data.tensors
    return (model(inputs).argmax(1) == labels).float().mean().item()


# ---------------------------------------------------------------- the claims


def sharding_lowers_accuracy(quick: bool) -> Finding:
    data = Data.drawn(512, 0.1)
    epochs = 1 if quick else 8
    alone = train(data, "ddp", 1, leaves=4, batch=64, epochs=epochs, adam=True)
    seen = [Seen(case="one process", metric="held-out accuracy", value=alone.held_out, unit="of 1")]
    holds = False
    for strategy in ("ddp", "zero1", "zero2", "zero3"):
        got = train(data, strategy, 4, leaves=4, batch=64, epochs=epochs, adam=True)
        differ = int((got.parameters != alone.parameters).sum())
        holds |= got.held_out < alone.held_out
        seen.append(Seen(case=f"{strategy}, 4 ranks", metric="held-out accuracy", value=got.held_out, unit="of 1"))
        seen.append(Seen(case=f"{strategy}, 4 ranks", metric="parameters differ", value=differ, unit="element"))
    return Finding(
        holds=holds,
        because="where a number is kept does not change it: with the order of sums fixed all parameters are equal, bit "
        "by bit. Without, as elsewhere, they differ by rounding",
        seen=seen,
    )


def prevents_overfitting(quick: bool) -> Finding:
    data, epochs = Data.drawn(256, 0.4), 4 if quick else 60
    seen: list[Seen] = []
    gaps: dict[int, float] = {}
    for world in (1, 4):
        got = train(data, "ddp", world, leaves=4, batch=64, epochs=epochs, adam=True)
        gaps[world] = got.train - got.held_out
        case = f"{world} rank{'s' if world > 1 else ''}, 40 % wrong labels"
        seen.append(Seen(case=case, metric="training accuracy", value=got.train, unit="of 1"))
        seen.append(Seen(case=case, metric="held-out accuracy", value=got.held_out, unit="of 1"))
    return Finding(
        holds=gaps[4] < gaps[1],
        because="it is the same training, spread out: the wrong labels are learned as well, and the gap is the same",
        seen=seen,
    )


def same_rate(quick: bool) -> Finding:
    data, epochs = Data.drawn(256 if quick else 2048, 0.0), 1 if quick else 2
    seen: list[Seen] = []
    losses: dict[str, float] = {}
    for case, world, batch, rate in (
        ("1 rank, batch 16", 1, 16, 0.02),
        ("8 ranks, batch 8 x 16, same rate", 8, 128, 0.02),
        ("8 ranks, batch 8 x 16, 8 x the rate", 8, 128, 0.16),
        ("8 ranks, batch 16 in all, same rate", 8, 16, 0.02),
    ):
        got = train(data, "ddp", world, leaves=8, batch=batch, epochs=epochs, rate=rate)
        losses[case] = got.loss
        seen.append(Seen(case=case, metric="loss after the epochs", value=got.loss, unit="nat"))
    return Finding(
        holds=losses["8 ranks, batch 8 x 16, same rate"] <= 1.02 * losses["1 rank, batch 16"],
        because="eight times the batch is an eighth of the steps. A larger rate makes up for it as long as it is "
        "stable; the same global batch is the same training",
        seen=seen,
    )


# ---------------------------------------------------------------- asynchrony, simulated


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Noisy linear regression; what workers do is simulated, as shoal has no asynchronous training."""

    width: int = 64
    noise: float = 0.3

    def gradient(self, w: Tensor, generator: torch.Generator, batch: int = 16) -> Tensor:
        x = torch.randn(batch, self.width, generator=generator)
        y = x.sum(1) + self.noise * torch.randn(batch, generator=generator)
        return x.T @ (x @ w - y) / batch

    def done(self, w: Tensor) -> bool:
        """Is the expected loss within a hundredth of the first one?"""
        return float((w - 1).square().sum()) < 0.01 * self.width


def synchronous(task: Regression, speeds: Sequence[float], rate: float, patience: float) -> float:
    """Seconds to the target; every round is as long as its slowest worker. Infinite if patience is over."""
    draw, lots = torch.Generator().manual_seed(0), random.Random(0)
    w, now = torch.zeros(task.width), 0.0
    while now < patience:
        now += max(lots.uniform(0.9, 1.1) / speed for speed in speeds)
        w = w - rate * sum(task.gradient(w, draw) for _ in speeds) / len(speeds)
        if task.done(w):
            return now
    return float("inf")


def asynchronous(task: Regression, speeds: Sequence[float], rate: float, patience: float) -> float:
    """The same where every gradient is applied as it comes, to weights that have moved on since they were read."""
    draw, lots = torch.Generator().manual_seed(0), random.Random(0)
    w = torch.zeros(task.width)
    events: list[tuple[float, int]] = []
    read: dict[int, Tensor] = {}

    def begin(worker: int, now: float) -> None:
        read[worker] = w
        heappush(events, (now + lots.uniform(0.9, 1.1) / speeds[worker], worker))

    for worker in range(len(speeds)):
        begin(worker, 0.0)
    while events[0][0] < patience:
        now, worker = heappop(events)
        w = w - rate * task.gradient(read[worker], draw)
        if task.done(w):
            return now
        if not torch.isfinite(w).all():
            return float("inf")
        begin(worker, now)
    return float("inf")


def asynchronous_is_faster(quick: bool) -> Finding:
    task, patience = Regression(), 200.0
    rates = (0.8, 0.4, 0.025) if quick else (1.6, 0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125)
    seen: list[Seen] = []
    faster: list[bool] = []
    for case, speeds in (
        ("8 equal workers", [1.0] * 8), ("one of 8 takes 10 x as long", [0.1] + [1.0] * 7),
        ("32 equal workers", [1.0] * 32),
    ):  # fmt: skip
        best = {way: min(way(task, speeds, rate, patience) for rate in rates) for way in (synchronous, asynchronous)}
        seen += [
            Seen(case=f"{case}, {way.__name__}", metric="time to target", value=t, unit="rounds")
            for way, t in best.items()
        ]
        faster.append(best[asynchronous] < best[synchronous])
    return Finding(
        holds=all(faster),
        because="simulated, each at its best learning rate: nobody waits, but gradients are stale and each is noisier. "
        "It pays with stragglers, not among equals",
        seen=seen,
    )


CLAIMS = (
    Claim(name="sharding-lowers-accuracy", words="sharding lowers accuracy", measure=sharding_lowers_accuracy),
    Claim(name="prevents-overfitting", words="data parallelism prevents overfitting", measure=prevents_overfitting),
    Claim(name="same-rate", words="a bigger world trains the same with the same learning rate", measure=same_rate),
    Claim(
        name="asynchronous-is-faster", words="asynchronous training is always faster to a target",
        measure=asynchronous_is_faster,
    ),
)  # fmt: skip
