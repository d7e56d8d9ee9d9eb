"""Time of a step against `memory=`: zero3 over gloo, where gathers cost something, from nothing kept to everything.

    python benchmarks/budget.py [--quick] [--json FILE] [--plots DIR]

Contenders are budgets: what a rank needs at most, plus a share of the units that are not in use; every block is a unit.
Each round visits all of them, in processes of their own, beginning with another one. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from contenders import Contender, shoal
from models import MODELS, Model, blocks_of
from networks import NETWORKS, Place
from report import Measured, visit_of, weight_of
from torch import nn
from visit import Task, visit

from shoal import init
from shoal.comm.meter import dry_run
from shoal.engine.ledger import GATHERED, KEPT_UNITS, LENT

MIB = 2.0**-20
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the bytes of all units but those in use, which there is always room for."""
RANKS = 2


@dataclass(kw_only=True)
class Case:
    """A budget and what was seen with it: milliseconds of median steps, bytes of a rank and step, bytes at most."""

    name: str
    share: float | None
    memory: int | None
    steps: list[float] = field(default_factory=list[float])
    payload: float | None = None
    peak: float | None = None

    @property
    def contender(self) -> Contender:
        return shoal("zero3", self.name, carrier="gloo", memory=self.memory, units=0)


def bytes_of(model: Model) -> tuple[int, int]:
    """What a rank needs at most, with a block and what lies around it whole; and what all other blocks take.

    gloo's copies of a step's gradients are in it, which the dry run has not.
    """
    found: list[int] = []

    def rank_main(_rank: int) -> None:
        with init("zero3", run_dir="none") as job:
            prepared = model.make().to(job.device)
            prepared, _ = job.prepare(prepared, torch.optim.AdamW(prepared.parameters()), units=0)
            entries = job.memory().entries
            found.append(sum(e.peak for e in entries if e.name not in (GATHERED, KEPT_UNITS, LENT)))

    made = model.make()
    whole, blocks = size_of(made), [size_of(block) for block in blocks_of(made)]
    dry_run(0, RANKS, rank_main)
    in_use = whole - sum(blocks) + max(blocks)
    return found[0] + whole + in_use, whole - in_use


def size_of(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def cases(model: Model, *, quick: bool) -> list[Case]:
    """Without a budget, and with some."""
    least, others = bytes_of(model)
    shares = SHARES[::2] if quick else SHARES
    found = [Case(name=f"{share:.0%}", share=share, memory=least + int(share * others)) for share in shares]
    return [Case(name="none", share=None, memory=None), *found]


def run(model: Model, place: Place, chosen: Sequence[Case], *, rounds: int, steps: int, weigh: bool) -> None:
    """Fill the cases."""
    for case in chosen if weigh else ():
        told = visit(Task(contender=case.contender, model=model, steps=1, weigh=True), place)
        case.peak = weight_of(told).peak
    for number in range(rounds):
        first = number % len(chosen)
        for case in [*chosen[first:], *chosen[:first]]:
            told = visit(Task(contender=case.contender, model=model, steps=steps), place)
            seen = visit_of(told, shared_wire=True)
            case.steps.append(seen.seconds * 1e3)
            case.payload = seen.payload
            print(
                f"{model.name} memory {case.name:5} round {number + 1} of {rounds}: {case.steps[-1]:8.1f} ms",
                flush=True,
            )


def measured(model: Model, found: Sequence[Case]) -> list[Measured]:
    """Lines of the JSON file."""
    lines: list[Measured] = []
    for case in found:
        step = statistics.median(case.steps)
        values = {
            "memory": (case.memory, "byte"), "step": (step, "ms"), "step_min": (min(case.steps), "ms"),
            "step_max": (max(case.steps), "ms"), "payload": (case.payload, "byte"), "peak": (case.peak, "byte"),
            "ratio": (step / statistics.median(found[0].steps), "no budget"),
        }  # fmt: skip
        for metric, (value, unit) in values.items():
            if value is not None:
                name = f"{model.name} {case.name}"
                lines.append(Measured(bench="budget", case=name, metric=metric, value=float(value), unit=unit))
    return lines


def table(found: Sequence[Case]) -> str:
    """To read."""
    lines = [f"{'units kept':>12}{'memory, MiB':>14}{'step, ms':>12}{'sent, MiB':>12}{'peak, MiB':>12}"]
    for case in found:
        columns = (case.memory, case.payload, case.peak)
        memory, payload, peak = ("-" if n is None else f"{n * MIB:.1f}" for n in columns)
        lines.append(f"{case.name:>12}{memory:>14}{statistics.median(case.steps):12.1f}{payload:>12}{peak:>12}")
    return "\n".join(lines)


def draw(model: Model, found: Sequence[Case], folder: Path) -> Path:
    """Time against the budget, and a line for the time without one."""
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    with_budget = [case for case in found if case.memory is not None]
    budgets = [(case.memory or 0) * MIB for case in with_budget]
    medians = [statistics.median(case.steps) for case in with_budget]
    _, axes = pyplot.subplots(figsize=(7, 4))
    axes.fill_between(budgets, [min(c.steps) for c in with_budget], [max(c.steps) for c in with_budget], alpha=0.2)
    axes.plot(budgets, medians, marker="o", label="memory=")
    axes.axhline(statistics.median(found[0].steps), color="black", linestyle="--", label="no budget")
    axes.set_xlabel("memory=, MiB a rank")
    axes.set_ylabel("ms a step")
    axes.set_ylim(bottom=0)
    axes.set_title(f"zero3 over gloo, {RANKS} ranks, {model.name}")
    axes.legend()
    file = folder / f"budget_{model.name}.svg"
    pyplot.savefig(file, bbox_inches="tight")
    pyplot.close()
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a step against memory=.")
    parser.add_argument("--quick", action="store_true", help="one round, three budgets: under 30 seconds")
    parser.add_argument(
        "--model", default="gpt-6m", choices=[m.name for m in MODELS], metavar="NAME", help="%(choices)s"
    )
    parser.add_argument("--rounds", type=int, help="how often every budget is visited; default 3, 1 with --quick")
    parser.add_argument("--steps", type=int, default=5, help="steps of a visit that count; default %(default)d")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw it (matplotlib)")
    args = parser.parse_args()
    if args.plots is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install 'shoal[race]'")
    model = next(m for m in MODELS if m.name == args.model)
    found = cases(model, quick=args.quick)
    network = next(n for n in NETWORKS if n.rate is None and n.ranks == RANKS)
    with network.opened() as place:
        run(model, place, found, rounds=args.rounds or (1 if args.quick else 3), steps=args.steps, weigh=not args.quick)
    print(f"\n{table(found)}")
    if args.json is not None:
        args.json.write_text(json.dumps(measured(model, found), indent=1) + "\n")
    if args.plots is not None:
        print(draw(model, found, args.plots))


if __name__ == "__main__":
    main()
