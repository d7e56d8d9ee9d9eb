"""`shoal doctor`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

import typer

from shoal.cli.telling import errors_told, tell_json
from shoal.errors import EnvironmentFault


def doctor(
    hosts: Annotated[str | None, typer.Option(help="Names or addresses: a,b,c; run it on all of them.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where ranks meet; default MASTER_PORT.")] = None,
    own: Annotated[str | None, typer.Option("--as", help="Which of the hosts this is; default by address.")] = None,
    timeout: Annotated[float, typer.Option(min=2.0, help="Seconds after which --hosts ends.")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what shoal finds on this host, or between hosts, and what is wrong with it. For bug reports.

    With --hosts, started on each of them at the same time, it checks all pairs: ports, rate, delay, clocks and
    versions. The first host prints a table; what cannot talk is named with its direction.

    \b
    Example:
      shoal doctor > report.txt
      shoal doctor --hosts node1,node2
      srun --ntasks-per-node 1 shoal doctor --hosts node1,node2
    \b
    It prints
      rate and delay of one TCP stream, from the host of a row to that of a column; port 29500
                           node1                node2
      node1                    -  941 Mbit/s, 0.21 ms
      node2  940 Mbit/s, 0.22 ms                    -
    or
      unusable: node1 -> node2 is blocked: nothing that node1 sends arrives at node2

    Exit codes: 0 fine, 2 usage, 5 shoal cannot work here, or not between these hosts.
    """
    with errors_told(as_json=as_json):
        usable = _this_host(as_json) if hosts is None else _hosts(hosts, port, own, timeout, as_json)
    raise typer.Exit(0 if usable else EnvironmentFault.exit_code)


def _this_host(as_json: bool) -> bool:
    from shoal.doctor.report import examine
    from shoal.doctor.text import report_lines

    report = examine()
    _tell({**asdict(report), "usable": report.usable}, report_lines(report), as_json)
    return report.usable


def _hosts(hosts: str, port: int | None, own: str | None, timeout: float, as_json: bool) -> bool:
    from shoal.doctor.across import across
    from shoal.doctor.report import meeting_port
    from shoal.doctor.text import across_lines

    names = [name.strip() for name in hosts.split(",")]
    found = across(names, port=port if port is not None else meeting_port(os.environ), own=own, timeout=timeout)
    _tell({**asdict(found), "usable": found.usable}, across_lines(found), as_json)
    return found.usable


def _tell(plain: dict[str, object], lines: Iterable[str], as_json: bool) -> None:
    if as_json:
        tell_json(plain)
    else:
        typer.echo("\n".join(lines))
