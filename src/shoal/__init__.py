"""shoal: train one model with many workers, with the same numbers every time.

Names are imported on first use, so that the command line answers without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.dropin.ddp import DistributedDataParallel
    from shoal.dropin.zero import ZeRO, ZeroRedundancyOptimizer
    from shoal.errors import ShoalError
    from shoal.job import Job, init
    from shoal.random import seed
    from shoal.spawn import spawn
    from shoal.strategy import Cut, Shard, Strategy
    from shoal.verify import Report, Trial, verify

__version__ = "0.1.0"
__all__ = [
    "Cut", "DistributedDataParallel", "Job", "Report", "Shard", "ShoalError", "Strategy", "Trial", "ZeRO",
    "ZeroRedundancyOptimizer", "init", "seed", "spawn", "verify",
]  # fmt: skip

_HOMES = {
    "Cut": "strategy", "Job": "job", "Report": "verify", "Shard": "strategy", "ShoalError": "errors",
    "Strategy": "strategy", "init": "job", "Trial": "verify", "seed": "random", "verify": "verify",
    "DistributedDataParallel": "dropin.ddp", "ZeRO": "dropin.zero", "ZeroRedundancyOptimizer": "dropin.zero",
    "spawn": "spawn",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    module = import_module(f"shoal.{_HOMES[name]}")
    for known, home in _HOMES.items():  # all of it: `shoal.verify` is the function, and importing made it the module
        if home == _HOMES[name]:
            globals()[known] = getattr(module, known)
    return globals()[name]
