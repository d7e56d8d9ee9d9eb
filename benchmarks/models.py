"""The models of the race, the batches that they train on, and their losses.

Each is an ordinary module with its repeated parts in `blocks`, as its author would write it. Sizes are such that a step
takes between a twentieth of a second and a second and a half on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, relu, scaled_dot_product_attention

SEED = 0


class Blocks(Protocol):
    """A module whose repeated parts have a name."""

    blocks: nn.ModuleList


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained. `draw` gives inputs and targets of one rank's batch; `loss` is a mean over it."""

    name: str
    about: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]

    def make(self) -> nn.Module:
        """With the same values for everybody."""
        torch.manual_seed(SEED)
        return self.build()

    def batch(self, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Equal for all contenders, another one for every step and rank."""
        return self.draw(torch.Generator().manual_seed(1000 * step + rank))

    def parameters(self) -> int:
        """How many numbers it trains."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.build().parameters())


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return cast(Blocks, model).blocks


# ---------------------------------------------------------------- a GPT


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a GPT and its batch. The defaults have 33.7 million parameters; `batch` is in sequences of one rank."""

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


def gpt(name: str, about: str, sizes: Sizes) -> Model:
    """Its batches have frequent tokens and rare ones: there is something to learn."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(sizes.batch, sizes.context + 1, generator=generator) ** 3
        tokens = (drawn * sizes.vocabulary).long()
        return tokens[:, :-1], tokens[:, 1:]

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(scores.flatten(0, 1), targets.flatten())

    return Model(name=name, about=about, build=lambda: GPT(sizes), draw=draw, loss=loss)


# ---------------------------------------------------------------- images


class Vgg(nn.Module):
    """Convolutions with few weights, then linear layers with nearly all of them: what is reduced first is the most."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256), hidden: int = 2048, classes: int = 100) -> None:
        super().__init__()
        before = (3, *widths)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
            )
            for a, b in zip(before, widths, strict=False)
        )
        self.first = nn.Linear(widths[-1] * (32 >> len(widths)) ** 2, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(relu(self.second(relu(self.first(x.flatten(1))))))


class Residual(nn.Module):
    """Two convolutions beside the stream; the first may halve the image."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        same = before == width and stride == 1
        self.beside = nn.Identity() if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.first_norm(self.first(x)))
        return relu(self.beside(x) + self.second_norm(self.second(inner)))


class ResNet(nn.Module):
    """He et al. 2015, for images of 32 x 32: many small weights between large activations, and buffers."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256), depth: int = 2, classes: int = 100) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        before = (widths[0], *widths)
        self.blocks = nn.ModuleList(
            Residual(a if i == 0 else b, b, 2 if i == 0 and a != b else 1)
            for a, b in zip(before, widths, strict=False)
            for i in range(depth)
        )
        self.last = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((2, 3)))


def images(count: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Noise with a class in its mean."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        targets = torch.randint(0, 100, (count,), generator=generator)
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        return noise + targets.view(-1, 1, 1, 1) / 50 - 1, targets

    return draw


# ---------------------------------------------------------------- recommendation


class Recommender(nn.Module):
    """Wide tables with dense gradients below a small perceptron: nearly no computing, much to exchange."""

    def __init__(self, tables: int = 4, rows: int = 200_000, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.hidden = nn.Linear(tables * width, 256)
        self.last = nn.Linear(256, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found = [table(ids[:, i]) for i, table in enumerate(self.blocks)]
        return self.last(relu(self.hidden(torch.cat(found, 1))))


def clicks(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = (torch.rand(512, 4, generator=generator) ** 3 * 200_000).long()
    return ids, (ids.sum(1) % 2)


# ---------------------------------------------------------------- very many layers


class Thread(nn.Module):
    """A thousand layers of 16 x 16 in ten blocks: what a step costs besides computing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(*(nn.Linear(16, 16) for _ in range(100))) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def points(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 16, generator=generator)
    return x, x.argmax(1)


# ---------------------------------------------------------------- small messages


class Perceptron(nn.Module):
    """What is sent takes no time: only how often ranks wait for each other does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(784, 64), nn.Linear(64, 10)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](relu(self.blocks[0](x)))


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 784, generator=generator)
    return x, x[:, :10].argmax(1)


SMALL = Sizes(width=256, layers=6, heads=4, vocabulary=2048)
TRIAL = Sizes(width=32, layers=2, heads=2, vocabulary=64, context=16, batch=2)
MODELS = (
    gpt("gpt-33m", "GPT, width 512, 8 blocks, vocabulary 8192, 4 x 128 tokens", Sizes()),
    gpt("gpt-6m", "GPT, width 256, 6 blocks, vocabulary 2048, 4 x 128 tokens", SMALL),
    Model(name="vgg", about="VGG-like, 6 convolutions below 3 heavy linear layers, 16 images of 32 x 32",
          build=Vgg, draw=images(16), loss=cross_entropy),
    Model(name="resnet", about="ResNet of 17 convolutions with batch norm, 16 images of 32 x 32",
          build=ResNet, draw=images(16), loss=cross_entropy),
    Model(name="embedding", about="recommendation, 4 tables of 200,000 x 32 with dense gradients, 512 clicks",
          build=Recommender, draw=clicks, loss=cross_entropy),
    Model(name="layers", about="1,000 linear layers of 16 x 16 in ten blocks, 32 points",
          build=Thread, draw=points, loss=cross_entropy),
    Model(name="perceptron", about="784 x 64 x 10, 32 digits: a fifth of a megabyte of gradients",
          build=Perceptron, draw=digits, loss=cross_entropy),
    gpt("trial", "GPT so small that its numbers mean nothing", TRIAL),
)  # fmt: skip
