"""Trains a little with DeepSpeed on two processors' worth of ranks, and saves: `python zero.py FOLDER STAGE bf16|fp32`."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn


class Net(nn.Module):
    """Tied and frozen weights, a buffer, odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 37)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(37, 70), nn.Linear(70, 37)) for _ in range(2))
        self.blocks[0][0].weight.requires_grad_(False)
        self.norm = nn.LayerNorm(37)
        self.out = nn.Linear(37, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(self.norm(h)) * self.scale[0]


def train(rank: int, folder: str, stage: int, precision: str, address: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled on the spot
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=address, rank=rank, world_size=2)
    torch.manual_seed(3)
    net = Net()
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1]}, {"params": [p for p in trained if p.dim() == 1]}]
    config = {
        "train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000},
    }  # fmt: skip
    engine = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)[0]
    for step in range(2):
        x = torch.randint(11, (4,), generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(nn.functional.cross_entropy(engine(x).float(), x))
        engine.step()
    engine.save_checkpoint(folder)


if __name__ == "__main__":
    where, stage, precision = sys.argv[1:]
    torch.multiprocessing.spawn(train, (where, int(stage), precision, f"file://{where}.store"), 2)
