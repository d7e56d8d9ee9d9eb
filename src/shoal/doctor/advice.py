"""What is wrong with a host, judged from what was found."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping

from shoal.doctor.facts import Finding, Report
from shoal.doctor.system import number
from shoal.errors import ShoalError
from shoal.launch.place import find_place
from shoal.settings import resolve

OLDEST, TOO_NEW = (2, 11), (2, 16)  # of torch, as pyproject.toml says
FEW_FILES = 1024  # a rank holds two or three connections to every other one, and a loader's workers pass files
SMALL_SHM = 64 << 20  # what containers get unless they ask
LITTLE_LOCKED = 64 << 20
MUCH_SWAP = 64 << 20
GOOD_CLOCKS = frozenset({"", "tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "xen", "arch_sys_counter", "timebase"})


def advice(report: Report, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Findings, the fatal ones first."""
    found = [*_versions(report), *_variables(environ), *_carriers(report), *_processor(report, environ)]
    found += [*_memory(report), *_limits(report), *_names(report, environ), *_clock(report)]
    return iter(sorted(found, key=lambda finding: not finding.fatal))


def _versions(report: Report) -> Iterator[Finding]:
    version = report.versions.torch
    if version and not OLDEST <= minor(version) < TOO_NEW:
        oldest, too_new = (".".join(map(str, v)) for v in (OLDEST, TOO_NEW))
        yield Finding(
            what=f"torch {version} is not one that shoal knows",
            remedy=f"python -m pip install 'torch>={oldest},<{too_new}'",
            fatal=True,
        )


def _variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        find_place(environ)
    except ShoalError as error:
        yield Finding(what=error.what, remedy=error.remedy, fatal=True)
    try:
        resolve({}, environ=environ, cwd=".")
    except ShoalError as error:
        yield Finding(what=error.what, remedy=error.remedy, fatal=True)


def _carriers(report: Report) -> Iterator[Finding]:
    works = {carrier.name: carrier for carrier in report.carriers}
    if "gloo" in works and not works["gloo"].usable:
        yield Finding(
            what=f"gloo does not work: {works['gloo'].about}",
            remedy="ip link set lo up; let processes listen and connect on 127.0.0.1",
            fatal=True,
        )
    elif "gloo here" in works and not works["gloo here"].usable:
        yield Finding(
            what=f"gloo finds no way to other hosts: {works['gloo here'].about}",
            remedy="GLOO_SOCKET_IFNAME=NAME of an interface below that is up",
        )
    if "shared memory" in works and not works["shared memory"].usable:
        yield Finding(
            what=f"ranks of this host cannot share memory: {works['shared memory'].about}",
            remedy="run them as one user in one container; they use gloo until then",
        )


def _processor(report: Report, environ: Mapping[str, str]) -> Iterator[Finding]:
    processor, ranks = report.processor, number(environ.get("LOCAL_WORLD_SIZE", "")) or 1
    room = processor.usable if processor.quota is None else min(processor.quota, processor.usable)
    if processor.quota is not None and processor.quota < 1:
        yield Finding(
            what=f"a cgroup allows {processor.quota:g} of a core",
            remedy="a limit of at least one core for each rank: docker --cpus, resources.limits.cpu",
        )
    elif room < ranks:
        yield Finding(
            what=f"{ranks} ranks of this host share {room:g} cores", remedy=f"at most {int(room)} workers on this host"
        )
    if ranks > 1 and not environ.get("OMP_NUM_THREADS"):
        yield Finding(
            what=f"OMP_NUM_THREADS is unset beside {ranks} ranks: other libraries take all cores in each of them",
            remedy="export OMP_NUM_THREADS=1, or the setting threads",
        )


def _memory(report: Report) -> Iterator[Finding]:
    memory, shm = report.memory, report.shm
    if memory.swap_used is not None and memory.swap_used > MUCH_SWAP:
        yield Finding(
            what=f"{memory.swap_used >> 20} MiB are swapped out: steps may take many times as long",
            remedy="less memory in use, or swapoff -a",
        )
    if shm.free is None or shm.free < SMALL_SHM:
        has = "is missing" if shm.free is None else f"has {shm.free >> 20} MiB free"
        yield Finding(
            what=f"{shm.path} {has}: workers of data loaders pass their batches through it",
            remedy="docker run --shm-size=8g or --ipc=host; remove what dead programs left there; num_workers=0",
        )


def _limits(report: Report) -> Iterator[Finding]:
    limits = report.limits
    if limits.open_files is not None and limits.open_files <= FEW_FILES:
        yield Finding(
            what=f"only {limits.open_files} open files are allowed: too few for many ranks and loaders' workers",
            remedy="ulimit -n 65536",
        )
    if limits.virtual is not None:
        yield Finding(
            what=f"virtual memory is limited to {limits.virtual >> 20} MiB: torch maps much more than it uses",
            remedy="ulimit -v unlimited",
        )
    if any(": port " in fact for fact in report.fabric) and limits.locked is not None and limits.locked < LITTLE_LOCKED:
        yield Finding(
            what=f"only {limits.locked >> 10} KiB may be locked: RDMA needs more", remedy="ulimit -l unlimited"
        )


def _names(report: Report, environ: Mapping[str, str]) -> Iterator[Finding]:
    outside = [i.name for i in report.interfaces if i.up and not all(map(_loops, i.addresses))]
    if outside and (not report.host_address or _loops(report.host_address)) and "GLOO_SOCKET_IFNAME" not in environ:
        stands = f"stands for {report.host_address}" if report.host_address else "stands for no address"
        yield Finding(
            what=f"the name of this host, {report.host}, {stands}: torch's own groups, and a "
            "MASTER_ADDR of that name, cannot be reached from other hosts",
            remedy=f"export GLOO_SOCKET_IFNAME={outside[0]}, or mend /etc/hosts",
        )
    known = [interface.name for interface in report.interfaces]
    asked = [name for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    for name in asked:
        if name not in known:
            yield Finding(
                what=f"GLOO_SOCKET_IFNAME={name} is no interface of this host",
                remedy=f"one of: {', '.join(known)}",
                fatal=True,
            )
    if not report.port.free and not environ.get("RANK"):
        yield Finding(
            what=f"somebody listens at port {report.port.number} already, where ranks would meet",
            remedy="export MASTER_PORT=another one, the same on all hosts",
        )


def _clock(report: Report) -> Iterator[Finding]:
    if report.clock not in GOOD_CLOCKS:
        yield Finding(
            what=f"the kernel reads time from {report.clock}, which is slow: traces and timings cost more",
            remedy="the kernel's parameter clocksource=tsc, if the processor's counter is steady",
        )


def minor(version: str) -> tuple[int, int]:
    """`(2, 13)` of "2.13.0+cpu"; (0, 0) of what is no version."""
    parts = version.split(".")
    numbers = [int(part) if part.isdigit() else 0 for part in parts[:2]]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def _loops(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback
