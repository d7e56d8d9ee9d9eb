"""What is wrong between hosts, judged from their reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shoal.doctor.verdict import judge
from shoal.doctor.ways import HostReport, Reach, Way

OPEN, SILENT, REFUSED, NO_WAY, STRANGER = Reach.OPEN, Reach.SILENT, Reach.REFUSED, Reach.NO_WAY, Reach.STRANGER
VERSIONS = (("python", "3.11.7"), ("torch", "2.13.0+cpu"), ("shoal", "0.1.0"))


def good(to: str) -> Way:
    return Way(
        to=to,
        meeting=OPEN,
        ephemeral=OPEN,
        heard=True,
        heard_us=True,
        rate=1e8,
        delay=1e-3,
        offset=0.01,
        uncertainty=1e-3,
    )


def bad(to: str, meeting: Reach = SILENT, *, heard: bool = False, heard_us: bool = False) -> Way:
    return Way(to=to, meeting=meeting, heard=heard, heard_us=heard_us)


def said(name: str, *ways: Way, done: bool = True, versions: tuple[tuple[str, str], ...] = VERSIONS) -> HostReport:
    return HostReport(name=name, versions=versions, ways=ways, edition=len(ways) + 1, done=done)


def blocked(sender: str, receiver: str) -> str:
    return f"{sender} -> {receiver} is blocked: nothing that {sender} sends arrives at {receiver}"


def gone(host: str, own: str, reach: Reach = SILENT) -> str:
    return f"no sign of {host} on {own}: port 29500 there: {reach}, and no datagram of it came"


def firewall(sender: str, receiver: str, reach: Reach = SILENT) -> str:
    return f"{sender} -> {receiver}: packets arrive, but connecting to port 29500 gets: {reach}"


FATAL: dict[str, tuple[Sequence[HostReport], list[str]]] = {
    "all is fine": ([said("a", good("b")), said("b", good("a"))], []),
    "absent": ([said("a", bad("b"))], [gone("b", "a")]),
    "absent, its port refuses": ([said("a", bad("b", REFUSED))], [gone("b", "a", REFUSED)]),
    "cut, seen by the sender": ([said("a", bad("b", heard=True))], [blocked("a", "b")]),
    "cut, seen by the receiver": ([said("b", bad("a", heard_us=True)), said("a", bad("b", heard=True))], [blocked("a", "b")]),
    "datagrams pass, TCP does not": ([said("a", bad("b", heard=True, heard_us=True))], [firewall("a", "b")]),
    "TCP passes one way": ([said("a", bad("b")), said("b", good("a"))], [firewall("a", "b")]),
    "another address": ([said("a", bad("b", REFUSED)), said("b", good("a"))], [firewall("a", "b", REFUSED)]),
    "a stranger": (
        [said("a", bad("b", STRANGER)), said("b", good("a"))], ["a -> b: another program answers at port 29500"],
    ),
    "no route": ([said("a", bad("b", NO_WAY, heard=True))], ["a -> b: a has no route there"]),
    "ephemeral ports": (
        [said("a", replace(good("b"), ephemeral=SILENT)), said("b", good("a"))],
        ["a -> b: port 29500 is open, but not the ephemeral ones (no answer)"],
    ),
    "cut, known through a third": (
        [said("a", bad("b"), good("c")), said("b", bad("a", heard=True), good("c")), said("c", good("a"), good("b"))],
        [blocked("b", "a")],
    ),
    "cut both ways, known through a third": (
        [said("a", bad("b"), good("c")), said("b", bad("a"), good("c")), said("c", good("a"), good("b"))],
        [blocked("a", "b"), blocked("b", "a")],
    ),
    "cut from a host without a report": (
        [said("a", bad("b"), good("c")), said("c", good("a"), replace(bad("b"), heard=True))],
        [blocked("b", "a"), blocked("c", "b")],
    ),
    "left early": (
        [said("a", good("b")), said("b", done=False)],
        ["b has not said all that it found: it left, or the time ran out"],
    ),
    "versions": (
        [said("a", good("b")), said("b", good("a"), versions=(("python", "3.11.9"), ("torch", ""), ("shoal", "0.2.0")))],
        ["torch is 2.13.0+cpu on a, missing on b", "shoal is 0.1.0 on a, 0.2.0 on b"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FATAL)
def test_what_makes_hosts_unusable(name: str) -> None:
    reports, expected = FATAL[name]
    hosts = ("a", "b", "c") if "third" in name or "without a report" in name else ("a", "b")
    found = judge(hosts, reports[0].name, 29500, reports)
    fatal = [finding.what for finding in found if finding.fatal]
    assert fatal == expected
    assert all(finding.remedy for finding in found)


DOUBTS = {
    "ahead": (replace(good("b"), offset=2.0), "the clock of b is 2.000 s ahead of a's"),
    "behind": (replace(good("b"), offset=-2.0), "the clock of b is 2.000 s behind a's"),
    "uncertain": (replace(good("b"), offset=2.0, uncertainty=1.9), None),
    "not measured": (replace(good("b"), rate=None), "a -> b was not measured"),
    "slow": (replace(good("b"), rate=2e7), "a -> b carries 160 Mbit/s, the median way 800"),
    "not so slow": (replace(good("b"), rate=3e7), None),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_what_is_doubtful(name: str) -> None:
    way, expected = DOUBTS[name]
    reports = [said("a", way, good("c")), said("b", good("a"), good("c")), said("c", good("a"), good("b"))]
    found = judge(("a", "b", "c"), "a", 29500, reports)
    assert [(finding.what, finding.fatal) for finding in found] == ([] if expected is None else [(expected, False)])
