"""SGD under DistributedDataParallel with an ordinary DataLoader.

Changed: the import; ranks are the launcher's.
Wrong in the original: no DistributedSampler. Every rank reads the whole data set in the same order: an epoch takes as
long as on one worker, and the batch is not larger. shoal says: the same batch on all ranks.
"""

import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shoal import DistributedDataParallel as DDP


def main() -> None:
    rank = int(os.environ["RANK"])
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    model = DDP(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _epoch in range(2):
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"rank {rank}: weights {sum(p.sum() for p in model.parameters()).item():.9f}")


if __name__ == "__main__":
    main()
