"""What is wrong with a host, judged from what was found."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.doctor import advice
from shoal.doctor.facts import Carrier, Finding, Port, Report, Space
from tests.doctor.reports import REPORT

PLACE = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "29500"}


def found(report: Report, **environ: str) -> list[Finding]:
    return list(advice.advice(report, environ))


def test_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert found(REPORT) == []


def carriers(name: str, about: str) -> tuple[Carrier, ...]:
    broken = Carrier(name=name, usable=False, about=about)
    return tuple(broken if carrier.name == name else carrier for carrier in REPORT.carriers)


processor, memory, limits, versions = REPORT.processor, REPORT.memory, REPORT.limits, REPORT.versions
CASES: dict[str, tuple[Report, Mapping[str, str], bool, str, str]] = {
    "torch too old": (
        replace(REPORT, versions=replace(versions, torch="2.10.1")), {}, True,
        "torch 2.10.1 is not one that shoal knows", "python -m pip install 'torch>=2.11,<2.16'",
    ),
    "torch too new": (
        replace(REPORT, versions=replace(versions, torch="2.16.0+cpu")), {}, True,
        "torch 2.16.0+cpu is not one that shoal knows", "python -m pip install 'torch>=2.11,<2.16'",
    ),
    "variables": (
        REPORT, {"RANK": "0"}, True, "RANK=0 without WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
        "shoal run --workers N script.py, or torchrun; to run alone: unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE",
    ),
    "setting": (
        REPORT, {"SHOAL_LEAFS": "2"}, True, "unknown environment variable SHOAL_LEAFS", "did you mean 'SHOAL_LEAVES'?",
    ),
    "gloo": (
        replace(REPORT, carriers=carriers("gloo", "no socket")), {}, True,
        "gloo does not work: no socket", "ip link set lo up; let processes listen and connect on 127.0.0.1",
    ),
    "gloo's choice": (
        replace(REPORT, carriers=carriers("gloo here", "no socket")), {}, False,
        "gloo finds no way to other hosts: no socket", "GLOO_SOCKET_IFNAME=NAME of an interface below that is up",
    ),
    "shared memory": (
        replace(REPORT, carriers=carriers("shared memory", "no memfd")), {}, False,
        "ranks of this host cannot share memory: no memfd",
        "run them as one user in one container; they use gloo until then",
    ),
    "quota": (
        replace(REPORT, processor=replace(processor, quota=0.5)), {}, False, "a cgroup allows 0.5 of a core",
        "a limit of at least one core for each rank: docker --cpus, resources.limits.cpu",
    ),
    "few cores": (
        replace(REPORT, processor=replace(processor, quota=1.5)),
        PLACE | {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, False,
        "2 ranks of this host share 1.5 cores", "at most 1 workers on this host",
    ),
    "threads": (
        REPORT, PLACE | {"LOCAL_WORLD_SIZE": "2"}, False,
        "OMP_NUM_THREADS is unset beside 2 ranks: other libraries take all cores in each of them",
        "export OMP_NUM_THREADS=1, or the setting threads",
    ),
    "swap": (
        replace(REPORT, memory=replace(memory, swap_used=200 << 20)), {}, False,
        "200 MiB are swapped out: steps may take many times as long", "less memory in use, or swapoff -a",
    ),
    "full shm": (
        replace(REPORT, shm=Space(path="/dev/shm", size=64 << 20, free=3 << 20)), {}, False,
        "/dev/shm has 3 MiB free: workers of data loaders pass their batches through it",
        "docker run --shm-size=8g or --ipc=host; remove what dead programs left there; num_workers=0",
    ),
    "no shm": (
        replace(REPORT, shm=Space(path="/dev/shm", size=None, free=None)), {}, False,
        "/dev/shm is missing: workers of data loaders pass their batches through it", "docker run --shm-size=8g",
    ),
    "open files": (
        replace(REPORT, limits=replace(limits, open_files=1024)), {}, False,
        "only 1024 open files are allowed: too few for many ranks and loaders' workers", "ulimit -n 65536",
    ),
    "virtual memory": (
        replace(REPORT, limits=replace(limits, virtual=1 << 30)), {}, False,
        "virtual memory is limited to 1024 MiB: torch maps much more than it uses", "ulimit -v unlimited",
    ),
    "locked memory": (
        replace(REPORT, fabric=("mlx5_0: port 1 ACTIVE 200 Gb/sec",)), {}, False,
        "only 8192 KiB may be locked: RDMA needs more", "ulimit -l unlimited",
    ),
    "loopback name": (
        replace(REPORT, host_address="127.0.1.1"), {}, False,
        "the name of this host, node1, stands for 127.0.1.1: torch's own groups, and a MASTER_ADDR of that name, "
        "cannot be reached from other hosts", "export GLOO_SOCKET_IFNAME=eth0, or mend /etc/hosts",
    ),
    "no name": (
        replace(REPORT, host_address=""), {}, False, "the name of this host, node1, stands for no address: torch's own "
        "groups, and a MASTER_ADDR of that name, cannot be reached from other hosts",
        "export GLOO_SOCKET_IFNAME=eth0, or mend /etc/hosts",
    ),
    "no such interface": (
        REPORT, {"GLOO_SOCKET_IFNAME": "ib0"}, True,
        "GLOO_SOCKET_IFNAME=ib0 is no interface of this host", "one of: eth0, eth1, lo",
    ),
    "port": (
        replace(REPORT, port=Port(number=29500, free=False)), {}, False,
        "somebody listens at port 29500 already, where ranks would meet",
        "export MASTER_PORT=another one, the same on all hosts",
    ),
    "clock": (
        replace(REPORT, clock="hpet"), {}, False,
        "the kernel reads time from hpet, which is slow: traces and timings cost more",
        "the kernel's parameter clocksource=tsc, if the processor's counter is steady",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report, environ, fatal, what, remedy = CASES[name]
    (finding,) = found(report, **environ)
    assert (finding.what, finding.fatal) == (what, fatal)
    assert finding.remedy.startswith(remedy)


def test_a_port_that_ranks_of_a_job_hold_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = replace(REPORT, port=Port(number=29500, free=False))
    assert found(report, **PLACE, LOCAL_WORLD_SIZE="1") == []


def test_fatal_ones_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = replace(REPORT, clock="hpet", processor=replace(processor, quota=0.5))
    assert [finding.fatal for finding in found(report, GLOO_SOCKET_IFNAME="ib0")] == [True, False, False]


def test_the_versions_of_torch_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())
    oldest, too_new = (".".join(map(str, version)) for version in (advice.OLDEST, advice.TOO_NEW))
    assert f"torch>={oldest},<{too_new}" in project["project"]["dependencies"]


@pytest.mark.parametrize(("text", "value"), [("2.13.0+cpu", (2, 13)), ("3.11", (3, 11)), ("", (0, 0)), ("2.x", (2, 0))])
def test_minor(text: str, value: tuple[int, int]) -> None:
    assert advice.minor(text) == value
