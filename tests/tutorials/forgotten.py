""" "Data parallel from scratch": every rank takes its share of the data, and trains.

Changed: ranks are the job's.
Wrong in the original: nobody sends anything. At the end there are as many models as ranks, each trained on its share.
shoal says: replicas drifted apart.
"""

import torch
from torch import nn

import shoal


def main() -> None:
    job = shoal.init(run_dir="none")
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(64, 4)
    share = x[job.rank :: job.world_size]
    for step in range(4):
        batch = share[8 * step : 8 * step + 8]
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {job.rank}: weights {sum(p.sum() for p in model.parameters()).item():.9f}")
    job.close()


if __name__ == "__main__":
    main()
