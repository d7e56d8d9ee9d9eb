"""`across`: all pairs of several hosts, each of which runs it at the same time."""

from __future__ import annotations

import ipaddress
import random
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from queue import Empty, Queue

from shoal.doctor.answers import Answers
from shoal.doctor.facts import Finding
from shoal.doctor.network import address_of, interfaces
from shoal.doctor.report import versions
from shoal.doctor.stream import round_trips, send_stream
from shoal.doctor.verdict import judge
from shoal.doctor.ways import Across, HostReport, Reach, Way
from shoal.doctor.wire import Line, StrangerError, connect, reach_of
from shoal.errors import EnvironmentFault, SettingError, nearest

_COMING = 0.6  # of the time: how long hosts may take to come
_PATIENCE = 0.15  # of the time: trying to reach a host that has been heard of
_ATTEMPT = 1.5  # seconds: the system sends a lost first packet again after one
_STREAMS = 0.3  # of the time: all streams out of and into one host
_PAUSE = 0.1  # seconds


def across(hosts: Sequence[str], *, port: int, own: str | None = None, timeout: float = 20.0) -> Across:
    """Check the ways between all pairs of hosts. It ends after `timeout` seconds at the latest.

    Args:
        hosts: names or addresses, in the same order on all hosts.
        port: where ranks would meet.
        own: which of them this host is; None: whichever has an address of this host.

    Raises:
        SettingError: names that cannot be, or this host is none or several of them.
        EnvironmentFault: a name without an address, or a port that is taken.
    """
    until = time.monotonic() + timeout
    addresses = _addresses(hosts)
    own = own if own is not None else _own(addresses)
    if own not in addresses:
        raise SettingError(f"{own} is none of the hosts {', '.join(hosts)}", remedy=nearest(own, hosts))
    addresses, warnings = _reachable(own, addresses)
    with Answers(own, addresses, port) as answers:
        _Look(answers, timeout, until).run()
        reports = tuple(answers.reports[name] for name in hosts if name in answers.reports)
    findings = (*judge(tuple(hosts), own, port, reports), *warnings)
    return Across(hosts=tuple(hosts), own=own, port=port, reports=reports, findings=findings)


def _addresses(hosts: Sequence[str]) -> dict[str, str]:
    if len(hosts) < 2 or len(set(hosts)) < len(hosts) or not all(hosts):
        raise SettingError(f"{','.join(hosts)!r} does not name two or more hosts", remedy="--hosts a,b")
    found = {host: address_of(host) for host in hosts}
    unknown = [host for host, address in found.items() if not address]
    if unknown:
        raise EnvironmentFault(
            f"{', '.join(unknown)}: no address is known here", remedy="--hosts with addresses, or mend /etc/hosts"
        )
    if len(set(found.values())) < len(found):
        shown = ", ".join(f"{host} is {address}" for host, address in found.items())
        raise SettingError(f"two hosts have one address: {shown}", remedy="--hosts with addresses")
    return found


def _own(addresses: dict[str, str]) -> str:
    ours = [host for host, address in addresses.items() if _is_ours(address)]
    if len(ours) == 1:
        return ours[0]
    if ours:
        raise SettingError(f"{' and '.join(ours)} are both this host", remedy=f"--as {ours[0]}, or the other one")
    known = ", ".join(a for interface in interfaces() for a in interface.addresses)
    asked = ", ".join(f"{host} ({address})" for host, address in addresses.items())
    raise SettingError(f"this host is none of {asked}: it has {known}", remedy=f"--as {next(iter(addresses))}")


def _is_ours(address: str) -> bool:
    try:
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET):
            return True
    except OSError:
        return False


def _reachable(own: str, addresses: dict[str, str]) -> tuple[dict[str, str], list[Finding]]:
    """Where to listen: a name that stands for loopback here has another address on other hosts."""
    outside = [a for a in addresses.values() if not ipaddress.ip_address(a).is_loopback]
    if not outside or not ipaddress.ip_address(addresses[own]).is_loopback:
        return addresses, []
    with socket.socket(socket.AF_INET6 if ":" in outside[0] else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((outside[0], 1))  # sends nothing: only asks the system which way it would go
        except OSError:
            return addresses, []
        better = str(probe.getsockname()[0])
    warning = Finding(
        what=f"{own} stands for {addresses[own]} on {own} itself, others reach it at {better}",
        remedy="mend /etc/hosts there, or export GLOO_SOCKET_IFNAME",
    )
    return addresses | {own: better}, [warning]


class _Look:
    """This host's look at all others: threads reach them, one after the other is measured, reports go round."""

    def __init__(self, answers: Answers, timeout: float, until: float) -> None:
        self.answers, self.until = answers, until
        self.others = [name for name in answers.addresses if name != answers.own]
        self.come_by = until - (1 - _COMING) * timeout
        self.patience = _PATIENCE * timeout
        self.window = min(1.0, _STREAMS * timeout / (2 * len(self.others)))
        self.ways: dict[str, Way] = {}
        self.reached: Queue[tuple[Way, Sequence[int]]] = Queue()
        self.told: dict[str, object] = {}  # which editions each host was told last

    def run(self) -> None:
        for name in self.others:
            threading.Thread(target=self._seek, args=(name,), daemon=True).start()
        waiting: list[Way] = []
        while time.monotonic() < self.until:
            with suppress(Empty):
                way, ports = self.reached.get(timeout=_PAUSE)
                if way.meeting is Reach.OPEN:
                    waiting.append(replace(way, ephemeral=self._ephemeral(way.to, ports)))
                else:
                    self.ways[way.to] = way
            waiting = [way for way in waiting if not self._measured(way)]
            reports = self._tell()
            if len(self.ways) == len(self.others) and self._all_said(reports):
                break
        for way in waiting:
            self.ways[way.to] = way
        self._publish()

    def _seek(self, name: str) -> None:
        self.reached.put(self._reach(name))

    def _reach(self, name: str) -> tuple[Way, Sequence[int]]:
        """Try until it answers, or was heard of for a while without answering, or does not come."""
        reach, alive, answers = Reach.SILENT, 0.0, self.answers
        while time.monotonic() < self.come_by or (alive and time.monotonic() < alive + self.patience):
            try:
                with self._line(name) as line:
                    said = line.ask(do="hello", **{"from": answers.own})
                    ports = said.get("ports")
                    if said.get("name") != name or not isinstance(ports, list):
                        raise StrangerError(f"{said.get('name')} answers for {name}")
                return self._way(name, Reach.OPEN), [int(str(port)) for port in ports]  # pyright: ignore
            except OSError as error:
                reach = reach_of(error)
            if not alive and (name in answers.came or name in answers.heard):
                alive = time.monotonic()
            if alive and time.monotonic() > alive + self.patience:
                break
            time.sleep(_PAUSE)
        return self._way(name, reach), []

    def _way(self, name: str, reach: Reach) -> Way:
        heard = self.answers.heard
        return Way(
            to=name, meeting=reach, heard=name in heard, heard_us=self.answers.own in heard.get(name, frozenset())
        )

    def _line(self, name: str, port: int | None = None) -> Line:
        addresses, meeting = self.answers.addresses, self.answers.port
        return connect(addresses[name], meeting if port is None else port, _ATTEMPT, addresses[self.answers.own])

    def _ephemeral(self, name: str, ports: Sequence[int]) -> Reach:
        for port in ports:
            try:
                with self._line(name, port) as line:
                    line.ask(do="hello", **{"from": self.answers.own})
            except OSError as error:
                return reach_of(error)
        return Reach.OPEN

    def _measured(self, way: Way) -> bool:
        """Measure delay, clock and rate; False if one of the two hosts is busy with another one."""
        if not self.answers.measuring.acquire(blocking=False):
            return False
        try:
            with self._line(way.to) as line:
                if line.ask(do="measure").get("busy") is not False:
                    time.sleep(random.uniform(0, _PAUSE))  # or two hosts ask each other in step for ever
                    return False
                delay, offset, uncertainty = round_trips(line)
                rate = send_stream(line, self.window)
            way = replace(way, rate=rate, delay=delay, offset=offset, uncertainty=uncertainty)
        except OSError:
            pass  # it has left: reported as not measured
        finally:
            self.answers.measuring.release()
        self.ways[way.to] = replace(way, heard=True, heard_us=True)
        return True

    def _publish(self) -> None:
        known = versions()
        report = HostReport(
            name=self.answers.own,
            versions=(("python", known.python), ("torch", known.torch), ("shoal", known.shoal)),
            ways=tuple(self.ways[name] for name in self.others if name in self.ways),
            edition=len(self.ways) + 1,
            done=len(self.ways) == len(self.others),
        )
        self.answers.merge([report])

    def _tell(self) -> Mapping[str, HostReport]:
        """Hand what is known to all that can be reached, as some pairs only hear of each other so; return it."""
        self._publish()
        reports = dict(self.answers.reports)
        news = {name: report.edition for name, report in reports.items()}
        for name, way in self.ways.items():
            if way.meeting is Reach.OPEN and self.told.get(name) != news and time.monotonic() < self.until:
                with suppress(OSError), self._line(name) as line:
                    line.ask(do="reports", reports=[asdict(report) for report in reports.values()])
                self.told[name] = news  # a host that does not listen any more knows all
        return reports

    def _all_said(self, reports: Mapping[str, HostReport]) -> bool:
        """Whether nobody who can be heard of has more to say."""
        linked = {way.to for report in reports.values() for way in report.ways if way.meeting is Reach.OPEN}
        expected = linked | self.answers.came | {self.answers.own}
        return all(name in reports and reports[name].done for name in expected)
