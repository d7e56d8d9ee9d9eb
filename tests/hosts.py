"""Hosts on one machine: network namespaces joined by a switch, with shaped links and limited processors and memory.

Note: what is where. Each host has a device `eth0`; its other end, `port<i>`, is in a namespace of the switch. Ports share one bridge;
with delay or loss each has a bridge of its own with a device `tap<i>`, and `relay.py` carries frames between those. Rates
are shaped at both ends of a cable, so each way of it. As nothing is outside these namespaces, fixtures may use the same addresses
at the same time, and removing the namespaces removes everything but the cgroups. Hardware addresses are set and known to all from the
start, and IPv6 is silent: nothing travels but what programs send.

Note: the guard. A process apart waits for the end of this one and removes what it left, even after SIGKILL.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import cgroups

ROOT = Path(__file__).parent.parent
TUN = Path("/dev/net/tun")
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The cable of every host. `delay` and `loss` are those of a packet from host to host."""

    rate: float | None = None  # bit/s each way; None: as fast as the machine
    delay: float = 0.0  # seconds one way
    loss: float = 0.0  # probability

    @property
    def relayed(self) -> bool:
        return self.delay > 0 or self.loss > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the processes of one host may use together."""

    cpus: float | None = None
    memory: int | None = None  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A namespace and its cgroups."""

    name: str
    address: str
    port: str  # its end in the switch
    switch: str
    groups: tuple[Path, ...]
    started: list[subprocess.Popen[Any]] = field(default_factory=list, repr=False)

    def popen(
        self, args: Sequence[str], *, env: Mapping[str, str] | None = None, **kwargs: Any
    ) -> subprocess.Popen[Any]:
        """Start a program here; its process id is the program's own. It is killed when the hosts are removed."""
        joins = [f"echo $$ > {shlex.quote(str(group / 'cgroup.procs'))}" for group in self.groups]
        # cgroups first: `ip netns exec` mounts another /sys.
        script = " && ".join([*joins, f'exec {shutil.which("ip")} netns exec {self.name} "$@"'])
        self.started.append(subprocess.Popen(["/bin/sh", "-c", script, "sh", *args], env=env, **kwargs))
        return self.started[-1]

    def enter(self) -> None:
        """Move the calling process, a forked child with one thread, to this host."""
        cgroups.join(self.groups)
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/var/run/netns/{self.name}") as space:
            if libc.setns(space.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns to {self.name} failed: {os.strerror(ctypes.get_errno())}")

    def sent(self, device: str = "eth0") -> int:
        """Bytes that its link has sent, headers included."""
        (found,) = json.loads(sh("ip", "-n", self.name, "-s", "-j", "link", "show", "dev", device))
        return found["stats64"]["tx"]["bytes"]


def sh(*args: str, lines: Sequence[str] = ()) -> str:
    done = subprocess.run(args, input="\n".join(lines), text=True, capture_output=True, timeout=20)
    if done.returncode != 0:
        raise RuntimeError(f"`{shlex.join(args)}` failed: {done.stderr.strip()}; see tests.hosts.available()")
    return done.stdout


def available() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "bridge"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not on the PATH: install iproute2"
    name = f"shoal-{uuid.uuid4().hex[:8]}-probe"
    try:
        sh("ip", "netns", "add", name)
        sh("ip", "netns", "del", name)
    except RuntimeError as error:
        return str(error)
    return ""


@contextmanager
def hosts(count: int, link: Link = Link(), limits: Limits = Limits()) -> Iterator[list[Host]]:
    """Hosts that reach each other and nothing else. At the end all that runs on them is killed and everything removed."""
    if not 1 <= count <= 250:
        raise ValueError(f"count={count} hosts: the switch has 1 to 250 ports")
    if link.relayed and not TUN.exists():
        raise RuntimeError(
            f"delay={link.delay}, loss={link.loss}: {TUN} is missing: load the module `tun`, or set both to 0"
        )
    tag, owner = f"shoal-{uuid.uuid4().hex[:8]}", os.getpid()
    guard = subprocess.Popen(
        [sys.executable, "-m", "tests.hosts", str(owner), tag], cwd=ROOT, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    started: list[subprocess.Popen[Any]] = [guard]
    try:
        made = build(tag, count, link, limits, started)
        yield made
    finally:
        if os.getpid() == owner:  # a forked child must not remove its parent's hosts
            sweep(tag)
            guard.kill()
            for process in started:
                process.wait(timeout=10)


def build(tag: str, count: int, link: Link, limits: Limits, started: list[subprocess.Popen[Any]]) -> list[Host]:
    switch = f"{tag}-switch"
    made: list[Host] = []
    for i in range(1, count + 1):
        groups = cgroups.make(f"{tag}-{i}", cpus=limits.cpus, memory=limits.memory)
        host = Host(
            name=f"{tag}-{i}", address=f"10.77.0.{i}", port=f"port{i}", switch=switch, groups=groups, started=started
        )
        made.append(host)
    spaces = [f"netns add {name}" for name in (switch, *(host.name for host in made))]
    cables = [f"link add eth0 netns {host.name} type veth peer name {host.port} netns {switch}" for host in made]
    sh("ip", "-batch", "-", lines=[*spaces, *cables])
    build_switch(switch, count, link)
    for i, host in enumerate(made, start=1):
        others = [j for j in range(1, count + 1) if j != i]
        plug = [
            "link set lo up",
            f"link set eth0 address {hardware(i)} mtu {mtu(link)} addrgenmode none",
            f"addr add {host.address}/24 dev eth0",
            "link set eth0 up",
            *(f"neigh add 10.77.0.{j} lladdr {hardware(j)} dev eth0 nud permanent" for j in others),
        ]
        sh("ip", "-n", host.name, "-batch", "-", lines=plug)
        shape(host.name, ["eth0"], link)
    if link.relayed:
        started.append(relay(switch, count, link))
    return made


def build_switch(switch: str, count: int, link: Link) -> None:
    """Ports on one bridge, or each beside a tap on a bridge of its own."""
    lines: list[str] = []
    for i in range(1, count + 1):
        bridge = f"bridge{i if link.relayed else ''}"
        if link.relayed or i == 1:
            lines.append(f"link add {bridge} type bridge mcast_snooping 0")
            lines.append(f"link set {bridge} addrgenmode none up")
        members = [f"port{i}"]
        if link.relayed:
            lines.append(f"tuntap add dev tap{i} mode tap")
            members.append(f"tap{i}")
        lines += [f"link set {member} master {bridge} mtu {mtu(link)} addrgenmode none up" for member in members]
    sh("ip", "-n", switch, "-batch", "-", lines=lines)
    shape(switch, [f"port{i}" for i in range(1, count + 1)], link)


def hardware(i: int) -> str:
    return f"02:00:00:00:00:{i:02x}"


def mtu(link: Link) -> int:
    """Few large packets where Python carries each: the relay takes its processor time from the hosts."""
    return 9000 if link.relayed else 1500


def shape(space: str, devices: Sequence[str], link: Link) -> None:
    if link.rate is None:
        return
    burst = max(
        128 * 1024, round(link.rate / 8 * 0.001)
    )  # a whole segment of TCP's offload, and what a late timer misses
    limit = max(256 * 1024, round(link.rate / 8 * 0.02)) + burst  # 20 ms wait at most
    wish = f"root tbf rate {round(link.rate)}bit burst {burst} limit {limit}"
    sh("tc", "-n", space, "-batch", "-", lines=[f"qdisc add dev {device} {wish}" for device in devices])


def relay(switch: str, count: int, link: Link) -> subprocess.Popen[Any]:
    program = [sys.executable, str(Path(__file__).with_name("relay.py")), str(link.delay), str(link.loss), str(count)]
    process = subprocess.Popen(
        ["ip", "netns", "exec", switch, *program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    with process.stdout as lines:
        said = lines.readline().decode()
        if said != "ready\n":
            said += lines.read().decode()
            process.wait()
            raise RuntimeError(f"the relay between the hosts did not start: {said}")
    return process


def cut(host: Host) -> None:
    """Pull the cable out of the switch; the host's own device stays up, as with a fault further on."""
    sh("bridge", "-n", host.switch, "link", "set", "dev", host.port, "state", "0")


def mend(host: Host) -> None:
    sh("bridge", "-n", host.switch, "link", "set", "dev", host.port, "state", "3")


RECEIVE = """
import signal, socket, sys, time
signal.alarm(int(float(sys.argv[1])) + 10)
listener = socket.create_server(("0.0.0.0", 0))
listener.settimeout(3)
print(listener.getsockname()[1], flush=True)
stream, _ = listener.accept()
stream.settimeout(5)
space = bytearray(1 << 20)
stream.recv_into(space)
begin = now = time.perf_counter()
got = 0
while now < begin + float(sys.argv[1]):
    new = stream.recv_into(space)
    if not new:
        sys.exit("the sender ended")
    got += new
    now = time.perf_counter()
print(got / (now - begin), flush=True)
"""
SEND = """
import socket, sys
stream = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
block = bytes(1 << 18)
while True:
    stream.sendall(block)
"""


def goodput(a: Host, b: Host, seconds: float = 2.0) -> float:
    """Bytes per second that one plain TCP stream from `a` brings to a program on `b`."""
    python = [sys.executable, "-I", "-S", "-c"]
    receiver = b.popen([*python, RECEIVE, str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    sender = None
    try:
        port = receiver.stdout.readline().strip()
        sender = a.popen([*python, SEND, b.address, port], stderr=subprocess.DEVNULL)
        out, err = receiver.communicate(timeout=seconds + 20)
    finally:
        for process in (receiver, sender):
            if process is not None:
                process.kill()
                process.wait()
    if receiver.returncode != 0:
        raise RuntimeError(
            f"no stream from {a.name} to {b.name}, exit status {receiver.returncode}: is a link cut? {err}"
        )
    return float(out)


def sweep(tag: str) -> None:
    """Kill what runs on the hosts with this tag and remove them. Nothing but the tag is known after an accident."""
    names = [line.split()[0] for line in sh("ip", "netns", "list").splitlines() if line.startswith(f"{tag}-")]
    for name in names:
        ends = time.monotonic() + 5
        while (pids := sh("ip", "netns", "pids", name).split()) and time.monotonic() < ends:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    for name in names:
        sh("ip", "netns", "del", name)
    cgroups.remove(f"{tag}-")


def keep_guard(owner: int, tag: str) -> None:
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(owner)], [], [])
    for _ in range(2):  # the owner's last command may outlive it
        sweep(tag)
        time.sleep(0.5)


if __name__ == "__main__":
    keep_guard(int(sys.argv[1]), sys.argv[2])
