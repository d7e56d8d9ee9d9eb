"""Tell eight kinds of made-up sounds apart, in noise, with a small Conformer (Gulati et al. 2020).

python examples/sounds.py --strategy zero3 --workers 2
"""

from __future__ import annotations

import argparse
import math
import sys

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import shoal

RATE, LENGTH = 8000, 4096  # samples a second, samples of a sound
WINDOW, HOP, BANDS = 512, 128, 64
KINDS = ("tone", "rising", "falling", "major chord", "minor chord", "trill", "two tones", "bursts")
SOUNDS, HELD_OUT = 6400, 800
BATCH = 64
OPTIONS = common.options(__doc__, epochs=(5, 1))


class Block(nn.Module):
    """Attention for what is far apart and a convolution for what is near, between two halves of a network."""

    def __init__(self, width: int, heads: int, kernel: int = 9) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.last = (feed_forward(width) for _ in range(2))
        self.before_attention, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GLU())
        self.near = nn.Sequential(
            nn.Conv1d(width, width, kernel, padding="same", groups=width), nn.BatchNorm1d(width), nn.SiLU(),
            nn.Conv1d(width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x) / 2
        x = x + self._attend(self.before_attention(x))
        x = x + self.near(self.widen(x).transpose(1, 2)).transpose(1, 2)
        return self.norm(x + self.last(x) / 2)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


class Conformer(nn.Module):
    """Spectra in, `(batch, frames, bands)`; `(batch, 8)` logits out."""

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv1d(BANDS, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))  # shoal: a unit each
        self.head = nn.Linear(width, len(KINDS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def invent(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Spectra of sounds in noise, `(count, frames, bands)`, and their kinds."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(count) % len(KINDS)
    pitch = 200 * 4 ** torch.rand(count, 1, generator=generator)  # Hz
    loud = 2 * 10 ** (-0.7 * torch.rand(count, 1, generator=generator))  # beside noise of 1
    time = torch.arange(LENGTH) / RATE
    sounds = torch.stack([sound(KINDS[int(k)], f, time) for k, f in zip(kinds, pitch, strict=True)])
    return spectra(loud * sounds + torch.randn(count, LENGTH, generator=generator)), kinds


def sound(kind: str, pitch: Tensor, time: Tensor) -> Tensor:
    """One sound of a pitch in Hz, heard at times in seconds."""
    end = time[-1]
    third = 2 ** ((4 if kind == "major chord" else 3) / 12)
    if kind == "bursts":
        return tone(pitch.expand_as(time)) * (torch.sin(2 * math.pi * 12 * time) > 0)
    if kind.endswith("chord"):
        return sum((tone(pitch.expand_as(time) * step) for step in (1, third, 2 ** (7 / 12))), torch.zeros(())) / 2
    course = {
        "tone": torch.ones_like(time),
        "rising": 2 ** (time / end - 0.5),
        "falling": 2 ** (0.5 - time / end),
        "trill": 2 ** (torch.sin(2 * math.pi * 12 * time).sign() / 12),
        "two tones": torch.where(time < end / 2, 2 ** (-1 / 4), 2 ** (1 / 4)),
    }[kind]
    return tone(pitch * course)


def tone(pitch: Tensor) -> Tensor:
    """A wave with three overtones whose pitch in Hz may change from sample to sample."""
    phase = 2 * math.pi * pitch.cumsum(0) / RATE
    return sum((torch.sin(n * phase) / n for n in range(1, 5)), torch.zeros(()))


def spectra(waves: Tensor) -> Tensor:
    """Logarithms of power in bands of equal width on a logarithmic scale, from 100 Hz up."""
    power = torch.stft(waves, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs() ** 2
    edges = torch.logspace(math.log10(100), math.log10(RATE / 2), BANDS + 2)
    at = torch.linspace(0, RATE / 2, power.shape[1])[:, None]
    below = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    above = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    bands = power.transpose(1, 2) @ torch.minimum(below, above).clamp(min=0)
    return (bands + 1.0).log() - 4.0


def train(job: shoal.Job, options: argparse.Namespace) -> tuple[nn.Module, common.Numbers]:
    heard, kinds = invent(SOUNDS, seed=1)
    others, theirs = invent(HELD_OUT, seed=2)
    model = Conformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = options.epochs * (SOUNDS // BATCH)
    scheduler = common.cosine(optimizer, steps)
    model, optimizer, scheduler = job.prepare(model, optimizer, scheduler)
    loader = job.loader(TensorDataset(heard, kinds), global_batch=BATCH, drop_last=True)
    for _ in range(options.epochs):
        for some, wanted in loader:
            loss = F.cross_entropy(model(some), wanted)
            loss.backward()
            job.clip_grad_norm(1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            common.progress(job, job.mean(loss.detach()), steps)
    model.eval()
    with job.whole(model), torch.no_grad():
        right = model(others).argmax(1) == theirs
    return model, {"accuracy on held-out sounds": right.double().mean().item()}


if __name__ == "__main__":
    sys.exit(common.run(__file__, OPTIONS, train))
