"""Where the time of a step goes: what rank 0 of one of shoal's contenders does, and when.

    python benchmarks/timeline.py ["shoal ddp"] [--network 1gbit-2] [--model gpt-33m] [--json FILE]

Besides: what processor time the user's thread and the others take (gloo's, and the one that waits for them), and what a
plain step takes. Looking costs next to nothing. A network with a rate needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, ONE
from models import MODELS
from networks import NETWORKS, Unavailable
from visit import WARM_UP, Task, Told, visit

from shoal.engine.journeys import Journeys
from shoal.engine.updates import Updates

MIB = 2**20
TICKS = os.sysconf("SC_CLK_TCK")


class Log:
    """What happens in the step under way; milliseconds since it began."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str]] = []
        self.began = 0.0

    def begin(self) -> None:
        self.events, self.began = [], time.perf_counter()

    def add(self, what: str) -> None:
        self.events.append((1e3 * (time.perf_counter() - self.began), what))


def spy(log: Log) -> None:
    """Gradients that set out and come, and updates, go into the log too. In a process that ends with its visit."""
    start, passed, update = Journeys.start, Journeys.passed, Updates._step  # pyright: ignore[reportPrivateUsage]

    def logged_start(self: Journeys, unit: int, flow: Any, nbytes: int) -> None:
        log.add(f"gradients of unit {unit} set out, {nbytes / MIB:.1f} MiB")
        start(self, unit, flow, nbytes)

    def logged_passed(self: Journeys, pending: Any) -> None:
        before = [unit for unit, journey in self.under_way.items() if journey.pending is pending]
        passed(self, pending)
        for unit in before:
            log.add(f"gradients of unit {unit} {'are one stage further' if unit in self.under_way else 'are there'}")

    def logged_update(self: Updates, units: Sequence[Any], decided: Any) -> None:
        update(self, units, decided)
        log.add(f"updated: units {[unit.index for unit in units]}")

    Journeys.start, Journeys.passed, Updates._step = logged_start, logged_passed, logged_update  # type: ignore[method-assign]


def processor_seconds() -> Mapping[str, float]:
    """Of the user's thread and of all others, in user space and in the system."""
    found = {f"{whose}, {where}": 0.0 for whose in ("this thread", "other threads") for where in ("user", "system")}
    for task in Path("/proc/self/task").iterdir():
        user, system = map(int, (task / "stat").read_text().rpartition(")")[2].split()[11:13])
        whose = "this thread" if int(task.name) == threading.get_native_id() else "other threads"
        found[f"{whose}, user"] += user / TICKS
        found[f"{whose}, system"] += system / TICKS
    return found


def look(task: Task, rank: int, tell: Callable[[Told], None]) -> None:
    """Steps as in the race; the events are those of the last one, processor times the mean of all that count."""
    log, seconds = Log(), list[float]()
    spy(log)
    before = processor_seconds()
    with task.contender.open(task.model) as trained:
        for step in range(WARM_UP + task.steps):
            if step == WARM_UP:
                before = processor_seconds()
            inputs, targets = task.model.batch(step, rank)
            log.begin()
            loss = task.model.loss(trained.model(inputs), targets)
            log.add("forward is over")
            trained.backward(loss)
            log.add("backward is over")
            trained.step()
            log.add("the step is over")
            seconds.append(time.perf_counter() - log.began)
        spent = processor_seconds()
        times = [(1e3 * (spent[name] - before[name]) / task.steps, f"of processor time: {name}") for name in spent]
        tell(Told(seconds=seconds[WARM_UP:], events=[*log.events, *times]))


def lines(name: str, told: Told) -> list[dict[str, object]]:
    """For machines."""
    seen = [(f"{name}: {what}", ms) for ms, what in told.get("events", [])]
    return [{"bench": "timeline", "case": case, "metric": "at", "value": ms, "unit": "ms"} for case, ms in seen]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where the time of a step goes.")
    names = [c.name for c in CONTENDERS if c.name.startswith("shoal")]
    networks, models = [n.name for n in NETWORKS], [m.name for m in MODELS]
    parser.add_argument("contender", nargs="?", default="shoal ddp", choices=names, metavar="NAME", help="%(choices)s")
    parser.add_argument("--network", default="1gbit-2", choices=networks, metavar="NAME", help="%(choices)s")
    parser.add_argument("--model", default="gpt-33m", choices=models, metavar="NAME", help="%(choices)s")
    parser.add_argument("--steps", type=int, default=4, help="that count; the last one is shown; default %(default)d")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    network = next(n for n in NETWORKS if n.name == args.network)
    model = next(m for m in MODELS if m.name == args.model)
    written: list[dict[str, object]] = []
    try:
        with network.opened() as place:
            for name in dict.fromkeys((ONE, args.contender)):
                contender = next(c for c in CONTENDERS if c.name == name)
                told = visit(Task(contender=contender, model=model, steps=args.steps, look=look), place)[0]
                median = 1e3 * statistics.median(told.get("seconds", []))
                print(f"{name}, {model.name}, {network.name}: {median:.0f} ms a step")
                for ms, what in told.get("events", []):
                    print(f"{ms:9.1f}  {what}", flush=True)
                written += lines(f"{network.name} {model.name} {name}", told)
    except Unavailable as why:
        raise SystemExit(f"{network.name} cannot be made here: {why}") from None
    if args.json is not None:
        args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
