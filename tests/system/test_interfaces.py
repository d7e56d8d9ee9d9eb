"""Several interfaces of a host work together; small messages pass by large ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.hosts import Host, Link, hosts, sh
from tests.system.test_hosts import ENV, PIPES

pytestmark = pytest.mark.system
NUMEL = 1_500_000
EXCHANGE = """
import json, os, sys, time, torch
from shoal.comm.group import Group
from shoal.start import find_carrier
carrier, _ = find_carrier(20.0, "auto", interface=sys.argv[1] or None)
group = Group("world", range(2), carrier)
numel = int(sys.argv[2])
flat = torch.full((2 * numel,), float(group.rank))
group.share("vote", b"12345678")
begin = time.monotonic()
pending = group.gather("gather", flat, [0, numel, 2 * numel])
group.share("vote", b"12345678")
voted = time.monotonic() - begin
pending.wait()
assert flat.sum() == numel
print("RESULT", json.dumps([voted, time.monotonic() - begin]))
carrier.close()
"""


def start(two: list[Host], rank: int, interface: str) -> subprocess.Popen[str]:
    place = {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": two[0].address, "MASTER_PORT": "29400",
    }  # fmt: skip
    command = [sys.executable, "-c", EXCHANGE, interface, str(NUMEL)]
    return two[rank].popen(command, env=ENV | place, **PIPES)


def exchange(two: list[Host], interface: str) -> tuple[float, float]:
    """Seconds of a vote that began after a large transfer, and of that; the longer of the ranks'."""
    ranks = [start(two, rank, interface) for rank in range(2)]
    said: list[list[float]] = []
    for process in ranks:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        said.append(json.loads(out.split("RESULT")[1]))
    return max(voted for voted, _ in said), max(over for _, over in said)


def second_cable(two: list[Host], *, addresses: bool = True) -> None:
    a, b = two
    sh("ip", "link", "add", "eth1", "netns", a.name, "type", "veth", "peer", "name", "eth1", "netns", b.name)
    for place, host in enumerate(two if addresses else (), start=1):
        sh("ip", "-n", host.name, "addr", "add", f"10.78.0.{place}/24", "dev", "eth1")
        sh("ip", "-n", host.name, "link", "set", "eth1", "up")


def test_two_interfaces_share_the_load() -> None:
    with hosts(2) as two:
        second_cable(two)
        exchange(two, "eth0,eth1")
        sent = [[host.sent(device) for device in ("eth0", "eth1")] for host in two]
    for both in sent:
        assert sum(both) > 4 * NUMEL
        assert min(both) > 0.45 * 4 * NUMEL


def test_the_one_that_is_named_is_used() -> None:
    with hosts(2) as two:
        second_cable(two)
        exchange(two, "eth1")
        assert all(host.sent("eth0") < 100_000 < 4 * NUMEL < host.sent("eth1") for host in two)


def test_an_interface_without_an_address_is_named() -> None:
    with hosts(2) as two:
        second_cable(two, addresses=False)
        process = start(two, 0, "eth1")
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert (
        "shoal[E50] interface 'eth1' has no address\n  try:   the name of one that is up and has one (`shoal doctor`)"
    ) in err


def test_a_vote_passes_by_what_is_on_its_way() -> None:
    with hosts(2, Link(rate=50e6)) as two:
        voted, over = exchange(two, "")
    assert over > 0.8  # 6 MB at 50 Mbit/s
    assert voted < over / 2
