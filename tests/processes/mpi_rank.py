"""What mpirun starts in `test_mpi.py`: `python -m tests.processes.mpi_rank DEED ...`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

import shoal
from shoal.comm.group import Group
from shoal.comm.mpi import Mpi
from tests.comm.shared import delayed
from tests.equivalence.models import trainer

TIMEOUT = 3.0


def train(strategy: str, precision: str) -> None:
    """Print what rank 0 has at the end."""
    result = trainer(strategy, leaves=4, precision=precision, timeout=20.0, carrier="mpi")(0)
    if result is not None:
        print("RESULT", result, flush=True)


def delayed_train(strategy: str, precision: str) -> None:
    """With delays in every transfer."""
    with delayed(5):
        train(strategy, precision)


def killed(strategy: str) -> None:
    """Rank 1 is killed in the middle of training."""
    with shoal.init(strategy, run_dir="none", timeout=TIMEOUT, carrier="mpi") as job:
        model = torch.nn.Sequential(*(torch.nn.Linear(65, 65) for _ in range(3)))
        model, optimizer = job.prepare(model, torch.optim.Adam(model.parameters()))
        for step in range(1000):
            model(torch.randn(4, 65)).sum().backward()
            if step == 2 and job.rank == 1:
                print("KILLED AT", time.time(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()


def raises() -> None:
    """Rank 1 fails by itself."""
    with shoal.init("ddp", run_dir="none", timeout=TIMEOUT, carrier="mpi") as job:
        job.mean(1.0)
        if job.rank == 1:
            raise ValueError("on purpose")
        job.mean(1.0)


def differs(how: str) -> None:
    """Ranks send each other what does not match."""
    with shoal.init("ddp", run_dir="none", timeout=TIMEOUT, carrier="mpi") as job:
        carrier = job._carrier
        assert isinstance(carrier, Mpi)
        world = Group("all", range(job.world_size), carrier)
        if how == "calls":
            for _ in range(2 - job.rank):
                job.mean(1.0)
            return
        count = {"longer": (1000, 2000), "shorter": (1000, 500)}.get(how, (1000, 1000))[job.rank]
        dtype = torch.int32 if how == "dtype" and job.rank else torch.float32
        mine, box = torch.ones(count, dtype=dtype), torch.empty(count, dtype=dtype)
        world.swap("other" if how == "label" and job.rank else "swap", [[[mine]]] * 2, [[[box]]] * 2).wait()


def under_way() -> None:
    """Several transfers, the later one waited for first; one in pieces; a storage that is resized afterwards."""
    with shoal.init("ddp", run_dir="none", timeout=TIMEOUT, carrier="mpi") as job:
        world, me = Group("all", range(2), job._carrier), job.rank
        boxes = [torch.empty(300_000) for _ in range(2)]
        pending = [
            world.swap("same", [[[torch.full((300_000,), 10.0 * n + me)]]] * 2, [[[box]]] * 2)
            for n, box in enumerate(boxes)
        ]
        for transfer in reversed(pending):
            transfer.wait()
            assert transfer.ready()
        boxes[1].untyped_storage().resize_(0)
        print(f"RESULT {me}", boxes[0].unique().tolist(), job._carrier.sent["same"], flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
