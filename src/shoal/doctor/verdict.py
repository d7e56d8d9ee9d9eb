"""What is wrong between hosts, judged from their reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from statistics import median

from shoal.doctor.advice import minor
from shoal.doctor.facts import Finding
from shoal.doctor.ways import HostReport, Reach, Way

SKEW = 0.5  # seconds between clocks that make logs hard to read side by side
SLOW = 4  # a way this many times slower than the median is named

_Ways = Mapping[tuple[str, str], Way]


def judge(hosts: Sequence[str], own: str, port: int, reports: Sequence[HostReport]) -> tuple[Finding, ...]:
    """Everything that is wrong, worst first: hosts that did not come, cut directions, versions, then doubts.

    Args:
        hosts: all names, in order.
        own: who judges.
        reports: what is known; a host that cannot be reached has none.
    """
    ways: _Ways = {(report.name, way.to): way for report in reports for way in report.ways}
    known = {report.name for report in reports}
    signs = {to for (_, to), way in ways.items() if way.meeting is Reach.OPEN or way.heard} | known
    findings = [_absent(host, own, hosts, ways.get((own, host)), port) for host in hosts if host not in signs]
    for pair in permutations([host for host in hosts if host in signs], 2):
        findings += _direction(*pair, ways, port)
    findings += _unfinished(reports, ways)
    findings += _versions(reports)
    findings += _clocks(own, ways)
    findings += _rates(ways)
    return tuple(findings)


def _absent(host: str, own: str, hosts: Sequence[str], way: Way | None, port: int) -> Finding:
    reach = way.meeting if way is not None else Reach.UNTRIED
    return Finding(
        what=f"no sign of {host} on {own}: port {port} there: {reach}, and no datagram of it came",
        remedy=f"shoal doctor --hosts {','.join(hosts)} on {host}, at the same time. If it runs there it prints more; "
        f"then a firewall drops what it sends, or {host} has another address or interface",
        fatal=True,
    )


def _arrives(sender: str, receiver: str, ways: _Ways) -> bool:
    """Whether anything shows that packets pass in this direction."""
    there, back = ways.get((sender, receiver)), ways.get((receiver, sender))
    if any(way is not None and way.meeting in (Reach.OPEN, Reach.REFUSED, Reach.STRANGER) for way in (there, back)):
        return True  # a handshake, or its refusal, passes both ways
    return (there is not None and there.heard_us) or (back is not None and back.heard)


def _direction(sender: str, receiver: str, ways: _Ways, port: int) -> Iterator[Finding]:
    """What is wrong with connecting from one host to another."""
    way, back, passes = ways.get((sender, receiver)), ways.get((receiver, sender)), _arrives(sender, receiver, ways)
    if way is None:
        if back is not None and not passes:
            yield _cut(sender, receiver)
        return
    if way.meeting is Reach.OPEN:
        if way.ephemeral not in (Reach.OPEN, Reach.UNTRIED):
            yield Finding(
                what=f"{sender} -> {receiver}: port {port} is open, but not the ephemeral ones ({way.ephemeral})",
                remedy=f"a rule of {receiver}'s firewall for the ports of sysctl net.ipv4.ip_local_port_range: gloo "
                "listens there",
                fatal=True,
            )
    elif way.meeting is Reach.NO_WAY:
        yield Finding(
            what=f"{sender} -> {receiver}: {sender} has no route there",
            remedy=f"ip route get {receiver} on {sender}; --hosts with addresses of a network that both are in",
            fatal=True,
        )
    elif way.meeting is Reach.STRANGER:
        yield Finding(
            what=f"{sender} -> {receiver}: {way.meeting} at port {port}",
            remedy="--port another one, the same on all hosts; the same version of shoal on all hosts",
            fatal=True,
        )
    elif not passes:
        if way.heard or back is not None:  # else nobody knows what arrives there; the other direction is named
            yield _cut(sender, receiver)
    elif way.meeting is Reach.REFUSED or _arrives(receiver, sender, ways):
        yield Finding(
            what=f"{sender} -> {receiver}: packets arrive, but connecting to port {port} gets: {way.meeting}",
            remedy=f"a rule of {receiver}'s firewall for TCP; on {receiver}, its name must stand for the address that "
            f"{sender} knows",
            fatal=True,
        )


def _cut(sender: str, receiver: str) -> Finding:
    return Finding(
        what=f"{sender} -> {receiver} is blocked: nothing that {sender} sends arrives at {receiver}",
        remedy=f"look at {receiver}'s firewall (iptables -L, nft list ruleset), at what lies between, and whether "
        f"{sender} sends through the right interface (ip route get)",
        fatal=True,
    )


def _unfinished(reports: Sequence[HostReport], ways: _Ways) -> Iterator[Finding]:
    done = {report.name for report in reports if report.done}
    for host in sorted({to for (_, to), way in ways.items() if way.meeting is Reach.OPEN} - done):
        yield Finding(
            what=f"{host} has not said all that it found: it left, or the time ran out",
            remedy="start it on all hosts at the same time, with a larger --timeout",
            fatal=True,
        )


def _versions(reports: Sequence[HostReport]) -> Iterator[Finding]:
    if not reports:
        return
    first, *others = reports
    wanted = dict(first.versions)
    for report in others:
        for name, version in report.versions:
            if minor(version) != minor(wanted.get(name, "")):
                yield Finding(
                    what=f"{name} is {wanted.get(name) or 'missing'} on {first.name}, {version or 'missing'} on "
                    f"{report.name}",
                    remedy="the same major and minor version on all hosts: other versions give other bits",
                    fatal=True,
                )


def _clocks(own: str, ways: _Ways) -> Iterator[Finding]:
    for (sender, to), way in ways.items():
        if sender == own and way.offset is not None and abs(way.offset) - (way.uncertainty or 0) > SKEW:
            apart = f"{abs(way.offset):.3f} s {'ahead of' if way.offset > 0 else 'behind'}"
            yield Finding(
                what=f"the clock of {to} is {apart} {own}'s", remedy="chronyc makestep, or another NTP client"
            )


def _rates(ways: _Ways) -> Iterator[Finding]:
    rates = [way.rate for way in ways.values() if way.rate]
    for (sender, to), way in ways.items():
        if way.whole and way.rate is None:
            yield Finding(what=f"{sender} -> {to} was not measured", remedy="a larger --timeout, on all hosts")
        elif way.rate and way.rate * SLOW < median(rates):
            yield Finding(
                what=f"{sender} -> {to} carries {way.rate * 8e-6:.0f} Mbit/s, the median way "
                f"{median(rates) * 8e-6:.0f}",
                remedy="ethtool on both: a port at a lower speed, a bad cable, another program that sends",
            )
