"""How verbs print."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager

import typer

from shoal.errors import ShoalError


def tell_json(value: object) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(value, default=str))


@contextmanager
def errors_told(*, as_json: bool) -> Generator[None]:
    """Print a shoal error without a traceback and exit with its code.

    Raises:
        typer.Exit: after a ShoalError.
    """
    try:
        yield
    except ShoalError as error:
        if as_json:
            tell_json({"code": error.code, "what": error.what, "cause": error.cause, "remedy": error.remedy})
        else:
            typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None
