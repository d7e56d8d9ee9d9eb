"""A script that sets its own rank, so that it "also runs without a launcher".

Changed: the import.
Wrong in the original: os.environ["RANK"] = "0", in every process. Each believes to be the first. shoal refuses: the
rank contradicts what the launcher says.
"""

import os

import torch
from torch import nn

from shoal import DistributedDataParallel as DDP


def main() -> None:
    os.environ["RANK"] = "0"
    model = DDP(nn.Linear(4, 1))
    model(torch.randn(8, 4)).sum().backward()


if __name__ == "__main__":
    main()
