"""`shoal verify --plain`: a script under shoal against the same script by torch alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from shoal.launch.run import Outcome
from shoal.trace import By, Trace, Traced
from shoal.verify import Report, compare, facts_of, run_traced

LIMIT = 1e-9
"""How far numbers may be apart in float64, where sums are taken in another order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One comparison.

    Args:
        what: the two runs.
        report: what was found; None: they are not comparable.
        why: in that case, why not.
    """

    what: str
    report: Report | None = None
    why: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.report or f'left out, as {self.why}'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Near(Report):
    """What was found where numbers may differ by `LIMIT`.

    `apart`: the largest difference, of all steps or, if one was too far, of that parameter.
    """

    apart: float = 0.0

    def __str__(self) -> str:
        if self.equal:
            return f"within {self.apart:.1e} after each of {self.steps} steps"
        if self.why:
            return f"different after step {self.step}: {self.why}"
        return f"different after step {self.step}: '{self.name}' by up to {self.apart:.1e}, and {LIMIT:g} may be"


def verify_plain(
    argv: Sequence[str], strategy: str = "zero3", *, workers: int = 2, steps: int = 5
) -> list[Part] | Outcome:
    """Hold a training script under shoal against the same script without it.

    It runs five times: under shoal and by torch alone with one rank and one leaf, whose bits must be equal; in float64
    under shoal with `workers` and its own leaves, by torch alone with the samples of all leaves as one batch, and under
    torch's DDP with a rank for each leaf, which must be within `LIMIT` of each other.

    Args:
        argv: the script and its arguments.
        strategy: of the run with `workers`.
        workers: processes of that run.
        steps: how many to compare.

    Returns:
        What was found, or how a run ended that failed.

    Raises:
        ConfigError: there is no such script or strategy.
        OrderError: the script took no step that acts.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-verify-") as directory:
        runs = _Runs(argv, Path(directory), steps)
        double = runs.go("shoal in float64", workers, {"strategy": strategy}, double=True)
        if isinstance(double, Outcome):
            return double
        return runs.compared(
            double, facts_of(double, argv[0]), f"{workers} worker{'s' if workers > 1 else ''} under {strategy}"
        )


class _Runs:
    """The script's runs, one after the other."""

    def __init__(self, argv: Sequence[str], directory: Path, steps: int) -> None:
        self.argv, self.directory, self.steps = argv, directory, steps

    def go(
        self, name: str, workers: int, flags: Mapping[str, object], by: By = By.SHOAL, *, double: bool = False
    ) -> Trace | Outcome:
        """Run it. Returns what it left, or how it failed."""
        trace = Trace(self.directory / name, self.steps, by, double=double)
        return run_traced(self.argv, trace, workers, flags) or trace

    def compared(self, double: Trace, facts: Traced, under: str) -> list[Part] | Outcome:
        """The other runs, and what they show."""
        one: dict[str, object] = {"strategy": "ddp", "ranks_per_copy": 1, "device": facts.device}
        leaves = {**one, "leaves": facts.leaves}
        alone = self.go("shoal alone", 1, {**one, "leaves": 1})
        plain = self.go("torch alone", 1, {**one, "leaves": 1}, By.ALONE)
        for run in (alone, plain):
            if isinstance(run, Outcome):
                return run
        assert isinstance(alone, Trace)
        assert isinstance(plain, Trace)
        parts = [
            Part(what="one rank and one leaf, with shoal and without", report=compare(alone.states(), plain.states()))
        ]
        told, states = plain.facts(), double.states()
        for by, count, words in (
            (By.WHOLE, 1, f"the whole batch of {facts.leaves} leaves"),
            (By.DDP, facts.leaves, f"torch DDP with {facts.leaves} ranks"),
        ):
            what = f"in float64, {under} and {words}"
            if by is By.WHOLE and told is not None and told.unlike_whole:
                parts.append(Part(what=what, why=told.unlike_whole))
                continue
            run = self.go(by.value, count, leaves, by, double=True)
            if isinstance(run, Outcome):
                return run
            parts.append(Part(what=what, report=near(states, run.states())))
        return parts


def near(tested: Sequence[Mapping[str, Tensor]], expected: Sequence[Mapping[str, Tensor]]) -> Near:
    """The first step and parameter by which two runs are further apart than `LIMIT`, in the model's order.

    Only what `expected` names is compared.
    """
    most = 0.0
    for step, (a, b) in enumerate(zip(tested, expected, strict=False)):
        for name in b:
            if name not in a or a[name].shape != b[name].shape:
                why = f"'{name}' is {'not there' if name not in a else tuple(a[name].shape)} under shoal"
                return Near(equal=False, steps=len(tested), step=step, name=name, why=why)
            apart = (a[name].double() - b[name].double()).abs()
            largest = float(apart.max()) if apart.numel() else 0.0
            if not largest <= LIMIT:  # NaN is too far, too
                count = int((~(apart <= LIMIT)).sum())
                return Near(
                    equal=False, steps=len(tested), step=step, name=name, differing=count, apart=largest
                )  # fmt: skip
            most = max(most, largest)
    if len(tested) != len(expected):
        why = f"{len(tested)} steps under shoal, {len(expected)} without it"
        steps = min(len(tested), len(expected))
        return Near(equal=False, steps=steps, step=steps, why=why)
    return Near(equal=True, steps=len(tested), apart=most)
