"""The parity oracle: a few steps under a strategy, and the same steps in one process, compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from shoal.comm.threads import run
from shoal.job import init
from shoal.strategy import Strategy

MakeModel = Callable[[], nn.Module]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Loss = Callable[[nn.Module, int, int], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `verify` found. `step` (from 0) and `name` of the first difference, and its distance in `ulps`."""

    equal: bool
    steps: int
    step: int | None = None
    name: str | None = None
    ulps: int | None = None
    differing: int = 0

    def __str__(self) -> str:
        if self.equal:
            return f"the same bits after each of {self.steps} steps"
        return f"different after step {self.step}: '{self.name}' by up to {self.ulps} ulps in {self.differing} elements"


def verify(
    make_model: MakeModel, make_optimizer: MakeOptimizer, loss: Loss, strategy: str | Strategy = "zero3", *,
    workers: int = 2, leaves: int | None = None, steps: int = 3, seed: int = 0, clip: float | None = None,
) -> Report:  # fmt: skip
    """Train under `strategy` with ranks that are threads, and in a world of one; compare all parameters and buffers.

    Args:
        make_model: builds the model; called once per rank with equal generators.
        make_optimizer: from parameters.
        loss: `loss(model, step, leaf)` runs the forward of one leaf.
        strategy: a name or a `Strategy`.
        workers: ranks of the run under test.
        leaves: of one step; default the workers.
        steps: how many to compare.
        seed: of the job.
        clip: maximal gradient norm; None: no clipping.
    """
    leaves = leaves or (strategy.leaves if isinstance(strategy, Strategy) else None) or workers

    def program(chosen: str | Strategy) -> Callable[[int], list[dict[str, Tensor]]]:
        def rank_main(_rank: int) -> list[dict[str, Tensor]]:
            with init(chosen, leaves=leaves, seed=seed, run_dir="none", device="cpu") as job:
                model = make_model()
                model, optimizer = job.prepare(model, make_optimizer(model.parameters()))
                loader = job.loader(_Numbers(leaves * steps), global_batch=leaves, shuffle=False)
                states: list[dict[str, Tensor]] = []
                for number in loader:
                    loss(model, *divmod(int(number), leaves)).backward()
                    if clip is not None:
                        job.clip_grad_norm(clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    if job.stepped:
                        states.append(cast(dict[str, Tensor], job.state_dict(model)))
                return states

        return rank_main

    alone = strategy if not isinstance(strategy, Strategy) or strategy.ranks_per_copy is None else strategy.name
    if isinstance(strategy, Strategy):
        alone = Strategy(precision=strategy.precision, reduce=strategy.reduce)
    tested, expected = (
        run(workers, program(strategy))[0],
        run(1, program("ddp" if isinstance(alone, str) else alone))[0],
    )
    return compare(tested, expected)


def compare(tested: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> Report:
    """The first difference between two runs' states, step by step, in the model's order."""
    for step, (a, b) in enumerate(zip(tested, expected, strict=True)):
        for name in b:
            apart = ulps(a[name], b[name])
            if apart.any():
                return Report(
                    equal=False, steps=len(tested), step=step, name=name, ulps=int(apart.max()),
                    differing=int(apart.count_nonzero()),
                )  # fmt: skip
    return Report(equal=True, steps=len(tested))


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between `a` and `b`, per element; 0 and -0 are one apart."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    kind = sizes[a.element_size()]
    x, y = a.contiguous().view(kind).long(), b.contiguous().view(kind).long()
    if a.dtype.is_floating_point:
        magnitude = torch.iinfo(kind).max
        x, y = (torch.where(v < 0, -1 - (v & magnitude), v) for v in (x, y))
    return (x - y).abs()


class _Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index
