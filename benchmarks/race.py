"""The race: shoal's strategies beside everybody else's, on one host and on several.

    python benchmarks/race.py [--quick | --all] [--json FILE] [--plots DIR]

A visit is one contender in fresh processes: some steps to warm up, then some that count. A round visits everybody, each
round begins with another contender, and ratios are taken within a round, so that a busy spell of the machine does not
fall on one contender alone. A leg is one model on one network. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from contenders import CONTENDERS, ONE, Contender
from models import MODELS, Model
from networks import NETWORKS, Network, Place, Unavailable
from report import Entry, Leg, markdown, measured, table, visit_of, weight_of
from visit import Task, Told, VisitFailed, visit

GIVEN_UP = 2
"""Visits that may fail before a contender is left out of the rest of a leg."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A leg to come. `share`: of the time that is left, against the legs after it. `weigh`: look at memory, too."""

    network: str
    model: str
    share: float = 1.0
    weigh: bool = False


QUICK = (Stage(network="loopback-2", model="gpt-6m", weigh=True), Stage(network="1gbit-2", model="gpt-6m"))
USUAL = (
    Stage(network="loopback-2", model="gpt-33m", share=8, weigh=True),
    Stage(network="loopback-4", model="gpt-33m", share=12, weigh=True),
    *(
        Stage(network="loopback-2", model=name, share=3, weigh=True)
        for name in ("vgg", "resnet", "embedding", "layers")
    ),
    Stage(network="1gbit-2", model="gpt-33m", share=10),
    Stage(network="200mbit-2", model="gpt-6m", share=6),
    Stage(network="100mbit-2", model="gpt-6m", share=8),
)
MINUTES = {"quick": 4.5, "usual": 56.0, "all": 600.0}


def every_stage() -> list[Stage]:
    """All models on all networks, the small GPT alone where a large one would take minutes a step."""
    stages: list[Stage] = []
    for network in NETWORKS:
        slow = network.rate is not None and network.rate < 1e9
        names = ["gpt-6m"] if slow else [model.name for model in MODELS if model.name != "trial"]
        stages += [Stage(network=network.name, model=name, weigh=network.rate is None) for name in names]
    return stages


def stages_of(args: argparse.Namespace) -> list[Stage]:
    """Those of the mode; `--networks` and `--models` choose among all, with each model on each network."""
    stages = list(QUICK if args.quick else every_stage() if args.all else USUAL)
    if args.networks or args.models:
        networks = args.networks or list(dict.fromkeys(stage.network for stage in stages))
        models = args.models or list(dict.fromkeys(stage.model for stage in stages))
        apart = {network.name for network in NETWORKS if network.rate is not None}
        stages = [Stage(network=n, model=m, weigh=n not in apart) for n in networks for m in models]
    return stages


# ---------------------------------------------------------------- a leg


@dataclass(frozen=True, kw_only=True)
class Course:
    """One leg as it is run: everything that its visits need."""

    network: Network
    place: Place
    model: Model
    rounds: int
    steps: int
    patience: float
    ends: float  # by time.monotonic()
    weigh: bool

    def entries(self, contenders: Sequence[Contender]) -> list[Entry]:
        """Who takes part; who cannot says so in the table."""
        fit = [c for c in contenders if c.fewest <= self.network.ranks]
        return [Entry(contender=c, visits=[], failure=c.missing()) for c in fit]

    def run(self, contenders: Sequence[Contender]) -> Leg:
        """Weigh everybody once, then visit everybody once a round, for as many rounds as the time allows."""
        parameters = self.model.parameters()  # before any rank starts: the meta device loads half a second of modules
        entries = self.entries(contenders)
        failures = {entry.contender.name: GIVEN_UP if entry.failure else 0 for entry in entries}
        if self.weigh:
            for entry in entries:
                self._weigh(entry, failures)
        for number in range(self.rounds):
            start, first = time.monotonic(), number % len(entries)
            for entry in [*entries[first:], *entries[:first]]:
                self._clock(entry, failures, number)
            took = time.monotonic() - start
            if number + 1 < self.rounds and time.monotonic() + took > self.ends:
                print(f"{number + 1} of {self.rounds} rounds: no time for another of {took:.0f} s", flush=True)
                break
        return Leg(
            network=self.network.name, model=self.model.name, ranks=self.network.ranks,
            parameters=parameters, goodput=self.place.goodput, entries=entries,
        )  # fmt: skip

    def _weigh(self, entry: Entry, failures: dict[str, int]) -> None:
        told = self._visit(entry, failures, weigh=True)
        if told:
            entry.weight = weight_of(told)
            print(f"{self.network.name} {self.model.name}: {entry.contender.name} is weighed", flush=True)

    def _clock(self, entry: Entry, failures: dict[str, int], number: int) -> None:
        told = self._visit(entry, failures, weigh=False)
        seen = visit_of(told, shared_wire=self.network.rate is None) if told else None
        entry.visits.append(seen)
        if seen:
            said = f"{entry.contender.name:30} {seen.seconds * 1e3:9.1f} ms"
            print(f"{self.network.name} {self.model.name} round {number + 1} of {self.rounds}: {said}", flush=True)

    def _visit(self, entry: Entry, failures: dict[str, int], *, weigh: bool) -> list[Told]:
        """What the ranks say; nothing if one fails, which is printed and does not end the race."""
        name = entry.contender.name
        if failures[name] >= GIVEN_UP:
            return []
        task = Task(contender=entry.contender, model=self.model, steps=self.steps, weigh=weigh, patience=self.patience)
        try:
            return visit(task, self.place)
        except VisitFailed as failed:
            failures[name] += 1
            entry.failure = str(failed).rstrip().splitlines()[0]
            what = "weighing" if weigh else "timing"
            print(f"{self.network.name} {self.model.name}: {name}, {what}: {failed}", flush=True)
            return []


# ---------------------------------------------------------------- all legs


def race(args: argparse.Namespace, contenders: Sequence[Contender], told: Callable[[Leg], None]) -> list[Leg]:
    """Every stage, one after the other; `told` hears of each leg at once."""
    legs: list[Leg] = []
    stages = stages_of(args)
    networks, models = {n.name: n for n in NETWORKS}, {m.name: m for m in MODELS}
    ends = time.monotonic() + 60 * args.minutes
    for number, stage in enumerate(stages):
        begin, later = time.monotonic(), sum(s.share for s in stages[number:])
        if begin > ends:
            print(f"{stage.network} {stage.model}: left out: {args.minutes:g} minutes are over", flush=True)
            continue
        network = networks[stage.network]
        try:
            with network.opened() as place:
                course = Course(
                    network=network, place=place, model=models[stage.model], rounds=args.rounds, steps=args.steps,
                    patience=args.patience, ends=begin + (ends - begin) * stage.share / later, weigh=stage.weigh,
                )  # fmt: skip
                leg = course.run(contenders)
        except Unavailable as why:
            print(f"{stage.network} {stage.model}: left out: {why}", flush=True)
            continue
        legs.append(leg)
        told(leg)
    return legs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The race: shoal's strategies beside everybody else's.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="the small GPT on two networks, under 5 minutes")
    length.add_argument("--all", action="store_true", help="all models on all networks: hours")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="those whose name has one of these, and one process")
    parser.add_argument("--models", nargs="+", choices=[m.name for m in MODELS], metavar="NAME", help="%(choices)s")
    parser.add_argument("--networks", nargs="+", choices=[n.name for n in NETWORKS], metavar="NAME", help="%(choices)s")
    parser.add_argument("--rounds", type=int, help="how often everybody is visited; default 3, 1 with --quick")
    parser.add_argument("--steps", type=int, help="steps of a visit that count; default 3")
    parser.add_argument("--minutes", type=float, help="no round begins that would not end within these")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds a visit may take; default %(default)g")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, after every leg")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables, after every leg")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw it (matplotlib)")
    args = parser.parse_args()
    if args.plots is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install 'shoal[race]'")
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.steps = args.steps or 3
    args.minutes = args.minutes or MINUTES["quick" if args.quick else "all" if args.all else "usual"]
    return args


def main() -> None:
    args = _arguments()
    chosen = [c for c in CONTENDERS if not args.only or c.name == ONE or any(word in c.name for word in args.only)]
    done: list[Leg] = []

    def told(leg: Leg) -> None:
        done.append(leg)
        print(f"\n{table(leg)}\n", flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps([line for leg in done for line in measured(leg)], indent=1) + "\n")
        if args.markdown is not None:
            args.markdown.write_text("\n\n".join(map(markdown, done)) + "\n")

    race(args, chosen, told)
    print(
        f"AdamW, float32, 1 thread a rank, torch {torch.__version__}; {args.rounds} rounds x {args.steps} steps at most"
    )
    if args.plots is not None:
        import plots  # only now: nothing that draws is in the ranks

        for file in plots.draw(done, args.plots):
            print(file)


if __name__ == "__main__":
    main()
