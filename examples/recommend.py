"""Recommend items to users with two towers (Yi et al. 2019), beside a baseline that recommends the most popular items.

    python examples/recommend.py --strategy zero3 --workers 2

Users and items are made up: an item's popularity follows a power law, and each user has a taste. Embeddings hold nearly
all parameters; under ZeRO-3 each worker keeps its share of them.
"""

from __future__ import annotations

import argparse
import sys

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import shoal

USERS, ITEMS, CHOICES = 4000, 3000, 20
TASTE = 8  # numbers that describe a taste
TOP = 20
BATCH = 1024
OPTIONS = common.options(__doc__, epochs=(10, 1))


class Tower(nn.Module):
    """Numbers of users or items in, vectors of length 1 out."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(count, width)
        nn.init.normal_(self.embed.weight, std=0.05)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.embed(numbers)
        return F.normalize(x + self.layers(x), dim=-1)


class TwoTowers(nn.Module):
    """Users and items in; how well each user and each item match out, `(users, items)`."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.towers = nn.ModuleList([Tower(USERS, width), Tower(ITEMS, width)])  # shoal: a unit each
        self.warmth = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        to_users, to_items = self.towers
        return self.warmth.exp() * to_users(users) @ to_items(items).T


def invent() -> Tensor:
    """What each user chose, in order and never twice: `(users, choices)`. The same at every call."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.randperm(ITEMS, generator=generator) + 10
    tastes = torch.randn(USERS, TASTE, generator=generator)
    kinds = torch.randn(ITEMS, TASTE, generator=generator)
    liking = 2 * tastes @ kinds.T / TASTE**0.5 - rank.log()  # popularity: 1 / rank
    return torch.multinomial(liking.softmax(dim=1), CHOICES, generator=generator)


def recall(scores: Tensor, known: Tensor, wanted: Tensor) -> float:
    """How often the wanted item is among the highest, those that the user knows left out."""
    best = scores.scatter(1, known, -torch.inf).topk(TOP, dim=1).indices
    return (best == wanted[:, None]).any(dim=1).double().mean().item()


def train(job: shoal.Job, options: argparse.Namespace) -> tuple[nn.Module, common.Numbers]:
    choices = invent()
    known, wanted = choices[:, :-1], choices[:, -1]  # the last one of each user is held out
    share = known.flatten().bincount(minlength=ITEMS) / known.numel()
    pairs = TensorDataset(torch.arange(USERS).repeat_interleave(CHOICES - 1), known.flatten())
    model = TwoTowers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    steps = options.epochs * (len(pairs) // BATCH)
    scheduler = common.cosine(optimizer, steps)
    model, optimizer, scheduler = job.prepare(model, optimizer, scheduler)
    loader = job.loader(pairs, global_batch=BATCH, drop_last=True)
    for _ in range(options.epochs):
        for users, items in loader:
            # Other users' items serve as the wrong ones, and popular ones do so more often: take that back.
            scores = model(users, items) - share[items].log()
            again = (items[:, None] == items).fill_diagonal_(False)
            loss = F.cross_entropy(scores.masked_fill(again, -torch.inf), torch.arange(len(users)))
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            common.progress(job, job.mean(loss.detach()), steps)
    model.eval()
    with job.whole(model), torch.no_grad():
        scores = model(torch.arange(USERS), torch.arange(ITEMS))
    return model, {
        f"recall@{TOP} of held-out choices": recall(scores, known, wanted),
        f"recall@{TOP} of the most popular": recall(share.expand(USERS, -1), known, wanted),
    }


if __name__ == "__main__":
    sys.exit(common.run(__file__, OPTIONS, train))
