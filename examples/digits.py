"""Read handwritten digits with a small residual network; the data are scikit-learn's.

    python examples/digits.py --strategy zero3 --workers 2

BatchNorm's running statistics are averaged over the leaves of a step: they too are the same for any number of workers.
"""

from __future__ import annotations

import argparse
import sys

import common
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import shoal

BATCH = 64
OPTIONS = common.options(__doc__, epochs=(20, 1))


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015, figure 2)."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip
        same = inner == outer and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """`(batch, 1, 8, 8)` images in, `(batch, 10)` logits out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(  # shoal: a unit each
            [Block(width, width), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)]
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


def read() -> tuple[Tensor, Tensor]:
    """1797 images of 8 x 8 pixels from 0 to 1, in a fixed random order, and their digits."""
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(digits)[order]


def train(job: shoal.Job, options: argparse.Namespace) -> tuple[nn.Module, common.Numbers]:
    images, digits = read()
    learned = len(images) * 3 // 4
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = options.epochs * (learned // BATCH)
    scheduler = common.cosine(optimizer, steps)
    model, optimizer, scheduler = job.prepare(model, optimizer, scheduler)
    loader = job.loader(TensorDataset(images[:learned], digits[:learned]), global_batch=BATCH, drop_last=True)
    for _ in range(options.epochs):
        for some, theirs in loader:
            loss = cross_entropy(model(some), theirs)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            common.progress(job, job.mean(loss.detach()), steps)
    held_out = DataLoader(TensorDataset(images[learned:], digits[learned:]), batch_size=BATCH)
    found = job.evaluate(model, held_out, ["accuracy"])
    return model, {"accuracy on held-out images": found["accuracy"]}


if __name__ == "__main__":
    sys.exit(common.run(__file__, OPTIONS, train))
