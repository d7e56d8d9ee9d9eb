"""What the race found, as lines of JSON and as tables. Arithmetic only."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from contenders import ONE, Contender
from formulas import Grid, at_rest, bound, payload
from visit import Told

FLOAT = 4
"""Bytes of a parameter."""

MIB = 2.0**-20


class Measured(TypedDict):
    """One line of the JSON file."""

    bench: str
    case: str
    metric: str
    value: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One contender in one round: seconds of the median step, bytes of a rank and step, loss per sample.

    `elsewhere`: how many of the machine's processors were busy with other things meanwhile.
    """

    seconds: float
    cpu_seconds: float
    loss: float
    elsewhere: float | None
    wire: float | None
    payload: float | None


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Bytes of a rank, the mean over ranks."""

    at_rest: float | None
    peak: float | None
    pss: float | None


@dataclass(kw_only=True)
class Entry:
    """A contender in one leg: a visit or None per round, its weight, and why it did not run."""

    contender: Contender
    visits: list[Visit | None]
    weight: Weight | None = None
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Leg:
    """All that happened with one model on one network. `goodput` in bytes a second, `parameters` in numbers."""

    network: str
    model: str
    ranks: int
    parameters: int
    goodput: float
    entries: Sequence[Entry]


# ---------------------------------------------------------------- from ranks to visits


def visit_of(ranks: Sequence[Told], *, shared_wire: bool) -> Visit:
    """A step ends when its slowest rank ends; processor time, bytes and loss are the mean over ranks.

    Args:
        ranks: what each said.
        shared_wire: all ranks send through one interface, whose counter is everybody's sum.
    """
    steps = [max(step) for step in zip(*(told["seconds"] for told in ranks), strict=True)]
    cpu = [statistics.fmean(step) for step in zip(*(told["cpu_seconds"] for told in ranks), strict=True)]
    machine = ranks[0]["machine"]
    wire = mean(told["wire"] for told in ranks)
    return Visit(
        seconds=statistics.median(steps),
        cpu_seconds=statistics.median(cpu),
        elsewhere=None if machine is None else max(0.0, machine - sum(cpu) * len(ranks)) / sum(steps),
        wire=wire / len(ranks) if wire is not None and shared_wire else wire,
        payload=mean(told["payload"] for told in ranks),
        loss=statistics.fmean(told["loss"] for told in ranks),
    )


def weight_of(ranks: Sequence[Told]) -> Weight:
    return Weight(
        at_rest=mean(told["at_rest"] for told in ranks),
        peak=mean(told["peak"] for told in ranks),
        pss=mean(told.get("pss") for told in ranks),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# ---------------------------------------------------------------- from visits to lines


def ratios(visits: Sequence[Visit | None], ones: Sequence[Visit | None]) -> list[float]:
    """To one process, within each round that has both."""
    return [v.seconds / one.seconds for v, one in zip(visits, ones, strict=False) if v and one]


def measured(leg: Leg) -> list[Measured]:
    """Medians over rounds, with the smallest and the largest of what was seen, and what the formulas say."""
    place = f"{leg.network} {leg.model}"
    lines = [Measured(bench="race", case=place, metric="goodput", value=leg.goodput, unit="byte/s")]
    ones = next((e.visits for e in leg.entries if e.contender.name == ONE), [])
    for entry in leg.entries:
        for metric, value, unit in _found(leg, entry, ones):
            lines.append(
                Measured(bench="race", case=f"{place} {entry.contender.name}", metric=metric, value=value, unit=unit)
            )
    return lines


def _found(leg: Leg, entry: Entry, ones: Sequence[Visit | None]) -> list[tuple[str, float, str]]:
    visits = [v for v in entry.visits if v]
    found: list[tuple[str, float, str]] = []
    found += _spread("step", [v.seconds * 1e3 for v in visits], "ms")
    found += _spread("ratio", ratios(entry.visits, ones), "one process")
    middles = {
        "processor": ([v.cpu_seconds * 1e3 for v in visits], "ms"),
        "elsewhere": ([v.elsewhere for v in visits], "processor"),
        "wire": ([v.wire for v in visits], "byte"),
        "payload": ([v.payload for v in visits], "byte"),
        "final_loss": ([v.loss for v in visits], "nat"),
    }
    for metric, (values, unit) in middles.items():
        known = [value for value in values if value is not None]
        found += [(metric, statistics.median(known), unit)] if known else []
    if entry.weight:
        weight = {"at_rest": entry.weight.at_rest, "peak": entry.weight.peak, "pss_peak": entry.weight.pss}
        found += [(metric, value, "byte") for metric, value in weight.items() if value is not None]
    found += _by_formula(leg, entry, ones) if visits or entry.weight else []
    return [*found, ("failed", 1.0, "contender")] if entry.failure else found


def _spread(metric: str, values: Sequence[float], unit: str) -> list[tuple[str, float, str]]:
    if not values:
        return []
    return [
        (metric, statistics.median(values), unit),
        (f"{metric}_min", min(values), unit),
        (f"{metric}_max", max(values), unit),
    ]


def _by_formula(leg: Leg, entry: Entry, ones: Sequence[Visit | None]) -> list[tuple[str, float, str]]:
    """What must be sent, kept and waited for; the bound's compute is that of one process, to be met within a round."""
    contender, size = entry.contender, leg.parameters * FLOAT
    grid: Grid = contender.grid(1 if contender.alone else leg.ranks)
    sent = payload(contender.function, grid, size)
    found = [
        ("payload_formula", sent, "byte"),
        ("at_rest_formula", at_rest(contender.function, grid, size), "byte"),
    ]
    pairs = [(v.seconds, one.seconds) for v, one in zip(entry.visits, ones, strict=False) if v and one]
    if pairs:
        least = [bound(one, sent, leg.goodput) for _, one in pairs]
        found.append(("bound", statistics.median(least) * 1e3, "ms"))
        found += _spread("over_bound", [v / b for (v, _), b in zip(pairs, least, strict=True)], "bound")
    return found


# ---------------------------------------------------------------- the table

COLUMNS = (
    ("step", "ms/step", 1.0, "9.1f"), ("step_min", "from", 1.0, "9.1f"), ("step_max", "to", 1.0, "9.1f"),
    ("ratio", "ratio", 1.0, "6.2f"), ("ratio_min", "from", 1.0, "6.2f"), ("ratio_max", "to", 1.0, "6.2f"),
    ("bound", "bound", 1.0, "8.1f"), ("over_bound", "/bound", 1.0, "6.2f"),
    ("processor", "cpu ms", 1.0, "8.1f"), ("elsewhere", "others", 1.0, "6.2f"),
    ("wire", "wire", MIB, "7.1f"), ("payload", "told", MIB, "7.1f"), ("payload_formula", "formula", MIB, "7.1f"),
    ("at_rest", "rest", MIB, "7.1f"), ("at_rest_formula", "formula", MIB, "7.1f"),
    ("peak", "peak", MIB, "7.1f"), ("pss_peak", "PSS", MIB, "7.1f"),
    ("final_loss", "loss", 1.0, "9.5f"),
)  # fmt: skip
"""Metric, heading, factor, format. Bytes are in MiB."""


def by_contender(leg: Leg, lines: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Metrics of each contender of a leg."""
    place = f"{leg.network} {leg.model} "
    cases: dict[str, dict[str, float]] = {entry.contender.name: {} for entry in leg.entries}
    for line in lines:
        name = line["case"].removeprefix(place)
        if name in cases:
            cases[name][line["metric"]] = line["value"]
    return cases


def table(leg: Leg) -> str:
    """What was measured, the fastest first, and at the end who did not run and why."""
    cases = by_contender(leg, measured(leg))
    widths = {metric: int(form.partition(".")[0]) for metric, _, _, form in COLUMNS}
    heading = f"{leg.network}, {leg.model}: {leg.parameters / 1e6:.2f} M parameters, {leg.ranks} ranks, "
    rows = [heading + f"one TCP stream {leg.goodput / 1e6:.1f} MB/s", ""]
    rows.append(" " * 30 + "".join(f" {heading:>{widths[metric]}}" for metric, heading, _, _ in COLUMNS))
    ran = {case: found for case, found in cases.items() if "step" in found or "at_rest" in found}
    for case, found in sorted(ran.items(), key=lambda item: item[1].get("step", float("inf"))):
        cells = [_cell(found, metric, factor, form, widths) for metric, _, factor, form in COLUMNS]
        rows.append(" ".join([f"{case:30}", *cells]).rstrip())
    rows += [f"{e.contender.name}: {e.failure}" for e in leg.entries if e.failure]
    return "\n".join(rows)


SHOWN = (
    "step", "ratio", "ratio_min", "ratio_max", "over_bound", "elsewhere", "wire", "payload", "payload_formula",
    "at_rest", "at_rest_formula", "peak", "pss_peak", "final_loss",
)  # fmt: skip
"""Columns of the page."""


def markdown(leg: Leg) -> str:
    """The same for a page: fewer columns, and none for what was not looked at."""
    cases = by_contender(leg, measured(leg))
    hidden = (
        ()
        if any("at_rest" in found for found in cases.values())
        else ("at_rest", "at_rest_formula", "peak", "pss_peak")
    )
    columns = [column for column in COLUMNS if column[0] in SHOWN and column[0] not in hidden]
    rows = [f"### {leg.network}, {leg.model}", "", f"One TCP stream: {leg.goodput / 1e6:.1f} MB/s.", ""]
    rows.append(" | ".join(["| case", *(heading for _, heading, _, _ in columns)]) + " |")
    rows.append("|---" * (len(columns) + 1) + "|")
    ran = {case: found for case, found in cases.items() if "step" in found}
    for case, found in sorted(ran.items(), key=lambda item: item[1]["step"]):
        cells = [
            f"{found[metric] * factor:.{form.partition('.')[2]}}" if metric in found else "-"
            for metric, _, factor, form in columns
        ]
        rows.append(" | ".join([f"| {case}", *cells]) + " |")
    rows += [f"\n{e.contender.name}: {e.failure}" for e in leg.entries if e.failure]
    return "\n".join(rows)


def _cell(found: Mapping[str, float], metric: str, factor: float, form: str, widths: Mapping[str, int]) -> str:
    return f"{found[metric] * factor:{form}}" if metric in found else f"{'-':>{widths[metric]}}"
