"""`shoal run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from shoal.cli.telling import errors_told, tell_json
from shoal.errors import SettingError
from shoal.launch.run import Outcome, launch


def run(
    script: Annotated[str, typer.Argument(help="A Python file.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own: options too.")] = None,
    workers: Annotated[int, typer.Option(help="How many ranks to start on this host.")] = 1,
    strategy: Annotated[str | None, typer.Option(help="ddp, zero1, zero2, zero3 or hybrid.")] = None,
    leaves: Annotated[int | None, typer.Option(help="Micro-batches of one step.")] = None,
    seed: Annotated[int | None, typer.Option(help="The job's seed.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each rank.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds without progress after which a job ends.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting.")] = None,
    run_dir: Annotated[str | None, typer.Option(help="Where logs go; none: keep nothing.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON, all else to stderr.")] = False,
) -> None:
    """Run a script with several workers on this host. What follows the script belongs to it.

    \b
    Example:
      shoal run --workers 2 --strategy zero3 train.py --epochs 3
    """
    named = {
        "strategy": strategy,
        "leaves": leaves,
        "seed": seed,
        "threads": threads,
        "precision": precision,
        "timeout": timeout,
        "run_dir": run_dir,
    }
    with errors_told(as_json=as_json):
        flags = _flags({name: value for name, value in named.items() if value is not None}, setting or ())
        outcome = launch([script, *(args or ())], workers=workers, flags=flags, keep_stdout=as_json)
    if as_json:
        tell_json(plain(outcome))
    raise typer.Exit(outcome.exit_code)


def _flags(named: dict[str, object], settings: Sequence[str]) -> dict[str, object]:
    """All settings that the command line names.

    Raises:
        SettingError: a `--set` without a value, or a setting that is named twice.
    """
    flags = dict(named)
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"--set {text} has no value", remedy=f"--set {text}=VALUE")
        if name in flags:
            raise SettingError(f"{name} is given twice: {flags[name]} and {value}", remedy="leave one of them out")
        flags[name] = value
    return flags


def plain(outcome: Outcome) -> dict[str, object]:
    """An outcome for JSON."""
    ranks = [
        {
            "rank": end.rank,
            "exit_code": end.code,
            "end": str(end),
            "failure": end.failure.model_dump() if end.failure else None,
        }
        for end in outcome.ranks
    ]
    return {"exit_code": outcome.exit_code, "run_dir": outcome.run_dir, "ranks": ranks}
