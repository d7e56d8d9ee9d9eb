"""Who runs in the race: each makes a model and its optimizer as an ordinary user of its library would.

All use AdamW as `torch.optim` gives it, no option of any library is set but those in a contender's name, and the loop
is the same for all.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from formulas import Function, Grid
from models import Model, blocks_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from shoal import DistributedDataParallel as DropInDDP
from shoal import ZeroRedundancyOptimizer as DropInZero
from shoal import init

RATE = 3e-4
SEED = 0

Settings = Mapping[str, Any]
"""Keyword arguments of somebody else's function."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the loop calls. `step` updates and forgets the gradients; `sent` counts bytes, where a library does."""

    model: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    sent: Callable[[], int] | None = None


@dataclass(frozen=True, kw_only=True)
class Contender:
    """`open` gives what the loop uses; it is entered by every rank in a process of its own.

    `function`: what it cuts, and so its formulas; `per_copy`: ranks that hold one model together, 0 for all.
    `alone`: one rank runs, whatever the network. `fewest`: ranks without which it is another contender's double.
    `package`: beyond torch, imported before anything is measured.
    """

    name: str
    function: Function
    open: Callable[[Model], AbstractContextManager[Trained]]
    per_copy: int = 0
    alone: bool = False
    fewest: int = 1
    package: str = ""

    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install 'shoal[race]'"
        return ""

    def load(self) -> None:
        """Import what it needs: neither time nor memory of a step."""
        if self.package:
            os.environ["DS_ACCELERATOR"] = "cpu"
            importlib.import_module(self.package)

    def grid(self, world: int) -> Grid:
        return Grid.of(self.function, world, self.per_copy)


def _usual(model: Callable[[Tensor], Tensor], optimizer: Optimizer, sent: Callable[[], int] | None = None) -> Trained:
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trained(model=model, backward=lambda loss: loss.backward(), step=step, sent=sent)


def _adam(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=RATE)


# ---------------------------------------------------------------- torch


@contextmanager
def plain(task: Model) -> Generator[Trained]:
    """Nothing but torch's modules and optimizer."""
    model = task.make()
    yield _usual(model, _adam(model))


@contextmanager
def _process_group() -> Generator[None]:
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _torch_ddp(task: Model) -> Generator[Trained]:
    with _process_group():
        model = DistributedDataParallel(task.make())
        yield _usual(model, _adam(model))


@contextmanager
def _torch_zero(task: Model) -> Generator[Trained]:
    with _process_group():
        model = DistributedDataParallel(task.make())
        yield _usual(model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamW, lr=RATE))


def _fsdp2(settings: Settings) -> Callable[[Model], AbstractContextManager[Trained]]:
    @contextmanager
    def opened(task: Model) -> Generator[Trained]:
        with _process_group():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            model = task.make()
            for block in blocks_of(model):
                fully_shard(block, mesh=mesh, **settings)
            fully_shard(model, mesh=mesh, **settings)
            yield _usual(model, _adam(model))

    return opened


# ---------------------------------------------------------------- DeepSpeed


def _deepspeed(stage: int) -> Callable[[Model], AbstractContextManager[Trained]]:
    """With torch's AdamW, which it calls a client optimizer; its own would be compiled on the spot."""

    @contextmanager
    def opened(task: Model) -> Generator[Trained]:
        import deepspeed

        # The shared-memory all-reduce is for inference alone, and it too would be compiled on the spot.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        model = task.make()
        config = {
            "train_micro_batch_size_per_gpu": 1,  # a batch is what the loop gives; this only labels its own prints
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        engine = deepspeed.initialize(model=model, optimizer=_adam(model), config=config)[0]
        yield Trained(model=engine, backward=lambda loss: engine.backward(loss), step=engine.step)

    return opened


# ---------------------------------------------------------------- shoal


def _shoal(
    strategy: str, settings: Settings, units: int | None = None
) -> Callable[[Model], AbstractContextManager[Trained]]:
    @contextmanager
    def opened(task: Model) -> Generator[Trained]:
        with init(strategy, device="cpu", seed=SEED, run_dir="none", **settings) as job:
            model = task.make()
            model, optimizer = job.prepare(model, _adam(model), units=units)
            yield _usual(model, optimizer, lambda: sum(job.traffic.values()))

    return opened


@contextmanager
def _drop_in_ddp(task: Model) -> Generator[Trained]:
    """The program of torch DDP with shoal's name."""
    model = DropInDDP(task.make())
    yield _usual(model, _adam(model))


@contextmanager
def _drop_in_zero(task: Model) -> Generator[Trained]:
    model = DropInDDP(task.make())
    yield _usual(model, DropInZero(model.parameters(), optimizer_class=AdamW, lr=RATE))


def shoal(strategy: str, words: str = "", *, units: int | None = None, **settings: object) -> Contender:
    """A contender of shoal's own. `words` stand before its name; `settings` go to `init`, `units` to `prepare`."""
    name = " ".join(filter(None, ("shoal", words, strategy)))
    if strategy == "hybrid":
        opened = _shoal(strategy, settings | {"ranks_per_copy": 2}, units)
        return Contender(name=name, function=Function.ZERO3, open=opened, per_copy=2, fewest=4)
    return Contender(name=name, function=Function(strategy), open=_shoal(strategy, settings, units))


ONE = "one process"
STAGES = (Function.DDP, Function.ZERO1, Function.ZERO2, Function.ZERO3)
CONTENDERS = (
    Contender(name=ONE, function=Function.NOTHING_SENT, open=plain, alone=True),
    Contender(name="all, not talking", function=Function.NOTHING_SENT, open=plain),
    Contender(name="torch DDP", function=Function.DDP, open=_torch_ddp),
    Contender(name="torch ZeroRedundancyOptimizer", function=Function.ZERO1, open=_torch_zero),
    Contender(name="torch FSDP2", function=Function.ZERO3, open=_fsdp2({})),
    Contender(
        name="torch FSDP2, no resharding", function=Function.ZERO2, open=_fsdp2({"reshard_after_forward": False})
    ),
    *(
        Contender(name=f"DeepSpeed {stage}", function=function, open=_deepspeed(stage), package="deepspeed")
        for stage, function in enumerate(STAGES)
    ),
    shoal("ddp"),
    shoal("zero1"),
    shoal("zero2"),
    shoal("zero3"),
    shoal("hybrid"),
    Contender(name="shoal drop-in DDP", function=Function.DDP, open=_drop_in_ddp),
    Contender(name="shoal drop-in ZeroRedundancy", function=Function.ZERO1, open=_drop_in_zero),
    # Exact numerics against gloo's own sums, which only gloo has: shared memory would make both of them exact.
    shoal("ddp", "pending", pending=True),
    shoal("zero1", "pending", pending=True),
    shoal("zero3", "pending", pending=True),
    shoal("ddp", "gloo", carrier="gloo"),
    shoal("ddp", "fast", carrier="gloo", numerics="fast"),
    shoal("zero3", "gloo", carrier="gloo"),
    shoal("zero3", "fast", carrier="gloo", numerics="fast"),
)
