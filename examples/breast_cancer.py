"""Tell malignant from benign tumours by 30 measurements of their cells; the data are scikit-learn's.

    python examples/breast_cancer.py --strategy zero3 --workers 2

A probability is worth something if it is calibrated: of the cases that get 80 %, 80 % should be malignant. The net's logits
are divided by a temperature that is fitted on data of its own (Guo et al. 2017, section 4.2).
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

BATCH = 32
BINS = 10
LEARNED, FITTED = 256, 120  # cases of 569: to learn from, to fit the temperature on; the others are held out
OPTIONS = common.options(__doc__, epochs=(60, 2))


class Net(nn.Module):
    """`(batch, 30)` measurements in, `(batch,)` logits of malignancy out."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # shoal: a unit for each large one
            nn.Linear(30, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


def read() -> tuple[Tensor, Tensor]:
    """569 cases in a fixed random order, scaled by those to learn from; 1 is malignant."""
    table, benign = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    cases = torch.tensor(table, dtype=torch.float32)[order]
    mean, deviation = cases[:LEARNED].mean(0), cases[:LEARNED].std(0)
    return (cases - mean) / deviation, 1 - torch.tensor(benign, dtype=torch.float32)[order]


def auroc(logits: Tensor, malignant: Tensor) -> float:
    """How often a malignant case gets more than a benign one; ties count half."""
    apart = logits[malignant == 1][:, None] - logits[malignant == 0][None]
    return ((apart > 0).double() + (apart == 0).double() / 2).mean().item()


def calibration_error(logits: Tensor, malignant: Tensor) -> float:
    """Expected calibration error: how far the probability is from the share of the malignant, over bins of equal width."""
    probability = logits.double().sigmoid()
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    apart = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, probability - malignant)
    return apart.abs().sum().item() / len(logits)


def temperature(logits: Tensor, malignant: Tensor) -> float:
    """The best of 400 temperatures from 0.1 to 100."""
    tried = torch.logspace(-1, 2, 400)
    losses = [binary_cross_entropy_with_logits(logits / t, malignant) for t in tried]
    return tried[int(torch.stack(losses).argmin())].item()


def train(job: shoal.Job, options: argparse.Namespace) -> tuple[nn.Module, common.Numbers]:
    cases, malignant = read()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = options.epochs * (LEARNED // BATCH)
    scheduler = common.cosine(optimizer, steps)
    model, optimizer, scheduler = job.prepare(model, optimizer, scheduler)
    loader = job.loader(TensorDataset(cases[:LEARNED], malignant[:LEARNED]), global_batch=BATCH)
    for _ in range(options.epochs):
        for some, theirs in loader:
            loss = binary_cross_entropy_with_logits(model(some), theirs)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            common.progress(job, job.mean(loss.detach()), steps)
    model.eval()
    with job.whole(model), torch.no_grad():
        logits = model(cases)
    fitted, held_out = slice(LEARNED, LEARNED + FITTED), slice(LEARNED + FITTED, None)
    t = temperature(logits[fitted], malignant[fitted])
    return model, {
        "AUROC on held-out cases": auroc(logits[held_out], malignant[held_out]),
        "calibration error": calibration_error(logits[held_out], malignant[held_out]),
        "temperature": t,
        "calibration error, scaled": calibration_error(logits[held_out] / t, malignant[held_out]),
    }


if __name__ == "__main__":
    sys.exit(common.run(__file__, OPTIONS, train))
