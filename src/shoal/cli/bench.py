"""`shoal bench`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.run import plain as outcome_fields
from shoal.cli.telling import errors_told, tell_json

if TYPE_CHECKING:
    from shoal.bench.card import Card

_WIDTH = 110  # of a card that goes to no terminal


def bench(
    script: Annotated[str, typer.Argument(help="A Python file.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own: options too.")] = None,
    workers: Annotated[int, typer.Option(help="Ranks to hold against one.")] = 2,
    strategy: Annotated[
        str | None, typer.Option(help="ddp, zero1, zero2, zero3 or hybrid; default the script's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps that act, in each run; default all of the script's.")] = None,
    leaves: Annotated[int | None, typer.Option(help="Micro-batches of one step, in both runs.")] = None,
    seed: Annotated[int | None, typer.Option(help="The job's seed.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each rank.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON, all else to stderr.")] = False,
) -> None:
    """One card for your own job: time, quality, memory and stability with several workers, against one.

    A script is run twice, unchanged, as by `shoal run`, with --workers ranks and with one. Both runs have equal leaves
    of equal samples. They end after --steps steps, or with the script, so that what it measures in the end is on the
    card: what job.evaluate, job.log and job.mean gave. Checkpoints that it saves are thrown away. The card goes to
    standard output, all else to standard error.

    \b
    Example:
      shoal bench train.py --epochs 1
      shoal bench --workers 4 --strategy zero3 --steps 50 train.py
      shoal bench --json train.py > card.json

    Exit codes: 0 there is a card, 1 your program failed, 2 usage or configuration.
    """
    from shoal.bench.runs import Failed, bench  # imports torch

    named = {"strategy": strategy, "leaves": leaves, "seed": seed, "threads": threads}
    flags = {name: value for name, value in named.items() if value is not None}
    with errors_told(as_json=as_json):
        found = bench([script, *(args or ())], workers=workers, steps=steps, flags=flags)
    if isinstance(found, Failed):
        if as_json:
            tell_json({"failed": found.run, **outcome_fields(found.outcome)})
        typer.echo(f"no card: the run with {found.run} failed", err=True)
        raise typer.Exit(found.outcome.exit_code)
    if as_json:
        tell_json(plain(found))
    else:
        _print(found)


def plain(card: Card) -> dict[str, object]:
    """A card for JSON: seconds and bytes."""
    ranks = [{**asdict(rank), "memory": rank.memory.model_dump()} for rank in card.ranks]
    return {**asdict(card), "ranks": ranks}


def _print(card: Card) -> None:
    from rich.console import Console

    from shoal.bench.text import show

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=_WIDTH)
    for part in show(card):
        console.print(part)
