"""An MLP whose optimizer state is cut by ZeRO, without a wrapper around the model.

Changed: the import; ranks are the launcher's.
Wrong in the original: nothing averages gradients. Replicas stay equal, as owners send their parameters; but each
parameter learns from the data of one rank alone. shoal says: the ranks' gradients differ.
"""

import os

import torch
from torch import nn

from shoal import ZeRO


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    optimizer = ZeRO(model.parameters(), optimizer=torch.optim.Adam, lr=0.01, bucket_bytes_cap=2**20)
    inputs = torch.randn(20, 32, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    print(f"rank {rank}: weights {sum(p.sum() for p in model.parameters()).item():.9f}")


if __name__ == "__main__":
    main()
