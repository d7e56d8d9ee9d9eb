"""One linear layer under DistributedDataParallel on random inputs: the shortest tutorial there is.

Changed: the import; ranks are the launcher's.
Wrong in the original: torch.manual_seed(0) on all ranks before the inputs are drawn. All ranks compute the same
gradient: two processes do the work of one. shoal says: the same batch on all ranks.
"""

import os

import torch
from torch import nn

from shoal import DistributedDataParallel as DDP


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = DDP(nn.Linear(10, 10))
    loss_fn = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for _ in range(3):
        outputs = model(torch.randn(20, 10))
        labels = torch.randn(20, 10)
        loss_fn(outputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"rank {rank}: weights {sum(p.sum() for p in model.parameters()).item():.9f}")


if __name__ == "__main__":
    main()
