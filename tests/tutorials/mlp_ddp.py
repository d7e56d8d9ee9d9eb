"""An MLP under DistributedDataParallel with a DistributedSampler, as most introductions have it.

Changed: the import of DistributedDataParallel; ranks are the launcher's instead of mp.spawn's argument.
Wrong in the original: sampler.set_epoch is never called, so that every epoch has the same order. It trains all the same;
shoal has nothing to say, as ranks do see different batches.
"""

import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from shoal import DistributedDataParallel as DDP


def main() -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    dataset = TensorDataset(x, x.sum(1, keepdim=True))
    sampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _epoch in range(4):
        total = 0.0
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item()
    print(f"rank {rank}: loss {total:.3f}, weights {sum(p.sum() for p in model.parameters()).item():.9f}")


if __name__ == "__main__":
    main()
