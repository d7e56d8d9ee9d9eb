"""What shoal costs beside the arithmetic: steps of models of very many small layers, with it and without.

    python benchmarks/overhead.py [--quick] [--json FILE] [--ranks 2] [--profile]

In every process a plain loop and one with shoal take turns, step by step, with the same model, batch and optimizer, its
arguments left as torch has them. A ratio is the median over the ratios of neighbouring steps, `work` the same of
processor time, which other programs disturb less. In a world of one the rest is Python; with `--ranks 2` the rows
also have what is sent, over shared memory and over gloo. `--profile` shows where shoal's steps spend their time, by
file and function.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from ranks import told_by_rank_0
from torch import nn

import shoal

WARM_UP = 4
PATIENCE = 300.0
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
SHOWN = 30
"""Lines of a profile."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run. `carrier` matters with several ranks only; `unit_bytes`: see `units` of `Job.prepare`."""

    form: str
    strategy: str
    optimizer: str
    ranks: int = 1
    carrier: str = "auto"
    rounds: int = 20
    unit_bytes: int | None = None

    def __str__(self) -> str:
        carrier = f" {self.ranks} ranks {self.carrier}" if self.ranks > 1 else ""
        size = "" if self.unit_bytes is None else f" units of {self.unit_bytes}"
        return f"{self.form} {self.strategy} {self.optimizer}{carrier}{size}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Medians over rounds: seconds of a step, and shoal's step over its neighbour.

    `work`: the same ratio of processor time, which other processes on the machine do not disturb.
    """

    plain: float
    shoal: float
    ratio: float
    work: float
    first: float
    units: int


def layers(count: int, width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "500 linear layers": (lambda: layers(500, 64), (8, 64)),
    "1000 tiny layers": (lambda: layers(1000, 8), (8, 8)),
    "1000 small layers": (lambda: layers(1000, 64), (8, 64)),
}
"""How to make a model, and the shape of its batches."""
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}


class Took(NamedTuple):
    """Seconds, and seconds of processors."""

    time: float
    work: float


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> Callable[[], Took]:
    """A whole step."""

    def step() -> Took:
        begin, work = time.perf_counter(), time.process_time()
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return Took(time.perf_counter() - begin, time.process_time() - work)

    return step


def run(case: Case, profile: bool) -> Found:
    """Take turns in this process, which is one rank."""
    make, shape = FORMS[case.form]
    with shoal.init(case.strategy, run_dir="none", carrier=case.carrier, timeout=120.0) as job:
        batch = torch.randn(*shape, generator=torch.Generator().manual_seed(job.rank))
        torch.manual_seed(0)
        plain_model, model = make(), make()
        plain = stepper(plain_model, OPTIMIZERS[case.optimizer](plain_model), batch)
        units = {} if case.unit_bytes is None else {"units": case.unit_bytes}
        model, optimizer = job.prepare(model, OPTIMIZERS[case.optimizer](model), **units)
        ours = stepper(model, optimizer, batch)
        first = ours().time
        for _ in range(WARM_UP):
            plain(), ours()
        pairs = [(plain(), ours()) for _ in range(case.rounds)]
        if profile and job.rank == 0:
            show_profile(ours, case)
        elif profile:
            ours()
        count = len(job._all_bound()[0].engine.units)
    return Found(
        plain=statistics.median(p.time for p, _ in pairs), shoal=statistics.median(o.time for _, o in pairs),
        ratio=statistics.median(o.time / p.time for p, o in pairs),
        work=statistics.median(o.work / p.work for p, o in pairs), first=first, units=count,
    )  # fmt: skip


def show_profile(step: Callable[[], Took], case: Case) -> None:
    profile = cProfile.Profile()
    profile.enable()
    step()
    profile.disable()
    print(f"\n{case}: one step", file=sys.stderr)
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(SHOWN)


# ---------------------------------------------------------------- processes


def visit(case: Case, profile: bool) -> Found:
    """Run a case in fresh processes; what rank 0 found."""
    command = [__file__, "--case", json.dumps(asdict(case)), *(["--profile"] if profile else [])]
    return Found(**told_by_rank_0(command, case.ranks, PATIENCE, str(case)))


def cases(asked: argparse.Namespace) -> Iterator[Case]:
    rounds = 10 if asked.quick else 30
    for form, optimizer, strategy in product(asked.forms, asked.optimizers, asked.strategies):
        for carrier in ("shared", "gloo") if asked.ranks > 1 else ("auto",):
            yield Case(
                form=form, strategy=strategy, optimizer=optimizer, ranks=asked.ranks, carrier=carrier, rounds=rounds,
                unit_bytes=asked.unit_bytes,
            )  # fmt: skip


def lines(case: Case, found: Found) -> Iterator[dict[str, object]]:
    """As all benchmarks write them."""
    for metric, unit in (("ratio", "x"), ("work", "x"), ("plain", "s"), ("shoal", "s"), ("first", "s"), ("units", "")):
        yield {"bench": "overhead", "case": str(case), "metric": metric, "value": getattr(found, metric), "unit": unit}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and the first two forms only")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--ranks", type=int, default=1, help="of every case; default a world of one")
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="default all")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--unit-bytes", type=int, help="units= of prepare; 0: every block is a unit of its own")
    parser.add_argument("--profile", action="store_true", help="one more step of each case under cProfile")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.case:
        print(json.dumps(asdict(run(Case(**json.loads(asked.case)), asked.profile))))
        return 0
    asked.forms = asked.forms or list(FORMS)[: 2 if asked.quick else None]
    rows: list[dict[str, object]] = []
    for case in cases(asked):
        found = visit(case, asked.profile)
        rows += lines(case, found)
        print(
            f"{case!s:52} plain {found.plain * 1e3:8.2f} ms  shoal {found.shoal * 1e3:8.2f} ms  "
            f"{found.ratio:5.2f} x  work {found.work:5.2f} x  first {found.first:6.2f} s  {found.units} units",
            flush=True,
        )  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
