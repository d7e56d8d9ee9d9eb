"""A small GPT over bytes, and the text it learns: the source of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

BYTES = 256
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT = 20  # every so many files is held out


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model. `context`: how many bytes it sees at once."""

    width: int
    depth: int
    heads: int
    context: int


class Block(nn.Module):
    """Attention over earlier bytes, then a small network for each byte alone."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = sizes.heads, dropout
        self.before_attention, self.before_mlp = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        self.up = nn.Linear(sizes.width, 4 * sizes.width, bias=False)
        self.down = nn.Linear(4 * sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + F.dropout(self._attend(self.before_attention(x), rotation), self.dropout, self.training)
        hidden = F.gelu(self.up(self.before_mlp(x)))
        return x + F.dropout(self.down(hidden), self.dropout, self.training)

    def _attend(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rotation), rotate(k, rotation)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(seen.transpose(1, 2).reshape(batch, length, width))


class GPT(nn.Module):
    """Predicts the next byte: `(batch, length)` bytes in, `(batch, length, 256)` logits out."""

    def __init__(self, sizes: Sizes, dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(BYTES, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, dropout) for _ in range(sizes.depth))  # shoal: a unit each
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, BYTES, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("rotation", angles(sizes.context, sizes.width // sizes.heads), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * sizes.depth) ** 0.5 if deep else 0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        rotation = self.rotation[: text.shape[1]]
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))


def angles(context: int, width: int) -> Tensor:
    """Cosines and sines of rotary positions (Su et al. 2021, section 3.4): (context, width)."""
    turns = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([turns.cos(), turns.sin()], dim=1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    cosines, sines = rotation.to(x.dtype).chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosines - b * sines, a * sines + b * cosines], dim=-1)


@torch.no_grad()
def generate(model: GPT, prompt: bytes, length: int, *, temperature: float, seed: int) -> bytes:
    """Go on with a prompt, byte by byte."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([list(prompt)])
    for _ in range(length):
        logits = model(text[:, -model.sizes.context :])[0, -1] / temperature
        following = torch.multinomial(logits.float().softmax(0), 1, generator=generator)
        text = torch.cat([text, following[None]], dim=1)
    return bytes(text[0].tolist())


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """A text cut into windows: each gives `context` bytes and the bytes that follow them."""

    def __init__(self, text: bytes, context: int) -> None:
        self.text, self.context = torch.frombuffer(bytearray(text), dtype=torch.uint8), context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[index * self.context : (index + 1) * self.context + 1].long()
        return window[:-1], window[1:]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is learned from, and what is held out: whole files, chosen by their names alone."""

    train: bytes
    held_out: bytes
    files: int


def read_corpus(limit: int) -> Corpus:
    """The source of the standard library of this Python.

    Args:
        limit: stop after so many bytes to learn from.

    Raises:
        FileNotFoundError: this Python has its library without source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out, files = bytearray(), bytearray(), 0
    for place, path in sorted((hashed(p.relative_to(root)), p) for p in sources(root)):
        if len(train) >= limit:
            break
        text = path.read_bytes()
        if b"\0" not in text:
            (held_out if place[0] % HELD_OUT == 0 else train).extend(text)
            files += 1
    if not train or not held_out:
        raise FileNotFoundError(f"there is too little source of Python's standard library below {root}")
    return Corpus(train=bytes(train), held_out=bytes(held_out), files=files)


def hashed(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode()).digest()


def sources(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))
