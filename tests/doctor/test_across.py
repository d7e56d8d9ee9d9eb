"""All pairs of hosts, here addresses of loopback and threads."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from shoal.doctor.across import across
from shoal.doctor.ways import Across, Reach
from shoal.errors import EnvironmentFault, SettingError, ShoalError

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


def free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def together(hosts: Sequence[str], came: Sequence[str], timeout: float = 8) -> list[Across]:
    port = free_port()
    with ThreadPoolExecutor() as threads:
        started = [threads.submit(across, hosts, port=port, own=own, timeout=timeout) for own in came]
        return [one.result(timeout=30) for one in started]


def test_three_hosts_know_all_of_each_other() -> None:
    found = together(HOSTS, HOSTS)
    for one in found:
        assert one.usable
        assert [report.name for report in one.reports] == list(HOSTS)
        assert all(report.done for report in one.reports)
        ways = [(report.name, way.to) for report in one.reports for way in report.ways]
        assert ways == [(a, b) for a in HOSTS for b in HOSTS if a != b]
        for way in (way for report in one.reports for way in report.ways):
            assert (way.meeting, way.ephemeral, way.heard, way.heard_us) == (Reach.OPEN, Reach.OPEN, True, True)
            assert way.rate is not None
            assert way.rate > 1e6
            assert way.delay is not None
            assert 0 < way.delay < 1
            assert way.offset is not None
            assert way.uncertainty is not None
            assert abs(way.offset) < way.uncertainty + 0.01


def test_a_host_that_does_not_come_is_named_in_time() -> None:
    start = time.monotonic()
    first, second = together(HOSTS, HOSTS[:2], timeout=4)
    assert time.monotonic() - start < 5
    for one in (first, second):
        assert not one.usable
        assert [finding.what for finding in one.findings if finding.fatal] == [
            f"no sign of 127.0.0.3 on {one.own}: port {one.port} there: refused, and no datagram of it came"
        ]
        assert one.reports[0].ways[0].rate is not None


def test_another_program_at_the_port() -> None:
    with socket.create_server(("127.0.0.2", 0)) as stranger:
        port = stranger.getsockname()[1]

        def greet() -> None:
            while True:
                try:
                    connection = stranger.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                    connection.recv(100)

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        found = across(HOSTS[:2], port=port, own=HOSTS[0], timeout=2)
        stranger.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    (finding,) = found.findings
    assert (
        finding.what
        == f"no sign of 127.0.0.2 on 127.0.0.1: port {port} there: another program answers, and no datagram of it came"
    )


def test_strangers_do_no_harm() -> None:
    """What is not a message ends its own connection only; a report of a host that is none is dropped."""
    port, ended, start = free_port(), threading.Event(), time.monotonic()

    def disturb() -> None:
        report = {"name": "x", "versions": [], "ways": [{"to": "x", "meeting": "open"}], "edition": 99, "done": False}
        noise = [
            b"GET / HTTP/1.1\r\n\r\n", b'{"shoal doctor": 1, "do": "stream", "seconds": 1e9}\n',
            b'{"shoal doctor": 1, "do": "reports", "reports": [{"name": 3}]}\n', b'{"shoal doctor": 1, "do": "dance"}\n',
            json.dumps({"shoal doctor": 1, "do": "reports", "reports": [report]}).encode() + b"\n",
        ]  # fmt: skip
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as air:
            while not ended.wait(0.05):
                for data in noise:
                    air.sendto(data, ("127.0.0.1", port))
                    try:
                        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                            connection.sendall(data)
                    except OSError:
                        continue

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with ThreadPoolExecutor() as threads:
            started = [threads.submit(across, HOSTS[:2], port=port, own=own, timeout=20) for own in HOSTS[:2]]
            found = [one.result(timeout=30) for one in started]
    finally:
        ended.set()
        thread.join(10)
    assert time.monotonic() - start < 10  # nobody waits for it either
    for one in found:
        assert one.findings == ()
        assert [report.name for report in one.reports] == list(HOSTS[:2])


def test_a_name_that_is_loopback_here_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's 127.0.1.1. The address that leads to the others is listened at, which here is another host's."""
    addresses = {"one": "127.0.1.1", "two": "192.0.2.77"}
    monkeypatch.setattr("shoal.doctor.across.address_of", addresses.__getitem__)
    monkeypatch.setattr(socket.socket, "connect", lambda _self, _place: None)
    monkeypatch.setattr(socket.socket, "getsockname", lambda _self: ("192.0.2.78", 0))
    with pytest.raises(EnvironmentFault, match=r"one cannot listen at 192\.0\.2\.78 port 29500: "):
        across(["one", "two"], port=29500, own="one", timeout=2)


MISTAKES: dict[str, tuple[Sequence[str], str | None, type[ShoalError], str, str]] = {
    "one": (["127.0.0.1"], None, SettingError, "'127.0.0.1' does not name two or more hosts", "--hosts a,b"),
    "twice": (["127.0.0.1"] * 2, None, SettingError, "'127.0.0.1,127.0.0.1' does not name two or more hosts", "--hosts a,b"),
    "empty": (["127.0.0.1", ""], None, SettingError, "'127.0.0.1,' does not name two or more hosts", "--hosts a,b"),
    "unknown": (
        ["127.0.0.1", "no-such.invalid"], None, EnvironmentFault, "no-such.invalid: no address is known here",
        "--hosts with addresses, or mend /etc/hosts",
    ),
    "alike": (
        ["127.0.0.1", "localhost"], None, SettingError,
        "two hosts have one address: 127.0.0.1 is 127.0.0.1, localhost is 127.0.0.1", "--hosts with addresses",
    ),
    "both": (HOSTS[:2], None, SettingError, "127.0.0.1 and 127.0.0.2 are both this host", "--as 127.0.0.1, or the other one"),
    "none": (
        ["192.0.2.77", "192.0.2.78"], None, SettingError,
        "this host is none of 192.0.2.77 (192.0.2.77), 192.0.2.78 (192.0.2.78): it has ", "--as 192.0.2.77",
    ),
    "not asked": (HOSTS, "127.0.0.4", SettingError, "127.0.0.4 is none of the hosts 127.0.0.1, 127.0.0.2, 127.0.0.3", "did you mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    hosts, own, kind, what, remedy = MISTAKES[name]
    with pytest.raises(kind) as caught:
        across(hosts, port=29500, own=own, timeout=2)
    assert caught.value.what.startswith(what)
    assert caught.value.remedy.startswith(remedy)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault) as caught:
            across(HOSTS, port=port, own="127.0.0.1", timeout=2)
    assert caught.value.what == f"127.0.0.1 cannot listen at 127.0.0.1 port {port}: Address already in use"
    assert caught.value.remedy == "--port another one, the same on all hosts; --as NAME if this is another host"
