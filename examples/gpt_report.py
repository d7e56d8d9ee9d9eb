"""What examples/gpt.py shows while it trains, and what it leaves behind: a picture, a page and a JSON file."""

from __future__ import annotations

import base64
import html
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

REDRAW, RELINE = 0.2, 5.0  # seconds between two pictures on a terminal, and between two lines elsewhere
KINDS = ("parameters", "masters", "gradients", "optimizer", "staging")
COLOURS = dict(zip(KINDS, ("#4269d0", "#6cc5b0", "#efb118", "#a463f2", "#97bbf5"), strict=True))
SPARKS = "▁▂▃▄▅▆▇█"


# ---------------------------------------------------------------- what is known


@dataclass(frozen=True, kw_only=True)
class Use:
    """What one rank holds between two steps, by kind, and has sent so far: bytes."""

    rank: int
    memory: dict[str, int]
    sent: int

    @property
    def held(self) -> int:
        return sum(self.memory.values())


@dataclass(kw_only=True)
class Progress:
    """How far training is. `tokens`: bytes of text in one step."""

    title: str
    steps: int
    tokens: int
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # after so many steps
    uses: list[Use] = field(default_factory=list)
    seconds: float = 0.0  # of training, evaluation left out
    mark: float = 0.0

    def resume(self) -> None:
        """Training goes on from here."""
        self.mark = time.monotonic()

    def add(self, loss: float) -> None:
        """A step is done."""
        self.losses.append(loss)
        self.seconds += time.monotonic() - self.mark
        self.resume()

    @property
    def speed(self) -> float:
        """Bytes of text per second, all ranks together."""
        return self.tokens * len(self.losses) / self.seconds if self.seconds else 0.0

    @property
    def recent(self) -> float:
        """The loss, averaged over the latest steps."""
        return smooth(self.losses)[-1] if self.losses else math.nan

    @property
    def left(self) -> float:
        """Seconds of training to come."""
        return self.seconds / max(len(self.losses), 1) * (self.steps - len(self.losses))


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The first steps here and in one process: sha256 of all parameters."""

    steps: int
    here: str
    alone: str

    @property
    def same(self) -> bool:
        return self.here == self.alone


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a run has found out. `plain`: bytes that a rank of plain data parallelism holds."""

    command: str
    strategy: str
    workers: int
    leaves: int
    parameters: int
    progress: Progress
    loss: float  # nats per byte on all held-out windows that are looked at
    held_out_bytes: int
    plain: dict[str, int]
    sample: str
    checkpoint: str
    proof: Proof
    seconds: float  # from start to end


def smooth(values: Sequence[float], memory: float = 0.95) -> list[float]:
    """A running average that forgets."""
    out: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        out.append(total / weight)
    return out


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def tell_use(folder: Path, use: Use) -> None:
    """Leave word for rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"rank-{use.rank}.new"
    beside.write_text(json.dumps(asdict(use)))
    beside.replace(folder / f"rank-{use.rank}.json")


def hear_uses(folder: Path, world: int) -> list[Use]:
    """What the ranks have told, as far as they share this folder."""
    paths = (folder / f"rank-{rank}.json" for rank in range(world))
    return [Use(**json.loads(path.read_text())) for path in paths if path.exists()]


# ---------------------------------------------------------------- while it trains


@contextmanager
def view(progress: Progress, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """What to call after each step: it draws on a terminal, prints lines elsewhere, and does nothing when quiet."""
    console = Console()
    if quiet:
        yield lambda: None
    elif console.is_terminal:
        with Live(panel(progress), console=console, auto_refresh=False, transient=True) as live:
            yield seldom(lambda: live.update(panel(progress), refresh=True), REDRAW)
    else:
        yield seldom(lambda: print(line(progress), flush=True), RELINE)


def seldom(act: Callable[[], None], seconds: float) -> Callable[[], None]:
    """The same, but not before so many seconds have passed since the last time."""
    last = -math.inf

    def acts() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            act()
            last = time.monotonic()

    return acts


def line(progress: Progress) -> str:
    p = progress
    memory = " ".join(f"{use.held / 1e6:.1f}" for use in p.uses)
    sent = megabytes(p.uses[0].sent) if p.uses else "-"
    held_out = f"  held out {p.held_out[-1][1]:.3f}" if p.held_out else ""
    return (
        f"step {len(p.losses)}/{p.steps}  loss {p.recent:.3f}{held_out}  {p.speed:,.0f} tokens/s  "
        f"memory {memory} MB  sent by rank 0 {sent}  {p.left:.0f} s left"
    )


def panel(progress: Progress) -> RenderableType:
    p = progress
    head = Table.grid(padding=(0, 2))
    left = f"{p.left:.0f} s left" if p.losses else "starts"
    head.add_row("step", f"{len(p.losses)}/{p.steps}", ProgressBar(p.steps, len(p.losses), 40), left)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("loss", f"[bold]{p.recent:.3f}[/]", f"[cyan]{sparks(p.losses)}[/]")
    facts.add_row("held out", f"[bold]{p.held_out[-1][1]:.3f}[/]" if p.held_out else "-", "[dim]nats per byte[/]")
    facts.add_row("tokens/s", f"[bold]{p.speed:,.0f}[/]", "[dim]all ranks together; a token is a byte[/]")
    return Panel(Group(head, "", facts, "", use_table(p.uses)), title=p.title, width=80)


def sparks(values: Sequence[float], width: int = 40) -> str:
    """The course of the smoothed values in one line of text."""
    smoothed = smooth(values)
    shown = [smoothed[i * len(smoothed) // width] for i in range(width)] if len(smoothed) >= width else smoothed
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    return "".join(SPARKS[int((v - low) / ((high - low) or 1.0) * (len(SPARKS) - 1))] for v in shown)


def use_table(uses: Sequence[Use], plain: Mapping[str, int] | None = None) -> Table:
    """Memory of every rank by kind, and bytes sent; last, what plain data parallelism would hold."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("memory", *KINDS, "in all", "sent"):
        table.add_column(column, justify="left" if column == "memory" else "right")
    for use in uses:
        kinds = (megabytes(use.memory.get(kind, 0)) for kind in KINDS)
        table.add_row(f"rank {use.rank}", *kinds, f"[bold]{megabytes(use.held)}[/]", megabytes(use.sent))
    if plain is not None:
        table.add_row("plain DDP", *(megabytes(plain[kind]) for kind in KINDS), megabytes(sum(plain.values())), "")
    return table


# ---------------------------------------------------------------- at the end


def plain_memory(parameters: int, precision: str) -> dict[str, int]:
    """What every rank holds under plain data parallelism with Adam, in bytes: arithmetic, not measured."""
    half = precision == "bfloat16"
    return {
        "parameters": parameters * (2 if half else 4),
        "masters": parameters * (4 if half else 0),
        "gradients": parameters * 4,
        "optimizer": parameters * 8,
        "staging": 0,
    }


def write(report: Report, out: Path) -> None:
    """`loss.png`, `report.html` (which holds the picture) and `report.json`."""
    draw_curve(report.progress, out / "loss.png")
    (out / "report.html").write_text(page(report, (out / "loss.png").read_bytes()), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")


def draw_curve(progress: Progress, path: Path) -> None:
    import matplotlib as mpl  # drawn by rank 0 only

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), dpi=150, layout="constrained")
    steps = range(1, len(progress.losses) + 1)
    axes.plot(steps, progress.losses, color=COLOURS["parameters"], alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(progress.losses), color=COLOURS["parameters"], label="learned from, smoothed")
    axes.plot(*zip(*progress.held_out, strict=True), "o-", color="#ff725c", markersize=4, label="held-out files")
    step, loss = progress.held_out[-1]
    axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(6, 0), va="center", color="#ff725c")
    axes.set(xlabel="step", ylabel="loss, nats per byte", xlim=(0, progress.steps * 1.06))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def summary(report: Report) -> RenderableType:
    """The end of the run, for the terminal."""
    r, facts = report, Table.grid(padding=(0, 2))
    facts.add_row("model", f"{r.parameters:,} parameters, {r.strategy}, {r.workers} workers, {r.leaves} leaves a step")
    p = r.progress
    facts.add_row("training", f"{len(p.losses)} steps, {p.speed:,.0f} tokens/s, {r.seconds:.0f} s in all")
    facts.add_row("held-out loss", f"[bold]{r.loss:.3f}[/] nats per byte ({r.held_out_bytes:,} bytes of unseen files)")
    facts.add_row("checkpoint", r.checkpoint)
    return Group(use_table(r.progress.uses, r.plain), "", facts, "")


def proof_lines(report: Report) -> list[str]:
    """What was to be shown."""
    proof = report.proof
    verdict = "[bold green]yes[/]" if proof.same else "[bold red]no[/]"
    return [
        f"sha256 of all parameters after {proof.steps} steps",
        f"  {report.strategy}, {report.workers} workers: {proof.here}",
        f"  one process, ddp: {proof.alone}",
        f"same bits: {verdict}",
        "",
    ]


def page(report: Report, curve: bytes) -> str:
    """One file that needs nothing else."""
    r = report
    held = max((use.held for use in r.progress.uses), default=0)
    tiles = {
        "held-out loss": (f"{r.loss:.2f}", f"nats per byte, {r.loss / math.log(2):.2f} bits"),
        "speed": (f"{r.progress.speed:,.0f}", "tokens (bytes) per second"),
        "memory per rank": (megabytes(held), f"plain data parallelism: {megabytes(sum(r.plain.values()))}"),
        "same bits": ("yes" if r.proof.same else "NO", "as in one process"),
    }
    shown = "".join(
        f"<div class=tile><span>{name}</span><b>{value}</b><small>{note}</small></div>"
        for name, (value, note) in tiles.items()
    )
    rows = [(f"rank {use.rank}", use.memory, megabytes(use.sent)) for use in r.progress.uses]
    widest = max([sum(r.plain.values()), *(use.held for use in r.progress.uses)])
    bars = "".join(bar(name, memory, widest, sent) for name, memory, sent in [*rows, ("plain DDP", r.plain, "")])
    key = "".join(f"<i style='background:{COLOURS[kind]}'></i>{kind} " for kind in KINDS)
    return PAGE.format(
        style=STYLE, tiles=shown, bars=bars, key=key, curve=base64.b64encode(curve).decode(),
        about=f"{r.parameters:,} parameters, strategy {r.strategy}, {r.workers} workers, {r.leaves} leaves a step, "
        f"{len(r.progress.losses)} steps, {r.seconds:.0f} s in all",
        sample=html.escape(r.sample), steps=r.proof.steps, here=r.proof.here, alone=r.proof.alone, workers=r.workers,
        verdict="The same bits." if r.proof.same else "DIFFERENT.", command=html.escape(r.command),
        checkpoint=html.escape(r.checkpoint), held_out=f"{r.held_out_bytes:,}",
    )  # fmt: skip


def bar(name: str, memory: Mapping[str, int], widest: int, sent: str) -> str:
    pieces = "".join(
        f"<i title='{kind}: {megabytes(memory.get(kind, 0))}' "
        f"style='background:{COLOURS[kind]};width:{100 * memory.get(kind, 0) / widest:.2f}%'></i>"
        for kind in KINDS
    )
    total = megabytes(sum(memory.values()))
    return f"<tr><th>{name}</th><td class=bar>{pieces}</td><td>{total}</td><td>{sent}</td></tr>"


STYLE = """
:root { color-scheme: light dark; --soft: #8883 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem } .tile { flex: 1 1 10rem; background: var(--soft);
border-radius: .5rem; padding: .75rem 1rem } .tile * { display: block } .tile b { font-size: 1.7rem }
img { width: 100%; background: white; border-radius: .5rem }
pre { background: var(--soft); padding: 1rem; border-radius: .5rem; overflow-x: auto; font-size: .85rem }
table { border-spacing: .75rem .25rem; width: 100% } th { text-align: left; font-weight: normal; white-space: nowrap }
td { text-align: right; white-space: nowrap } td.bar { width: 99%; text-align: left; font-size: 0 }
.bar i { display: inline-block; height: 1.1rem } .key i { display: inline-block; width: .8rem; height: .8rem;
margin: 0 .3rem 0 .8rem } code { overflow-wrap: anywhere }
"""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>A small GPT, trained by shoal</title><style>{style}</style>
<h1>A small GPT, trained by shoal</h1>
<p>It learned to continue the source text of Python's standard library, byte by byte: {about}.</p>
<div class=tiles>{tiles}</div>
<h2>Loss</h2><img alt="loss by step" src="data:image/png;base64,{curve}">
<p>In the end it was asked about {held_out} bytes of files that it never saw. Guessing blindly costs
5.55 nats per byte.</p>
<h2>Memory</h2>
<p>Bytes that each rank holds between two steps, as measured, and what it has sent; the last line is what plain data
parallelism holds by arithmetic, gradients included.</p>
<table><tr><th></th><td></td><td>memory</td><td>sent</td></tr>{bars}</table><p class=key>{key}</p>
<h2>What it writes</h2><pre>{sample}</pre>
<h2>Proof</h2>
<p>The first {steps} steps, repeated in one process. sha256 of all parameters:</p>
<p>{workers} workers: <code>{here}</code><br>one process: <code>{alone}</code><br><b>{verdict}</b></p>
<h2>Again</h2><pre>{command}</pre><p>Checkpoint: <code>{checkpoint}</code></p></html>
"""
