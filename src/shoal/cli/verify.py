"""`shoal verify`."""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from shoal.cli.run import plain as outcome_fields
from shoal.cli.telling import errors_told, tell_json
from shoal.errors import SettingError, ShoalError

if TYPE_CHECKING:
    from shoal.verify import Report

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def verify(
    what: Annotated[str, typer.Argument(help="A Python file, or module:function.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own: options too.")] = None,
    strategy: Annotated[str, typer.Option(help="ddp, zero1, zero2, zero3 or hybrid.")] = "zero3",
    workers: Annotated[int, typer.Option(min=1, help="Ranks of the run under test.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps that act, in each run; 3, with --plain 5.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Hold the script against itself without shoal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, all else to stderr.")] = False,
) -> None:
    """Train a few steps under a strategy and in one process, and compare all bits of the models after each.

    A script is run twice, unchanged, as by `shoal run`, and stopped after --steps steps; checkpoints that it saves are
    thrown away. A function returns (model, optimizer, loss) with loss(model, step, leaf), or a shoal.Trial; its ranks
    are threads.

    With --plain the script runs by torch alone, too. One rank and one leaf: equal bits. In float64 with the script's
    own leaves: within 1e-9 of one batch of all leaves' samples, and of torch's DDP with a rank for each leaf.

    \b
    Example:
      shoal verify train.py --epochs 3
      shoal verify --strategy zero2 --workers 4 --steps 5 train.py
      shoal verify --strategy zero1 mymodel:make_trial
      shoal verify --plain train.py
    \b
    It prints
      the same bits after each of 3 steps: 2 workers under zero3 and one process
    or the first difference
      different after step 1: '0.weight' by up to 12 ulps in 64 elements: ...

    Exit codes: 0 equal bits, 1 other bits or your program failed, 2 usage or configuration.
    """
    with errors_told(as_json=as_json):
        factory = _FACTORY.fullmatch(what) and not Path(what).is_file()
        if plain and factory:
            raise SettingError(f"{what} is no script, and --plain runs one", remedy="shoal verify --plain train.py")
        if plain:
            _plain([what, *(args or ())], strategy, workers, steps or 5, as_json=as_json)
        elif factory:
            report = _factory(what, args or [], strategy, workers, steps or 3, as_json=as_json)
        else:
            report = _script([what, *(args or ())], strategy, workers, steps or 3, as_json=as_json)
    if as_json:
        tell_json({**asdict(report), "strategy": strategy, "workers": workers})
    else:
        typer.echo(f"{report}: {_runs(workers, strategy)} and one process")
    raise typer.Exit(0 if report.equal else 1)


def _script(argv: list[str], strategy: str, workers: int, steps: int, *, as_json: bool) -> Report:
    from shoal.verify import Report, verify_script  # imports torch

    found = verify_script(argv, strategy, workers=workers, steps=steps)
    if isinstance(found, Report):
        return found
    if as_json:
        tell_json({"equal": None, **outcome_fields(found)})
    failed = _runs(workers, strategy) if len(found.ranks) == workers > 1 else "one process"
    typer.echo(f"nothing to compare: the run with {failed} failed", err=True)
    raise typer.Exit(found.exit_code)


def _plain(argv: list[str], strategy: str, workers: int, steps: int, *, as_json: bool) -> NoReturn:
    from shoal.against import verify_plain  # imports torch
    from shoal.launch.run import Outcome

    found = verify_plain(argv, strategy, workers=workers, steps=steps)
    if isinstance(found, Outcome):
        if as_json:
            tell_json({"equal": None, **outcome_fields(found)})
        typer.echo("nothing to compare: a run failed", err=True)
        raise typer.Exit(found.exit_code)
    equal = all(part.report is None or part.report.equal for part in found)
    if as_json:
        tell_json({"equal": equal, "parts": [asdict(part) for part in found], "strategy": strategy, "workers": workers})
    else:
        typer.echo("\n".join(str(part) for part in found))
    raise typer.Exit(0 if equal else 1)


def _factory(name: str, args: list[str], strategy: str, workers: int, steps: int, *, as_json: bool) -> Report:
    from shoal.verify import find_trial, verify_trial  # imports torch

    if args:
        raise SettingError(f"{name} takes no arguments: {' '.join(args)}", remedy="options come before it")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return verify_trial(find_trial(name), strategy, workers=workers, steps=steps)
    except ShoalError:
        raise
    except Exception as error:
        traceback.print_exc()
        if as_json:
            tell_json({"equal": None, "what": f"{type(error).__name__}: {error}"})
        raise typer.Exit(1) from None


def _runs(workers: int, strategy: str) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''} under {strategy}"
