"""ResNet-50 (He et al. 2015, table 1) as torchvision has it: 25,557,032 parameters with 1,000 classes."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import relu

EXPANSION = 4
"""A bottleneck's output is so many times as wide as its middle."""


class Bottleneck(nn.Module):
    """Narrow, look around, widen, beside the stream; the middle convolution has the stride."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = EXPANSION * width
        self.narrow, self.narrow_norm = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.around, self.around_norm = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.widen, self.widen_norm = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        self.beside: nn.Module = nn.Identity()
        if before != after or stride != 1:
            self.beside = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.narrow_norm(self.narrow(x)))
        inner = relu(self.around_norm(self.around(inner)))
        return relu(self.beside(x) + self.widen_norm(self.widen(inner)))


class ResNet50(nn.Module):
    """From images (batch, 3, height, width) to scores (batch, classes). Depths and widths are the stages'."""

    def __init__(
        self, depths: tuple[int, ...] = (3, 4, 6, 3), widths: tuple[int, ...] = (64, 128, 256, 512), classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.ModuleList()
        ends = (widths[0], *(EXPANSION * width for width in widths))
        for stage, (before, _) in enumerate(pairwise(ends)):
            for i in range(depths[stage]):
                first = i == 0
                stride = 2 if first and stage else 1
                self.blocks.append(Bottleneck(before if first else ends[stage + 1], widths[stage], stride))
        self.last = nn.Linear(ends[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(relu(self.stem_norm(self.stem(x))))
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((2, 3)))
