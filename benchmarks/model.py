"""The model that the benchmarks train: a GPT without dropout, and batches for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of model and batch. The defaults have 33.7 million parameters; `batch` is in sequences of one rank."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    vocabulary: int = 8192
    context: int = 128
    batch: int = 4


class Block(nn.Module):
    """Attention and a perceptron, each beside the stream."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.attention_norm = nn.LayerNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        self.mlp_norm = nn.LayerNorm(sizes.width)
        self.up = nn.Linear(sizes.width, 4 * sizes.width)
        self.down = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """From tokens (batch, length) to scores (batch, length, vocabulary). Input and output weights are not tied."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batch_of(sizes: Sizes, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and those that follow them, equal for all contenders. Some are frequent: there is something to learn."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    drawn = torch.rand(sizes.batch, sizes.context + 1, generator=generator) ** 3
    tokens = (drawn * sizes.vocabulary).long()
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """In nats per token."""
    return cross_entropy(scores.flatten(0, 1), targets.flatten())
