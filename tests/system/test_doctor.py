"""`shoal doctor --hosts` on hosts that are network namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.cli.test_main import MAIN
from tests.hosts import Host, Link, goodput, hosts

pytestmark = pytest.mark.system
SYN_TO_EPHEMERAL = "match ip protocol 6 0xff match ip dport 0x8000 0x8000 match u8 0x02 0x12 at 33"


def doctors(on: Sequence[Host], names: Sequence[Host], timeout: float = 8) -> list[tuple[int, Any]]:
    """Exit code and JSON of each host that runs it."""
    options = ["--hosts", ",".join(host.address for host in names), "--timeout", str(timeout), "--json"]
    started = [
        host.popen([*MAIN, "doctor", *options], env=dict(os.environ), stdout=subprocess.PIPE, stderr=sys.stderr)
        for host in on
    ]
    outs = [process.communicate(timeout=timeout + 12)[0] for process in started]
    return [(process.returncode, json.loads(out)) for process, out in zip(started, outs, strict=True)]


def drop(host: Host, match: str) -> None:
    """Lose packets that come in: they are sent to a device that is down."""
    for words in (
        "ip link add dead type veth peer name dead2",
        "tc qdisc add dev eth0 ingress",
        f"tc filter add dev eth0 parent ffff: protocol ip u32 {match} action mirred egress redirect dev dead",
    ):
        subprocess.run(["ip", "netns", "exec", host.name, *words.split()], check=True, timeout=20)


def wrong(found: Any) -> list[str]:
    return [finding["what"] for finding in found["findings"] if finding["fatal"]]


def test_rates_are_those_of_the_links() -> None:
    with hosts(3, Link(rate=200e6)) as three:
        plain = goodput(three[0], three[1], 1.0)
        ended = doctors(three, three)
    assert [code for code, _ in ended] == [0, 0, 0]
    ways = [way for report in ended[0][1]["reports"] for way in report["ways"]]
    assert len(ways) == 6
    for way in ways:
        assert 0.8 * plain < way["rate"] < 1.2 * plain, way
        assert abs(way["offset"]) < 0.05, way


def test_delays_are_those_of_the_links() -> None:
    with hosts(2, Link(delay=0.02)) as two:
        ended = doctors(two, two)
    for _, found in ended:
        for report in found["reports"]:
            (way,) = report["ways"]
            assert 0.04 < way["delay"] < 0.08
            assert abs(way["offset"]) < way["uncertainty"]


@pytest.mark.parametrize("came", [2, 3])
def test_a_cut_direction_is_named(came: int) -> None:
    """With three hosts, the first one knows from the third what the second one saw."""
    with hosts(3) as three:
        a, b, _ = (host.address for host in three)
        drop(three[1], f"match ip src {a}/32")
        ended = doctors(three[:came], three[:came])
    assert [code for code, _ in ended] == [5] * came
    assert wrong(ended[0][1]) == [f"{a} -> {b} is blocked: nothing that {a} sends arrives at {b}"]


def test_the_sender_of_a_cut_direction_knows_it_too() -> None:
    """The first host hears nothing; the second one, which hears the first one say so, names the direction."""
    with hosts(2) as two:
        a, b = (host.address for host in two)
        drop(two[0], f"match ip src {b}/32")
        (_, first), (_, second) = doctors(two, two)
    assert wrong(first) == [f"no sign of {b} on {a}: port 29500 there: no answer, and no datagram of it came"]
    assert wrong(second) == [f"{b} -> {a} is blocked: nothing that {b} sends arrives at {a}"]


def test_a_firewall_that_opens_the_meeting_port_only() -> None:
    with hosts(2) as two:
        a, b = (host.address for host in two)
        drop(two[1], SYN_TO_EPHEMERAL)
        ended = doctors(two, two)
    expected = [f"{a} -> {b}: port 29500 is open, but not the ephemeral ones (no answer)"]
    assert [(code, wrong(found)) for code, found in ended] == [(5, expected)] * 2


def test_a_route_that_is_missing() -> None:
    with hosts(2) as two:
        a, b = (host.address for host in two)
        subprocess.run(["ip", "-n", two[0].name, "route", "add", "unreachable", b], check=True, timeout=20)
        (code, found), _ = doctors(two, two)
    assert code == 5
    assert f"{a} -> {b}: {a} has no route there" in wrong(found)
