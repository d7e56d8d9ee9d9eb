"""The hosts of tests/hosts.py: their links have the rate, delay and loss asked for, and nothing of them stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import cgroups
from tests import hosts as module
from tests.hosts import Host, Limits, Link, available, cut, goodput, hosts, mend, relay, sh

pytestmark = pytest.mark.system
ROOT = Path(__file__).parent.parent.parent
PORT = 5000

ECHO = """
import socket
listener = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
stream, _ = listener.accept()
while data := stream.recv(1):
    stream.sendall(data)
"""
PING = """
import socket, statistics, sys, time
stream = socket.create_connection((sys.argv[1], 5000), 5)
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
def trip():
    begin = time.perf_counter()
    stream.sendall(b"x")
    stream.recv(1)
    return time.perf_counter() - begin
print(statistics.median(trip() for _ in range(11)))
"""
COUNT = """
import socket, sys
inlet = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
inlet.bind(("0.0.0.0", 5000))
print("ready", flush=True)
inlet.settimeout(float(sys.argv[1]))
count = 0
try:
    while inlet.recv(100) != b"end":
        count += 1
except TimeoutError:
    pass
print(count)
"""
DROP = """
import socket, sys, time
outlet = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range(int(sys.argv[2])):
    outlet.sendto(bytes(50), (sys.argv[1], 5000))
    if i % 20 == 19:
        time.sleep(0.001)
for _ in range(20):
    outlet.sendto(b"end", (sys.argv[1], 5000))
"""
SPIN = """
import time
begin = time.perf_counter()
while time.process_time() < 0.5:
    pass
print(time.perf_counter() - begin)
"""


def start(host: Host, program: str, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", "-c", program, *args]
    return host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    return out


def serve(host: Host, program: str, *args: str) -> subprocess.Popen[str]:
    process = start(host, program, *args)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def round_trip(a: Host, b: Host) -> float:
    """Seconds, the median of some over one stream."""
    echo = serve(b, ECHO)
    seconds = float(output(start(a, PING, b.address)))
    output(echo)
    return seconds


def arrived(a: Host, b: Host, count: int, patience: float = 1.0) -> int:
    """How many of so many datagrams reach b."""
    counter = serve(b, COUNT, str(patience))
    output(start(a, DROP, b.address, str(count)))
    return int(output(counter))


def traces(tag: str) -> list[str]:
    """What is there of hosts with this tag: namespaces and cgroups."""
    spaces = [line for line in sh("ip", "netns", "list").splitlines() if line.startswith(tag)]
    groups = [str(g) for home in (cgroups.home("cpu"), cgroups.home("memory")) if home for g in home.glob(f"{tag}*")]
    return spaces + groups


@pytest.mark.parametrize("rate", [1e9, 1e8], ids=["1-gbit", "100-mbit"])
def test_a_stream_gets_the_rate(rate: float) -> None:
    with hosts(2, Link(rate=rate)) as (a, b):
        assert 0.85 <= goodput(a, b, seconds=1.0) * 8 / rate <= 1.0


@pytest.mark.parametrize("ways", [[(0, 1), (2, 1)], [(1, 0), (1, 2)]], ids=["to-one", "from-one"])
def test_two_streams_share_a_cable(ways: list[tuple[int, int]]) -> None:
    """Either way of it: to the host in the middle, and from it."""
    with hosts(3, Link(rate=1e8)) as three, ThreadPoolExecutor() as threads:
        streams = [threads.submit(goodput, three[a], three[b], 1.0) for a, b in ways]
        total = sum(stream.result(timeout=30) for stream in streams) * 8
    assert 0.7 <= total / 1e8 <= 1.25  # they do not begin and end together


def test_a_relayed_link_has_rate_and_delay() -> None:
    with hosts(2, Link(rate=1e8, delay=0.02)) as (a, b):
        assert 0.75 <= goodput(a, b, seconds=2.0) * 8 / 1e8 <= 1.0  # its beginning is slow
        assert 0.040 <= round_trip(a, b) <= 0.055


def test_a_link_without_delay_has_none() -> None:
    with hosts(2) as (a, b):
        assert round_trip(a, b) <= 0.010


@pytest.mark.parametrize("loss", [0.0, 0.2])
def test_packets_are_lost(loss: float) -> None:
    with hosts(2, Link(delay=0.001, loss=loss)) as (a, b):
        assert arrived(a, b, 3000) / 3000 == pytest.approx(1 - loss, abs=0.04 if loss else 0.0)


def test_three_relayed_hosts_reach_each_other() -> None:
    with hosts(3, Link(delay=0.001)) as (a, b, c):
        assert [arrived(x, y, 10) for x, y in ((a, b), (b, c), (c, a), (a, c))] == [10] * 4


@pytest.mark.parametrize("link", [Link(), Link(delay=0.001)], ids=["plain", "relayed"])
def test_a_cut_cable_can_be_mended(link: Link) -> None:
    with hosts(2, link) as (a, b):
        cut(a)
        assert arrived(a, b, 10, patience=0.5) == 0
        mend(a)
        assert arrived(a, b, 10) == 10


def test_sent_counts_bytes() -> None:
    with hosts(2) as (a, b):
        assert a.sent() == 0
        assert arrived(a, b, 1000) == 1000
        assert a.sent() == 1000 * (50 + 42) + 20 * (3 + 42)


def test_hosts_reach_nothing_else() -> None:
    program = "import socket; socket.create_connection(('{}', {}), 1)"
    with socket.create_server(("0.0.0.0", 0)) as listener, hosts(2) as (a, _):
        port = listener.getsockname()[1]
        for address in ("192.0.2.1", "127.0.0.1"):
            _, err = start(a, program.format(address, port)).communicate(timeout=10)
            assert "Network is unreachable" in err or "Connection refused" in err
        devices = sh("ip", "-n", a.name, "-br", "link").splitlines()
        routes = sh("ip", "-n", a.name, "route").splitlines()
    assert [line.split()[0].partition("@")[0] for line in devices] == ["lo", "eth0"]
    assert [line.split()[0] for line in routes] == ["10.77.0.0/24"]


def test_hosts_with_equal_addresses_do_not_meet() -> None:
    """Two fixtures at once: what one sends, the other does not see."""
    with hosts(2) as (a, b), hosts(2) as (c, d):
        other = serve(d, COUNT, "1.0")
        assert arrived(a, b, 10) == 10
        assert int(output(other)) == 0
        assert (a.address, b.address) == (c.address, d.address)


def test_half_a_processor_takes_twice_as_long() -> None:
    with hosts(1, limits=Limits(cpus=0.5)) as (a,):
        assert float(output(start(a, SPIN))) / 0.5 >= 1.7


def test_memory_is_capped() -> None:
    with hosts(1, limits=Limits(memory=64 << 20)) as (a,):
        assert output(start(a, "print(len(bytearray(b'x') * (16 << 20)))")) == f"{16 << 20}\n"
        hog = start(a, "bytearray(b'x') * (256 << 20)")
        _, err = hog.communicate(timeout=20)
        assert hog.returncode == -signal.SIGKILL or "MemoryError" in err


def test_a_forked_child_enters() -> None:
    def child() -> tuple[str, list[str]]:
        b.enter()
        return socket.if_indextoname(2), cgroups.OWN.read_text().splitlines()

    with hosts(2, limits=Limits(cpus=0.5, memory=256 << 20)) as (_, b):
        device, groups = forked(child)
    assert device == "eth0"
    assert sum(line.endswith(f"/{b.name}") for line in groups) == len(b.groups) > 0


def forked(work: Callable[[], object]) -> object:
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: send.send(work()))
    process.start()
    assert receive.poll(10)
    got = receive.recv()
    process.join(10)
    return got


@pytest.mark.parametrize("link", [Link(rate=1e8), Link(delay=0.01)], ids=["plain", "relayed"])
def test_an_exception_leaves_nothing(link: Link) -> None:
    links = sh("ip", "-br", "link")
    with pytest.raises(ZeroDivisionError), hosts(2, link, Limits(cpus=1, memory=1 << 30)) as (a, b):  # noqa: PT012
        left = start(a, "import time; time.sleep(100)")
        tag = a.name.rpartition("-")[0]
        assert len(traces(tag)) == 3 + len(a.groups) + len(b.groups)
        _ = 1 / 0
    left.communicate()
    assert left.returncode == -signal.SIGKILL
    assert traces(tag) == []
    assert sh("ip", "-br", "link") == links


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "sigkill"])
def test_a_killed_owner_leaves_nothing(end: signal.Signals) -> None:
    program = """
import subprocess, sys, time
from tests.hosts import *
with hosts(2, Link(delay=0.01), Limits(cpus=1, memory=1 << 30)) as (a, b):
    sleeper = b.popen([sys.executable, "-c", "import time; time.sleep(100)"])
    print(a.name.rpartition("-")[0], sleeper.pid, flush=True)
    time.sleep(100)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    tag, sleeper = owner.stdout.readline().split()
    assert len(traces(tag)) >= 3
    owner.send_signal(end)
    owner.communicate(timeout=10)
    ends = time.monotonic() + 5
    while (traces(tag) or Path(f"/proc/{sleeper}/exe").exists()) and time.monotonic() < ends:
        time.sleep(0.02)
    assert traces(tag) == []
    assert not Path(f"/proc/{sleeper}/exe").exists()


def test_a_forked_childs_end_leaves_the_hosts_to_the_parent() -> None:
    assert forked(leave_as_a_child) == [1, 0]


def leave_as_a_child() -> list[int]:
    """How much is there when a child has left the block, and when we have."""
    with hosts(1) as (mine,):
        if (child := os.fork()) == 0:
            sys.exit()
        os.waitpid(child, 0)
        between = len(traces(mine.name))
    return [between, len(traces(mine.name))]


def test_hosts_made_by_half_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fail(space: str, *_: object) -> None:
        made.extend(traces(space.removesuffix("-switch")))
        raise ZeroDivisionError

    monkeypatch.setattr(module, "shape", fail)
    with pytest.raises(ZeroDivisionError), hosts(2):
        pass
    assert len(made) == 3
    assert traces(made[0].split()[0].rpartition("-")[0]) == []


def test_what_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count=0 hosts: the switch has 1 to 250 ports"), hosts(0):
        pass
    with pytest.raises(RuntimeError, match=r"`ip -n nowhere -br link` failed: .* see tests.hosts.available"):
        sh("ip", "-n", "nowhere", "-br", "link")
    with hosts(2) as (a, b):
        cut(a)
        with pytest.raises(RuntimeError, match=rf"no stream from {a.name} to {b.name}.* is a link cut"):
            goodput(a, b, seconds=0.1)
        with pytest.raises(RuntimeError, match=r"the relay between the hosts did not start: (?s:.*)'soon'"):
            relay(a.switch, 2, Link(delay="soon"))  # type: ignore[arg-type]
        monkeypatch.setattr(module, "CLONE_NEWNET", 0x10000000)
        with pytest.raises(OSError, match=f"setns to {a.name} failed: Invalid argument"):
            a.enter()
    monkeypatch.setattr(module, "TUN", tmp_path / "tun")
    with (
        pytest.raises(RuntimeError, match=r"delay=0.01, loss=0.0: .*tun is missing: load the module"),
        hosts(2, Link(delay=0.01)),
    ):
        pass
    monkeypatch.setattr(cgroups, "MOUNTS", tmp_path / "mounts")
    with (
        pytest.raises(RuntimeError, match=r"cpus=0.5: no cgroup here can limit `cpu`; mount"),
        hosts(2, limits=Limits(cpus=0.5)),
    ):
        pass


def test_available_says_why_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert available() == ""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert available() == "network namespaces need root"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert available() == "`ip` is not on the PATH: install iproute2"
    for tool in ("ip", "tc", "bridge"):
        (tmp_path / tool).write_text("#!/bin/sh\necho not permitted >&2; exit 1\n")
        (tmp_path / tool).chmod(0o755)
    assert "failed: not permitted" in available()
