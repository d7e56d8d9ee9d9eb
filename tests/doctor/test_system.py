"""What the system says about itself, on hosts that are directories."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from shoal.doctor import system
from shoal.doctor.facts import Limits, Memory, Space

V2_MOUNT = "30 1 0:26 {shown} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "32 31 0:29 {shown} /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {shown} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
V1_OWN = "9:name=systemd:/\n4:memory:/docker/x\n1:cpu,cpuacct:/docker/x\n0::/\n"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CGROUPS = {
    "none": ({}, None, None),
    "v2": (
        {
            "proc/self/cgroup": "0::/user/job\n", "proc/self/mountinfo": V2_MOUNT.format(shown="/"),
            "sys/fs/cgroup/user/job/cpu.max": "150000 100000\n", "sys/fs/cgroup/user/job/memory.max": "max\n",
            "sys/fs/cgroup/user/memory.max": "1048576\n",
        }, 1.5, 1 << 20,
    ),
    "v2, the group above allows less": (
        {
            "proc/self/cgroup": "0::/user/job\n", "proc/self/mountinfo": V2_MOUNT.format(shown="/"),
            "sys/fs/cgroup/user/job/cpu.max": "max 100000\n", "sys/fs/cgroup/user/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/user/job/memory.max": "4096\n", "sys/fs/cgroup/user/memory.max": "8192\n",
        }, 0.5, 4096,
    ),
    "v2 in a container that sees its own group only": (
        {
            "proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT.format(shown="/kube/pod"),
            "sys/fs/cgroup/cpu.max": "200000 100000\n", "sys/fs/cgroup/memory.max": "4096\n",
        }, 2.0, 4096,
    ),
    "v1": (
        {
            "proc/self/cgroup": V1_OWN, "proc/self/mountinfo": V1_MOUNTS.format(shown="/"),
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "25000\n",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "9223372036854771712\n",
        }, 0.25, None,
    ),
    "v2, a group below the one that is seen": (
        {
            "proc/self/cgroup": "0::/kube/pod/job\n", "proc/self/mountinfo": V2_MOUNT.format(shown="/kube/pod"),
            "sys/fs/cgroup/job/cpu.max": "200000 100000\n", "sys/fs/cgroup/job/memory.max": "4096\n",
        }, 2.0, 4096,
    ),
    "v1 in a container without a namespace for groups": (
        {
            "proc/self/cgroup": V1_OWN, "proc/self/mountinfo": V1_MOUNTS.format(shown="/docker/x"),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "8192\n",
        }, 3.0, 8192,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CGROUPS)
def test_limits_of_cgroups(name: str, tmp_path: Path) -> None:
    files, quota, limit = CGROUPS[name]
    root = tree(tmp_path, files)
    assert (system.cpu_quota(root), system.memory(root).limit) == (quota, limit)


def test_memory(tmp_path: Path) -> None:
    lines = "MemTotal: 16 kB\nMemAvailable:  8 kB\nSwapTotal: 4 kB\nSwapFree: 1 kB\nHugePages_Total: 0\n"
    found = system.memory(tree(tmp_path, {"proc/meminfo": lines}))
    assert found == Memory(total=16384, available=8192, limit=None, swap=4096, swap_used=3072)
    nothing = system.memory(tmp_path / "none")
    assert nothing == Memory(total=None, available=None, limit=None, swap=None, swap_used=None)


@pytest.mark.parametrize(
    ("text", "model"),
    [
        (
            "processor\t: 0\nmodel\t\t: 167\nmodel name\t: Xeon: 3 GHz\n\nprocessor\t: 1\nmodel name\t: Xeon: 3 GHz\n",
            "Xeon: 3 GHz",
        ),
        ("processor : 0\nCPU part : 0xd0c\nModel : Raspberry Pi\n", "Raspberry Pi"),
        ("processor : 0\nCPU part : 0xd0c\n", "0xd0c"),
        ("", ""),
    ],
    ids=["x86", "pi", "arm", "nothing"],
)
def test_processor_model(text: str, model: str, tmp_path: Path) -> None:
    assert system.processor_model(tree(tmp_path, {"proc/cpuinfo": text})) == model


def test_clock_and_ports(tmp_path: Path) -> None:
    assert (system.clock_source(tmp_path), system.ephemeral_ports(tmp_path)) == ("", None)
    clock = "sys/devices/system/clocksource/clocksource0/current_clocksource"
    root = tree(tmp_path, {clock: "hpet\n", "proc/sys/net/ipv4/ip_local_port_range": "32768\t60999\n"})
    assert (system.clock_source(root), system.ephemeral_ports(root)) == ("hpet", (32768, 60999))


def test_space(tmp_path: Path) -> None:
    found, told = system.space(str(tmp_path)), os.statvfs(tmp_path)
    assert found.size == told.f_blocks * told.f_frsize
    assert found.free is not None
    assert 0 <= found.free <= told.f_blocks * told.f_frsize
    gone = str(tmp_path / "gone")
    assert system.space(gone) == Space(path=gone, size=None, free=None)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    soft = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_MEMLOCK: resource.RLIM_INFINITY, resource.RLIMIT_AS: 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft[kind], -1))
    assert system.limits() == Limits(open_files=1024, locked=None, virtual=4096)


def test_port_state() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not system.port_state(port).free
    assert system.port_state(port).free


def test_environment() -> None:
    environ = {
        "WORLD_SIZE": "2", "RANK": "1", "HOME": "/root", "SHOAL_SEED": "7", "SLURM_JWT": "abc", "NCCL_DEBUG": "INFO",
        "SHOAL_API_KEY": "abc", "SLURM_STEP_TOKEN": "abc", "KMP_BLOCKTIME": "0", "PATH": "/bin", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    assert system.environment(environ) == (
        ("KMP_BLOCKTIME", "0"), ("NCCL_DEBUG", "INFO"), ("OMP_NUM_THREADS", "1"), ("RANK", "1"),
        ("SHOAL_API_KEY", "(hidden)"), ("SHOAL_SEED", "7"), ("SLURM_JWT", "(hidden)"), ("SLURM_STEP_TOKEN", "(hidden)"),
        ("WORLD_SIZE", "2"),
    )  # fmt: skip


def test_fabric(tmp_path: Path) -> None:
    assert system.fabric(tmp_path) == ("no InfiniBand or RoCE device: between hosts NCCL would use TCP",)
    port = "sys/class/infiniband/mlx5_0/ports/1"
    root = tree(tmp_path, {f"{port}/state": "4: ACTIVE\n", f"{port}/rate": "200 Gb/sec (4X HDR)\n"})
    device = "mlx5_0: port 1 ACTIVE 200 Gb/sec (4X HDR)"
    missing = "GPUDirect RDMA: neither nvidia_peermem nor nv_peer_mem is loaded; NCCL may still use DMA-BUF"
    assert system.fabric(root) == (device, missing)
    (root / "sys/module/nvidia_peermem").mkdir(parents=True)
    assert system.fabric(root) == (device, "GPUDirect RDMA: nvidia_peermem is loaded")
