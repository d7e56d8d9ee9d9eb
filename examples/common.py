"""What the short examples share: their options, their workers, and the fingerprint that shows the same bits."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import shoal
from shoal.launch.run import launch
from shoal.strategy import NAMED

Numbers = dict[str, float]
"""What an example claims, by name."""

Train = Callable[[shoal.Job, argparse.Namespace], tuple[nn.Module, Numbers]]
"""An example: trains on every rank. Returns the prepared model; the numbers count on rank 0 only."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What rank 0 has found.

    Args:
        numbers: by name, such as the accuracy on held-out data.
        sha256: of all parameters and buffers.
    """

    numbers: Numbers
    sha256: str


def options(doc: str, **amounts: tuple[int, int]) -> argparse.ArgumentParser:
    """The options of all examples.

    Args:
        doc: the example's docstring; its first line describes it.
        amounts: options that `--quick` makes smaller, each with its default and the quick one.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add = parser.add_argument
    add("--strategy", default="zero3", choices=NAMED, help="what the ranks divide among them (%(default)s)")
    add(
        "--workers", type=at_least_one, default=2, help="ranks to start, unless torchrun has started them (%(default)s)"
    )
    add("--leaves", type=at_least_one, default=2, help="micro-batches of a step; part of the numbers (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    for name, (default, quick) in amounts.items():
        add(f"--{name}", type=at_least_one, help=f"({default}; with --quick {quick})")
    add("--quick", action="store_true", help="just to see it run")
    parser.set_defaults(amounts=amounts)
    return parser


def at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return int(text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    found = parser.parse_args(argv)
    for name, (default, quick) in found.amounts.items():
        if getattr(found, name) is None:
            setattr(found, name, quick if found.quick else default)
    return found


def run(file: str, parser: argparse.ArgumentParser, train: Train) -> int:
    """The whole program: start the workers, or be one. Returns the exit code."""
    chosen = parse(parser, sys.argv[1:])
    if "RANK" not in os.environ:  # neither ours, nor of `shoal run`, nor of torchrun
        return launch([file, *sys.argv[1:]], workers=chosen.workers, run_dir="none").exit_code
    found = work(train, chosen)
    if found is not None:
        for name, value in found.numbers.items():
            print(f"{name:<40} {value:.4f}")
        print(f"{'sha256 of parameters and buffers':<40} {found.sha256}")
    return 0


def work(train: Train, chosen: argparse.Namespace) -> Found | None:
    """What each worker does. Returns what rank 0 has found."""
    o = chosen
    with shoal.init(o.strategy, device="cpu", seed=o.seed, leaves=o.leaves, threads=1, run_dir="none") as job:
        model, numbers = train(job, chosen)
        sha256 = fingerprint(job, model)
        return Found(numbers=numbers, sha256=sha256) if job.rank == 0 else None


def fingerprint(job: shoal.Job, model: nn.Module) -> str:
    """sha256 of all parameters and buffers, on rank 0."""
    digest = hashlib.sha256()
    for name, value in job.state_dict(model).items():
        assert isinstance(value, torch.Tensor)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """A learning rate that rises for a tenth of the steps, then falls along a cosine to nearly nothing."""
    warm = 1 + steps // 10
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm) * (1.01 + math.cos(math.pi * step / steps)) / 2)


def progress(job: shoal.Job, loss: float | None, of: int) -> None:
    """Tell of the loss now and then.

    Args:
        loss: what `job.mean` gave: None in the middle of a step.
        of: how many steps there will be.
    """
    if loss is not None and job.rank == 0 and (job.step % max(1, of // 8) == 0 or job.step == of):
        print(f"step {job.step}/{of}  loss {loss:.3f}", flush=True)
