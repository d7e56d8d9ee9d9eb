"""The two runs of a script that a card compares."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from shoal.bench.card import LEFT_OUT, Card, make_card
from shoal.bench.record import Asked, Record
from shoal.errors import OrderError, SettingError
from shoal.launch.run import Outcome, launch
from shoal.logs import say
from shoal.trace import Trace

LEAST = LEFT_OUT + 2
"""Steps that a run must have."""


class Failed(NamedTuple):
    """A run that failed: which, and how."""

    run: str
    outcome: Outcome


def bench(
    argv: Sequence[str], *, workers: int = 2, steps: int | None = None, flags: Mapping[str, object] | None = None
) -> Card | Failed:
    """Run a training script with `workers` processes and with one, on equal leaves of equal samples; compare.

    Checkpoints that it saves go to a directory of the moment. Its standard output goes to standard error.

    Args:
        argv: the script and its arguments.
        workers: processes of the run under test, at least 2.
        steps: each run ends after so many that act; None: with the script.
        flags: settings by name that win over the script's own, of both runs; the strategy is that of the workers.

    Returns:
        The card, or the run that failed.

    Raises:
        ConfigError: there is no such script or strategy, or too few workers or steps.
        OrderError: a run took no step that acts, or too few.
    """
    _check(workers, steps)
    flags = dict(flags or {})
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as directory:
        name = f"{workers} workers"
        say(f"bench, 1 of 2: {' '.join(argv)} with {name}")
        many = _go(argv, Asked(Path(directory, "many"), steps or 0), workers, flags)
        if isinstance(many, Outcome):
            return Failed(name, many)
        same = {"leaves": many[0].leaves, "device": many[0].device}
        say(f"bench, 2 of 2: {' '.join(argv)} with one worker")
        alone = {**flags, "strategy": "ddp", "ranks_per_copy": 1, **same}
        one = _go(argv, Asked(Path(directory, "one"), steps or 0), 1, alone)
        if isinstance(one, Outcome):
            return Failed("one worker", one)
        return make_card(" ".join(argv), one, many, processors=_processors())


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(workers: int, steps: int | None) -> None:
    if workers < 2:
        raise SettingError(
            f"workers={workers}: shoal bench holds several workers against one", remedy="shoal bench --workers 2 ..."
        )
    if steps is not None and steps < LEAST:
        raise SettingError(
            f"steps={steps}: the first {LEFT_OUT} are left out, and two must remain", remedy=f"--steps {LEAST} or more"
        )


def _go(argv: Sequence[str], asked: Asked, workers: int, flags: Mapping[str, object]) -> list[Record] | Outcome:
    """What its ranks have seen, or how it failed."""
    asked.path.mkdir()
    saves = Trace(asked.path, 0)  # checkpoints must not meet those of the other run
    environ = {**os.environ, **saves.variable(), **asked.variable()}
    outcome = launch(argv, workers=workers, flags=flags, run_dir="none", environ=environ, keep_stdout=True)
    if outcome.exit_code:
        return outcome
    found, what = asked.records(), f"{argv[0]} with {workers} worker{'s' if workers > 1 else ''}"
    if not found:
        raise OrderError(
            f"{what} took no step that acts: there is nothing to measure",
            remedy="a script that trains: shoal.init, job.prepare, optimizer.step()",
        )
    if len(found) < workers:
        raise OrderError(
            f"{what}: only ranks {', '.join(str(r.rank) for r in found)} have left a record",
            remedy="one job over all workers: shoal.init() on every rank",
        )
    took = min(len(r.steps) for r in found)
    if took < max(asked.steps, LEAST):
        wanted = f"of {asked.steps}" if asked.steps else f"and {LEAST} are the least"
        raise OrderError(
            f"{what} ended after {took} steps {wanted}", remedy="fewer --steps, or a script with more data or epochs"
        )
    return found
