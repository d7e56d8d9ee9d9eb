"""A convolutional net with batch norm on images, under DistributedDataParallel.

Changed: the import; ranks are the launcher's.
Wrong in the original: the learning rate is "scaled" by the rank instead of the world size, so that every rank updates its
replica in its own way, and gradients of different weights are averaged from the second step on. shoal says: replicas
drifted apart.
"""

import os

import torch
from torch import nn

from shoal import DistributedDataParallel as DDP


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = DDP(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
        )
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * (rank + 1))
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(rank))
    labels = torch.arange(32) % 10
    for batch in range(0, 32, 8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch : batch + 8]), labels[batch : batch + 8])
        loss.backward()
        optimizer.step()
    print(f"rank {rank}: weights {sum(p.sum() for p in model.parameters()).item():.9f}")


if __name__ == "__main__":
    main()
