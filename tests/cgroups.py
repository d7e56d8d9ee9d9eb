"""Limits of processor time and memory by cgroup, version 1 or 2."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
OWN = Path("/proc/self/cgroup")


def home(controller: str) -> Path | None:
    """Where groups with this controller can be made: in our own group or, in version 2, the nearest above it that hands it on."""
    if not (MOUNTS.exists() and OWN.exists()):
        return None
    own: dict[str, str] = {}
    for line in OWN.read_text().splitlines():
        _, names, path = line.split(":", 2)
        own |= dict.fromkeys(names.split(","), path.lstrip("/"))
    for _, at, kind, options, *_ in map(str.split, MOUNTS.read_text().splitlines()):
        ours = Path(at) / own.get(controller if kind == "cgroup" else "", "")
        if kind == "cgroup" and controller in options.split(","):
            return ours if ours.is_dir() else Path(at)  # a container may see another group's path
        if kind == "cgroup2":
            for group in (ours, *ours.parents):
                if group.is_relative_to(at) and controller in read(group / "cgroup.subtree_control").split():
                    return group
    return None


def make(name: str, *, cpus: float | None, memory: int | None) -> tuple[Path, ...]:
    """New groups with these limits; a process must join every one of them."""
    groups: dict[Path, None] = {}
    if cpus is not None:
        period = max(
            10_000, min(1_000_000, round(1000 / cpus))
        )  # us; short, but the kernel wants quotas of 1 ms or more
        quota = round(cpus * period)
        group = fresh(name, "cpu", f"cpus={cpus}")
        old = {"cpu.cfs_period_us": str(period), "cpu.cfs_quota_us": str(quota)}
        limit(group, f"cpus={cpus}", old, {"cpu.max": f"{quota} {period}"})
        groups[group] = None
    if memory is not None:
        group = fresh(name, "memory", f"memory={memory}")
        limit(group, f"memory={memory}", {"memory.limit_in_bytes": str(memory)}, {"memory.max": str(memory)})
        for swap, value in (("memory.memsw.limit_in_bytes", memory), ("memory.swap.max", 0)):
            if (group / swap).exists():
                (group / swap).write_text(str(value))
        groups[group] = None
    return tuple(groups)


def fresh(name: str, controller: str, wish: str) -> Path:
    parent = home(controller)
    if parent is None:
        raise RuntimeError(
            f"{wish}: no cgroup here can limit `{controller}`; mount version 1's controller, have version 2's handed on"
            f" (echo +{controller} > /sys/fs/cgroup/cgroup.subtree_control), or leave the limit out"
        )
    group = parent / name
    group.mkdir(exist_ok=True)
    return group


def limit(group: Path, wish: str, *versions: dict[str, str]) -> None:
    for files in versions:
        if all((group / file).exists() for file in files):
            for file, value in files.items():
                (group / file).write_text(value)
            return
    names = " or ".join(next(reversed(files)) for files in versions)
    raise RuntimeError(f"{wish}: {group} has no {names}: this kernel lacks that limit; leave it out")


def join(groups: tuple[Path, ...]) -> None:
    for group in groups:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def remove(prefix: str) -> None:
    """Remove all groups with such names; what still runs in them is killed."""
    for parent in {home("cpu"), home("memory")} - {None}:
        for group in parent.glob(f"{prefix}*"):
            ends = time.monotonic() + 5
            while group.exists() and time.monotonic() < ends:
                for pid in read(group / "cgroup.procs").split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                with suppress(OSError):  # busy until its last process is gone
                    group.rmdir()
                time.sleep(0.005)


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
