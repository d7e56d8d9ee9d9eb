"""A report as text, for people and bug reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoal.doctor.facts import Finding, Interface, Report
from shoal.doctor.ways import Across, Reach, Way


def report_lines(report: Report) -> Iterator[str]:
    """All that was found, a fact a line, what is wrong at the end."""
    rows = [*_machine(report), *_limits(report), *_ways(report)]
    wide = max(len(name) for name, _ in rows)
    yield from (f"{name:{wide}}  {value}" for name, value in rows)
    yield "environment" + ("" if report.environment else ": nothing that matters is set")
    yield from (f"  {name}={value}" for name, value in report.environment)
    yield from finding_lines(report.findings)


def finding_lines(findings: Iterable[Finding]) -> Iterator[str]:
    """What is wrong, each with its way out; or that nothing is."""
    findings = tuple(findings)
    if not findings:
        yield "nothing is wrong"
    for finding in findings:
        yield f"{'unusable' if finding.fatal else 'warning'}: {finding.what}"
        yield f"  try: {finding.remedy}"


def _machine(report: Report) -> Iterator[tuple[str, str]]:
    versions, processor, memory = report.versions, report.processor, report.memory
    quota = "no quota" if processor.quota is None else f"a quota of {processor.quota:g}"
    yield "host", f"{report.host} ({report.host_address or 'no address'})"
    yield "shoal", versions.shoal
    yield "python", versions.python
    yield "torch", f"{versions.torch} ({versions.build})" if versions.torch else "none"
    yield "system", versions.system
    yield "processor", f"{processor.model or 'unknown'} ({processor.machine}), {processor.capability or 'unknown'}"
    yield "cores", f"{processor.cores}, {processor.usable} usable, {quota}; torch takes {processor.threads} threads"
    yield "accelerator", report.accelerator
    limit = "no limit" if memory.limit is None else f"a limit of {_size(memory.limit)}"
    yield "memory", f"{_size(memory.total)}, {_size(memory.available)} available, {limit}"
    yield "swap", f"{_size(memory.swap)}, {_size(memory.swap_used)} used"


def _limits(report: Report) -> Iterator[tuple[str, str]]:
    limits, shm = report.limits, report.shm
    files = "unlimited" if limits.open_files is None else str(limits.open_files)
    locked, virtual = ("unlimited" if v is None else _size(v) for v in (limits.locked, limits.virtual))
    yield shm.path, "missing" if shm.size is None else f"{_size(shm.size)}, {_size(shm.free)} free"
    yield "limits", f"open files {files}, locked memory {locked}, virtual memory {virtual}"
    yield "clock", report.clock or "unknown"


def _ways(report: Report) -> Iterator[tuple[str, str]]:
    for interface in report.interfaces:
        yield f"interface {interface.name}", _interface(interface)
    for carrier in report.carriers:
        yield carrier.name, f"{'yes' if carrier.usable else 'no'}: {carrier.about}"
    for fact in report.fabric:
        yield "fabric", fact
    taken = "free" if report.port.free else "taken"
    between = f"; ephemeral ports {report.ephemeral[0]} to {report.ephemeral[1]}" if report.ephemeral else ""
    yield "meeting port", f"{report.port.number} {taken}{between}"


def _interface(interface: Interface) -> str:
    speed = f", {interface.speed} Mbit/s" if interface.speed else ""
    return f"{'up' if interface.up else 'down'}{speed}: {', '.join(interface.addresses) or 'no address'}"


def _size(value: int | None) -> str:
    if value is None:
        return "unknown"
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >> shift:
            return f"{value / (1 << shift):.1f} {unit}"
    return f"{value} B"


def across_lines(found: Across) -> Iterator[str]:
    """A table of all pairs, with clocks and versions, then what is wrong. Only the first host prints the table."""
    if found.own == found.hosts[0]:
        yield from _table(found)
        yield from _clock_lines(found)
        for report in found.reports:
            yield f"{report.name}: " + ", ".join(f"{name} {version or 'missing'}" for name, version in report.versions)
    else:
        yield f"{found.own}: the table is printed on {found.hosts[0]}"
    yield from finding_lines(found.findings)


def _table(found: Across) -> Iterator[str]:
    known = {report.name: report for report in found.reports}
    ways = {(a, b): known[a].way(b) if a in known else None for a in found.hosts for b in found.hosts}
    columns = {b: [b, *("-" if a == b else _cell(ways[a, b]) for a in found.hosts)] for b in found.hosts}
    left = max(map(len, found.hosts))
    yield f"rate and delay of one TCP stream, from the host of a row to that of a column; port {found.port}"
    for row, a in enumerate(["", *found.hosts]):
        cells = (f"{column[row]:>{max(map(len, column))}}" for column in columns.values())
        yield "  ".join([f"{a:{left}}", *cells])


def _cell(way: Way | None) -> str:
    if way is None:
        return "not known"
    if way.meeting is not Reach.OPEN:
        return str(way.meeting)
    if way.ephemeral is not Reach.OPEN:
        return f"ephemeral ports: {way.ephemeral}"
    if way.rate is None or way.delay is None:
        return "open"
    megabits = way.rate * 8e-6
    return f"{megabits:.{0 if megabits >= 100 else 1}f} Mbit/s, {way.delay * 1e3:.2f} ms"


def _clock_lines(found: Across) -> Iterator[str]:
    own = next((report for report in found.reports if report.name == found.own), None)
    for way in own.ways if own is not None else ():
        if way.offset is not None and way.uncertainty is not None:
            yield f"clock of {way.to}: {way.offset * 1e3:+.2f} ms, give or take {way.uncertainty * 1e3:.2f} ms"
