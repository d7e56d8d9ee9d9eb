"""What the system says about itself, in files. `root` stands for `/`, so that tests can hand in other hosts."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from shoal.doctor.facts import Limits, Memory, Port, Space

ROOT = Path("/")
_ENDLESS = 1 << 60  # version 1 of cgroups says "no limit" with a number near 2**63
_OURS = ("SHOAL_", "GLOO_", "NCCL_", "TORCH_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "KMP_", "UCX_")
_NAMED = frozenset(
    (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
        "MKL_NUM_THREADS", "GOMP_CPU_AFFINITY", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD",
    )
)  # fmt: skip
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "JWT", "_KEY", "CREDENTIAL")


def text(path: Path) -> str:
    """The file's content without blanks around it, "" if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def number(text: str) -> int | None:
    """A whole number, or None."""
    return int(text) if text.lstrip("-").isdigit() else None


def processor_model(root: Path = ROOT) -> str:
    """What the processor calls itself, "" if it does not."""
    pairs = (line.partition(":") for line in text(root / "proc/cpuinfo").splitlines())
    known = {name.strip(): value.strip() for name, _, value in pairs}
    return known.get("model name") or known.get("Model") or known.get("CPU part", "")


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that cgroups allow, over all groups above this process."""
    quotas: list[float] = []
    for group in _groups("cpu", root):
        whole, _, period = text(group / "cpu.max").partition(" ")  # version 2
        if not period:
            whole, period = text(group / "cpu.cfs_quota_us"), text(group / "cpu.cfs_period_us")
        allowed, every = number(whole), number(period)
        if allowed is not None and allowed > 0 and every:
            quotas.append(allowed / every)
    return min(quotas, default=None)


def memory(root: Path = ROOT) -> Memory:
    """Memory and swap of the host, and the least limit of the cgroups above this process."""
    lines = (line.split() for line in text(root / "proc/meminfo").splitlines())
    sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1 and words[1].isdigit()}
    swap, free = sizes.get("SwapTotal"), sizes.get("SwapFree")
    bounds = (
        number(text(g / name)) for g in _groups("memory", root) for name in ("memory.max", "memory.limit_in_bytes")
    )
    return Memory(
        total=sizes.get("MemTotal"),
        available=sizes.get("MemAvailable"),
        limit=min((bound for bound in bounds if bound is not None and bound < _ENDLESS), default=None),
        swap=swap,
        swap_used=swap - free if swap is not None and free is not None else None,
    )


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Directories of the cgroups that bound this process, the innermost first: version 1's and version 2's."""
    inside: dict[str, str] = {}
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        inside |= dict.fromkeys(controllers.split(","), path)
    for line in text(root / "proc/self/mountinfo").splitlines():
        about, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        wanted = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if wanted is None or wanted not in inside or (wanted and wanted not in options.split(" ")[-1].split(",")):
            continue
        shown, place = about.split(" ")[3:5]
        path = PurePosixPath(inside[wanted])
        below = path.relative_to(shown) if path.is_relative_to(shown) else PurePosixPath()  # a container's own view
        mount = root / place.lstrip("/")
        yield from (mount / part for part in (below, *below.parents))


def space(path: str = "/dev/shm") -> Space:
    """How large a file system is and how much of it is free."""
    try:
        found = os.statvfs(path)
    except OSError:
        return Space(path=path, size=None, free=None)
    return Space(path=path, size=found.f_blocks * found.f_frsize, free=found.f_bavail * found.f_frsize)


def limits() -> Limits:
    """What `ulimit -n`, `-l` and `-v` say."""
    kinds = (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_AS)
    soft = [resource.getrlimit(kind)[0] for kind in kinds]
    files, locked, virtual = (None if value == resource.RLIM_INFINITY else value for value in soft)
    return Limits(open_files=files, locked=locked, virtual=virtual)


def clock_source(root: Path = ROOT) -> str:
    """What the kernel reads time from."""
    return text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource")


def ephemeral_ports(root: Path = ROOT) -> tuple[int, int] | None:
    """First and last port that the system hands out: gloo listens on such."""
    words = text(root / "proc/sys/net/ipv4/ip_local_port_range").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else None


def port_state(wanted: int) -> Port:
    """Whether nobody listens at a port of this host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just been closed is free
        try:
            probe.bind(("", wanted))
        except OSError:
            return Port(number=wanted, free=False)
    return Port(number=wanted, free=True)


def environment(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Variables that matter here, in order. Values that may be secrets are not shown."""
    return tuple(
        (name, "(hidden)" if any(word in name for word in _SECRET) else value)
        for name, value in sorted(environ.items())
        if name in _NAMED or name.startswith(_OURS)
    )


def fabric(root: Path = ROOT) -> tuple[str, ...]:
    """What the system says about InfiniBand and GPUDirect RDMA. Nothing is run."""
    devices = sorted((root / "sys/class/infiniband").glob("*"))
    facts = [f"{device.name}: {_ports(device)}" for device in devices]
    peermem = next((name for name in ("nvidia_peermem", "nv_peer_mem") if (root / "sys/module" / name).exists()), None)
    if devices:
        found = f"{peermem} is loaded" if peermem else "neither nvidia_peermem nor nv_peer_mem is loaded"
        facts.append(f"GPUDirect RDMA: {found}" + ("" if peermem else "; NCCL may still use DMA-BUF"))
    else:
        facts.append("no InfiniBand or RoCE device: between hosts NCCL would use TCP")
    return tuple(facts)


def _ports(device: Path) -> str:
    ports = sorted((device / "ports").glob("*"))
    return ", ".join(f"port {p.name} {text(p / 'state').split(': ')[-1]} {text(p / 'rate')}" for p in ports)
