"""Who runs in the race: each makes a model and its optimizer as an ordinary user of its library would.

All use AdamW as `torch.optim` gives it, no option of any library is set, and the loop is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO

import torch
import torch.distributed as dist
from model import GPT, Sizes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from shoal import init

RATE = 3e-4
SEED = 0

Trained = tuple[nn.Module, Optimizer]


@dataclass(frozen=True)
class Contender:
    """`open` gives the model and the optimizer that the loop uses; `ranks` processes run it."""

    name: str
    open: Callable[[Sizes], AbstractContextManager[Trained]]
    ranks: int = 2


def _gpt(sizes: Sizes) -> GPT:
    torch.manual_seed(SEED)
    return GPT(sizes)


@contextmanager
def _plain(sizes: Sizes) -> Generator[Trained]:
    model = _gpt(sizes)
    yield model, AdamW(model.parameters(), lr=RATE)


@contextmanager
def _process_group() -> Generator[None]:
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _torch_ddp(sizes: Sizes) -> Generator[Trained]:
    with _process_group():
        model = DistributedDataParallel(_gpt(sizes))
        yield model, AdamW(model.parameters(), lr=RATE)


@contextmanager
def _torch_zero(sizes: Sizes) -> Generator[Trained]:
    with _process_group():
        model = DistributedDataParallel(_gpt(sizes))
        yield model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamW, lr=RATE)


@contextmanager
def _fsdp2(sizes: Sizes) -> Generator[Trained]:
    with _process_group():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = _gpt(sizes)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        yield model, AdamW(model.parameters(), lr=RATE)


def _shoal(strategy: str) -> Callable[[Sizes], AbstractContextManager[Trained]]:
    @contextmanager
    def open_job(sizes: Sizes) -> Generator[Trained]:
        with init(strategy, seed=SEED, run_dir="none") as job:
            model = _gpt(sizes)
            with redirect_stderr(StringIO()):  # the plan, once a visit
                trained = job.prepare(model, AdamW(model.parameters(), lr=RATE))
            yield trained

    return open_job


ONE = "one process"
CONTENDERS = (
    Contender(ONE, _plain, ranks=1),
    Contender("two that do not talk", _plain),
    Contender("torch DDP", _torch_ddp),
    Contender("torch ZeroRedundancyOptimizer", _torch_zero),
    Contender("torch FSDP2", _fsdp2),
    *(Contender(f"shoal {name}", _shoal(name)) for name in ("ddp", "zero1", "zero2", "zero3")),
)
