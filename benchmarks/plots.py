"""Pictures of a race: time against the bound, memory against the formula, and what more ranks cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.axes import Axes
from report import Leg, by_contender, measured

GAP = 0.8
"""Of a bar, in rows."""
MIB = 2.0**-20
MANY = 4.0
"""Times the formula: what is longer is cut off, and its number says so."""
STYLES = {"shoal": "-", "torch": "--", "DeepSpeed": "-."}
"""Of a library's lines."""

Found = dict[str, dict[str, float]]


def draw(legs: Sequence[Leg], folder: Path) -> list[Path]:
    """One file for each leg's time, one for each leg's memory where it was weighed, one for each scaling."""
    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for leg in legs:
        found = by_contender(leg, measured(leg))
        files += _time(leg, found, folder)
        files += _memory(leg, found, folder)
    kinds = dict.fromkeys((kind_of(leg), leg.model) for leg in legs)
    for kind, model in kinds:
        files += _scaling([leg for leg in legs if (kind_of(leg), leg.model) == (kind, model)], folder)
    return files


def kind_of(leg: Leg) -> str:
    """The network's name without its ranks."""
    return leg.network.rpartition("-")[0]


def _time(leg: Leg, found: Found, folder: Path) -> list[Path]:
    """A bar for each step with its range, a mark for its bound."""
    ran = sorted((item for item in found.items() if "step" in item[1]), key=lambda item: -item[1]["step"])
    if not ran:
        return []
    axes = _rows([name for name, _ in ran], f"{leg.network}, {leg.model}", "ms a step")
    for row, (_, f) in enumerate(ran):
        spread = [[f["step"] - f["step_min"]], [f["step_max"] - f["step"]]]
        axes.barh(row, f["step"], GAP, xerr=spread, color="tab:blue", alpha=0.7)
        if "bound" in f:
            axes.plot([f["bound"]] * 2, [row - GAP / 2, row + GAP / 2], color="black", linewidth=2)
    axes.plot([], [], color="black", linewidth=2, label="bound: max(one process, payload / goodput)")
    axes.legend()
    return _saved(folder / f"time_{leg.network}_{leg.model}.svg")


def _memory(leg: Leg, found: Found, folder: Path) -> list[Path]:
    """At rest, and above it the peak; a mark for the formula at rest."""
    ran = sorted((item for item in found.items() if "at_rest" in item[1]), key=lambda item: -item[1]["at_rest"])
    if not ran:
        return []
    axes = _rows([name for name, _ in ran], f"{leg.network}, {leg.model}", "MiB a rank")
    end = MANY * max(f["at_rest_formula"] for _, f in ran) * MIB
    for row, (_, f) in enumerate(ran):
        rest, peak = f["at_rest"] * MIB, f["peak"] * MIB
        axes.barh(row, peak, GAP, color="tab:blue", alpha=0.3)
        axes.barh(row, rest, GAP, color="tab:blue", alpha=0.7)
        axes.plot([f["at_rest_formula"] * MIB] * 2, [row - GAP / 2, row + GAP / 2], color="black", linewidth=2)
        if peak > end:
            axes.text(end, row, f"{peak:.0f} ", ha="right", va="center")
    axes.set_xlim(0, end)
    axes.plot([], [], color="black", linewidth=2, label="ZeRO's formula at rest")
    axes.legend()
    return _saved(folder / f"memory_{leg.network}_{leg.model}.svg")


def _scaling(legs: Sequence[Leg], folder: Path) -> list[Path]:
    """Steps against one process over ranks, for contenders seen at more than one count."""
    legs = sorted(legs, key=lambda leg: leg.ranks)
    if len({leg.ranks for leg in legs}) < 2:
        return []
    found = [by_contender(leg, measured(leg)) for leg in legs]
    _, axes = pyplot.subplots(figsize=(9, 6))
    for name in dict.fromkeys(name for f in found for name in f):
        seen = [(leg.ranks, f[name]["ratio"]) for leg, f in zip(legs, found, strict=True) if "ratio" in f.get(name, {})]
        if len(seen) > 1:
            axes.plot(*zip(*seen, strict=True), STYLES.get(name.split(" ")[0], ":"), marker="o", label=name)
    axes.set_title(f"{kind_of(legs[0])}, {legs[0].model}")
    axes.set_xlabel("ranks")
    axes.set_ylabel("step / step of one process")
    axes.set_xticks([leg.ranks for leg in legs])
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _saved(folder / f"scaling_{kind_of(legs[0])}_{legs[0].model}.svg")


def _rows(names: Sequence[str], title: str, unit: str) -> Axes:
    _, axes = pyplot.subplots(figsize=(9, 1.5 + 0.35 * len(names)))
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)
    axes.set_xlabel(unit)
    return axes


def _saved(file: Path) -> list[Path]:
    pyplot.tight_layout()
    pyplot.savefig(file)
    pyplot.close()
    return [file]
