"""Tell malignant from benign tumours by 30 measurements of their cells; the data are scikit-learn's.

    python examples/breast_cancer.py --strategy zero3 --workers 2

A probability is worth something if it is calibrated: of the cases that get 80 %, 80 % should be malignant. A net's
logits are divided by a temperature that is fitted on other cases (Guo et al. 2017, section 4.2).

569 cases are too few to hold many out, so five nets are trained side by side, as one model. Each case is held out from
one net, serves another one's temperature, and teaches the other three.
"""

from __future__ import annotations

import argparse
import sys

import common
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import TensorDataset

import shoal

FOLDS = 5
BATCH = 32
BINS = 10
OPTIONS = common.options(__doc__, epochs=(60, 2))


class Layer(nn.Module):
    """A linear layer for each net: `(nets, batch, inner)` in, `(nets, batch, outer)` out."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FOLDS, inner, outer) * (2 / inner) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(FOLDS, 1, outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Nets(nn.Module):
    """`(batch, 30)` measurements in, `(nets, batch)` logits of malignancy out.

    Args:
        mean, deviation: `(nets, 1, 30)`, of the cases that teach each net.
        width: of the hidden layers.
    """

    def __init__(self, mean: Tensor, deviation: Tensor, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.layers = nn.Sequential(  # shoal: a unit for each large one
            Layer(30, width), nn.ReLU(), Layer(width, width), nn.ReLU(), Layer(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - self.mean) / self.deviation)[..., 0]


def read() -> tuple[Tensor, Tensor, Tensor]:
    """569 cases in a fixed random order, whether each is malignant (1 or 0), and its fold."""
    table, benign = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    cases, malignant = torch.tensor(table, dtype=torch.float32)[order], 1 - torch.tensor(benign).float()[order]
    return cases, malignant, torch.arange(len(cases)) % FOLDS


def teaches(fold: Tensor) -> Tensor:
    """Which cases teach which net: `(nets, cases)`."""
    net = torch.arange(FOLDS)[:, None]
    return (fold != net) & (fold != (net + 1) % FOLDS)


def auroc(logits: Tensor, malignant: Tensor) -> float:
    """How often a malignant case gets more than a benign one; ties count half."""
    apart = logits[malignant == 1][:, None] - logits[malignant == 0][None]
    return ((apart > 0).double() + (apart == 0).double() / 2).mean().item()


def calibration_error(logits: Tensor, malignant: Tensor) -> float:
    """The expected one: how far probabilities are from the share of the malignant, over bins of equal width."""
    probability = logits.double().sigmoid()
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    apart = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, probability - malignant)
    return apart.abs().sum().item() / len(logits)


def temperature(logits: Tensor, malignant: Tensor) -> Tensor:
    """The best of 400 temperatures from 0.1 to 100."""
    tried = torch.logspace(-1, 2, 400)
    losses = [binary_cross_entropy_with_logits(logits / t, malignant) for t in tried]
    return tried[torch.stack(losses).argmin()]


def judge(logits: Tensor, malignant: Tensor, fold: Tensor) -> common.Numbers:
    """Every case by the net that it was held out from."""
    held_out, scaled = torch.empty_like(malignant), torch.empty_like(malignant)
    for net in range(FOLDS):
        fitted, mine = fold == (net + 1) % FOLDS, fold == net
        held_out[mine] = logits[net, mine]
        scaled[mine] = logits[net, mine] / temperature(logits[net, fitted], malignant[fitted])
    return {
        "AUROC on held-out cases": auroc(held_out, malignant),
        "calibration error": calibration_error(held_out, malignant),
        "calibration error with temperatures": calibration_error(scaled, malignant),
    }


def train(job: shoal.Job, options: argparse.Namespace) -> tuple[nn.Module, common.Numbers]:
    cases, malignant, fold = read()
    taught = teaches(fold)
    groups = [cases[rows] for rows in taught]
    model = Nets(torch.stack([g.mean(0) for g in groups])[:, None], torch.stack([g.std(0) for g in groups])[:, None])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = options.epochs * (len(cases) // BATCH)
    scheduler = common.cosine(optimizer, steps)
    model, optimizer, scheduler = job.prepare(model, optimizer, scheduler)
    loader = job.loader(TensorDataset(cases, malignant, taught.T), global_batch=BATCH, drop_last=True)
    for _ in range(options.epochs):
        for some, theirs, nets in loader:
            losses = binary_cross_entropy_with_logits(model(some), theirs.expand(FOLDS, -1), reduction="none")
            loss = (losses * nets.T).sum() / nets.sum()  # each case teaches equally many nets
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            common.progress(job, job.mean(loss.detach()), steps)
    model.eval()
    with job.whole(model), torch.no_grad():
        logits = model(cases)
    return model, judge(logits, malignant, fold)


if __name__ == "__main__":
    sys.exit(common.run(__file__, OPTIONS, train))
