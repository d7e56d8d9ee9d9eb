"""What ranks with a device do."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn

import shoal
from shoal.comm.group import Group
from shoal.comm.nccl import Nccl
from shoal.comm.routed import Routed
from tests.equivalence.models import Everything, Outcome, adamw, outcome, samples

ENV = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # or matrix products are refused as not deterministic
TIMEOUT = 5.0


def train(strategy: str, precision: str, carrier: str) -> tuple[Outcome | None, list[str]]:
    """The outcome on rank 0, and what carried it."""
    torch.use_deterministic_algorithms(True)
    with shoal.init(
        strategy, leaves=4, precision=precision, carrier=carrier, device="cuda", run_dir="none", timeout=30.0
    ) as job:
        model = Everything().to(job.device)
        model, optimizer = job.prepare(model, adamw(model))
        losses: list[float] = []
        for x, y in job.loader(samples(), global_batch=24):
            loss = nn.functional.mse_loss(model(x.to(job.device)).float(), y.to(job.device))
            loss.backward()
            job.clip_grad_norm(0.5)
            optimizer.step()
            optimizer.zero_grad()
            value = job.mean(loss.detach())
            if value is not None:
                losses.append(value)
        carried = [type(job._carrier).__name__]
        if isinstance(job._carrier, Routed):
            carried += [type(job._carrier.host).__name__, type(job._carrier.device).__name__]
        return outcome(job, model, optimizer, losses), carried


def killed() -> str:
    """Rank 1 is killed in the middle of training, while rank 0 may wait for its device."""
    with shoal.init("zero3", device="cuda", run_dir="none", timeout=TIMEOUT) as job:
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).to(job.device)
        model, optimizer = job.prepare(model, torch.optim.Adam(model.parameters()))
        for step in range(1000):
            loss = model(torch.ones(4, 512, device=job.device)).sum()
            loss.backward()
            loss.item()
            if step == 3 and job.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()
    return "finished"


def differs() -> None:
    """Rank 1 posts something else: neither rank may wait for the device."""
    with shoal.init("ddp", device="cuda", run_dir="none", timeout=2.0) as job:
        world, mine = Group("all", range(2), job._carrier), torch.ones(1000, device=job.device)
        box = torch.empty_like(mine)
        world.swap("other" if job.rank else "swap", [[[mine]]] * 2, [[[box]]] * 2).wait()


def reduced() -> list[list[float]]:
    """NCCL's own sums."""
    with shoal.init("ddp", device="cuda", run_dir="none", timeout=TIMEOUT) as job:
        assert isinstance(job._carrier, Routed)
        assert isinstance(job._carrier.device, Nccl)
        make = job._carrier.sums(job.device)
        assert make is not None
        reductions = make("test", range(2))
        assert reductions.scatters
        mine = torch.arange(4.0, device=job.device) + job.rank
        pending = [
            reductions.all_reduce("sum world #1", mine.clone()),
            reductions.reduce_scatter("part world #1", mine),
            reductions.all_gather("gather world #1", mine[:1].clone()),
        ]
        return [transfer.wait()[0][0].tolist() for transfer in pending]


def seconds(strategy: str | None, steps: int = 20) -> float:
    """Of a median step in a world of one: shoal's, or (None) the plain loop's."""
    width, layers = 1024, 8
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))
    model = model.cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    job = shoal.init(strategy, device="cuda", run_dir="none") if strategy else None
    if job is not None:
        model, optimizer = job.prepare(model, optimizer)
    x, took = torch.randn(4096, width, device="cuda"), list[float]()
    for _ in range(steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
    if job is not None:
        job.close()
    return sorted(took[steps // 4 :])[steps * 3 // 8]
