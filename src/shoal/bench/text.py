"""A card for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from shoal.bench.card import Card, Pace, Quality

_MIB = 2**20
_FIRST = 31  # width of the first column
_STARVED = 0.1  # worth a line


def show(card: Card) -> Iterator[RenderableType]:
    """The parts of a card, from the top."""
    leaves = f"{card.leaves} leaves a step" if card.leaves > 1 else "one leaf a step"
    yield Text(f"{card.script}: {card.workers} workers under {card.strategy} against one; {leaves}, {card.device}")
    yield from _time(card)
    yield from _quality(card)
    yield from _memory(card)
    yield from _stability(card)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, min_width=_FIRST, header_style="bold", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


# ---------------------------------------------------------------- time


def _time(card: Card) -> Iterator[RenderableType]:
    table = _table("time", "one worker", f"{card.workers} workers")
    both = (card.one, card.many)
    table.add_row("a step, median", *(_ms(p.median) for p in both))
    table.add_row("a step, nine of ten within", *(_ms(p.p90) for p in both))
    table.add_row("steps a second", *(f"{1 / p.median:,.2f}" for p in both))
    if all(p.samples for p in both):
        table.add_row("samples a second", *(f"{p.samples:,.0f}" for p in both))
    if all(p.tokens for p in both):
        table.add_row("tokens a second, as logged", *(f"{p.tokens:,.0f}" for p in both))
    table.add_row("speed-up", "", f"{card.speed_up:.2f}")
    table.add_row("efficiency (speed-up / workers)", "", f"{100 * card.efficiency:.0f} %")
    yield Text("")
    yield table
    yield Text(f"  of {_steps(card.one, card.many)}; the first {card.left_out} are left out{_aside(card)}")
    if card.workers > card.processors:
        yield Text(f"  {card.workers} workers share {card.processors} processors here")


def _steps(one: Pace, many: Pace) -> str:
    return f"{one.steps} steps" if one.steps == many.steps else f"{one.steps} and {many.steps} steps"


def _aside(card: Card) -> str:
    return f", and {card.many.aside} with an evaluation or a checkpoint" if card.many.aside else ""


# ---------------------------------------------------------------- quality


def _quality(card: Card) -> Iterator[RenderableType]:
    if card.steps_one != card.steps_many:
        yield Text(f"\nnot at equal samples: {card.steps_one} steps with one worker, {card.steps_many} with several")
    table = _table(f"quality after {card.first + card.steps_many} steps", "one worker", f"{card.workers} workers", "")
    for found in card.quality:
        table.add_row(_named(found, card), _value(found.one), _value(found.many), _same(same=found.same))
    sums = (f"{s[:8]}..." for s in card.sha256)
    table.add_row("sha256 of parameters, buffers", *sums, _same(same=card.same_bits))
    yield Text("")
    yield table
    if card.printed:
        yield Text(f"  the last line that both printed: {card.printed}")
    if not any(found.origin == "job.evaluate" for found in card.quality):
        yield Text("  no held-out metric: job.evaluate was not called before the runs ended")


def _named(found: Quality, card: Card) -> str:
    step = found.step_many if found.step_many is not None else found.step_one
    where = [] if found.origin == "job.evaluate" else [found.origin]
    where += [] if step == card.first + card.steps_many else [f"step {step}"]
    return (found.name or "mean") + (f" ({', '.join(where)})" if where else "")


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _same(*, same: bool) -> str:
    return "same bits" if same else "differs"


# ---------------------------------------------------------------- memory


def _memory(card: Card) -> Iterator[RenderableType]:
    device = any(rank.memory.device for rank in card.ranks)
    columns = ["predicted\nat rest", "of it to\nexchange", "predicted\nat most"]
    columns += ["process\nat start", "grew by\nat most", "at end,\nby share"]
    table = _table("\nmemory, MiB", *columns, *(["device\nat most"] if device else []))
    for rank in card.ranks:
        m = rank.memory
        name = "one worker" if rank.workers == 1 else f"rank {rank.rank} of {rank.workers}"
        grown = max(0, m.peak - m.before)
        numbers = [m.rest, m.exchange, m.most, m.before, grown, m.share, *([m.device] if device else [])]
        table.add_row(name, *(_mib(n) for n in numbers))
    yield Text("")
    yield table
    yield Text("  predicted: state, gradients, what travels. The process has activations, data and libraries, too;")
    yield Text("  by share: pages that several processes see are divided by their number")


# ---------------------------------------------------------------- stability


def _stability(card: Card) -> Iterator[RenderableType]:
    several = [rank for rank in card.ranks if rank.workers > 1]
    step = card.many.median
    columns = [
        "computes\na step",
        "waits\na step",
        "share of\nthe step",
        "longest\nwait",
        "sent\na step",
        "by\nformula",
    ]
    table = _table("\nstability", *columns)
    for rank in several:
        table.add_row(
            f"rank {rank.rank} of {rank.workers}", _ms(rank.computing), _ms(rank.waiting),
            f"{100 * rank.waiting / step:.0f} %", _ms(rank.longest), f"{_mib(rank.sent)} MiB",
            f"{_mib(rank.formula)} MiB",
        )  # fmt: skip
    yield Text("")
    yield table
    if card.slowest is None:
        yield Text(f"  skew: ranks keep pace; their computing is {_ms(card.apart)} apart in a step (median)")
    else:
        late = f"rank {card.slowest} is the slowest; ranks' computing is {_ms(card.apart)} apart in a step (median)"
        yield Text(f"  skew: {late}")
    worst = max(several, key=lambda rank: rank.longest)
    yield Text(f"  the longest wait: {_ms(worst.longest)}, rank {worst.rank} in step {worst.at_step} ('{worst.at}')")
    if any(rank.sent < 0.99 * rank.formula for rank in several):
        yield Text(
            "  less than by formula: ranks of one host see each other's memory, and units may stay for their next use"
        )
    resumed = f"; both went on from step {card.first} of a checkpoint" if card.first else ""
    starved = max(card.ranks, key=lambda rank: rank.starved)
    if starved.starved > _STARVED:
        share = f"{100 * starved.starved:.0f} % of its time in the run with {_workers(starved.workers)}"
        yield Text(f"  processors are busy: rank {starved.rank} waited for one {share}")
    yield Text(f"  failures: none; restarts: none{resumed}")


def _workers(count: int) -> str:
    return f"{count} workers" if count > 1 else "one worker"


def _ms(seconds: float) -> str:
    ms = 1000 * seconds
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def _mib(nbytes: float) -> str:
    return f"{nbytes / _MIB:,.2f}" if nbytes < 100 * _MIB else f"{nbytes / _MIB:,.0f}"
