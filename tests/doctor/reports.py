"""A host on which nothing is wrong, to be changed by tests."""

from __future__ import annotations

from shoal.doctor.facts import Carrier, Interface, Limits, Memory, Port, Processor, Report, Space, Versions

GIB = 1 << 30
REPORT = Report(
    host="node1",
    host_address="10.0.0.1",
    versions=Versions(shoal="0.1.0", python="3.11.7", torch="2.13.0+cpu", build="CPU only", system="Linux 6.1 x86_64"),
    processor=Processor(
        model="Zen", machine="x86_64", capability="AVX2", cores=8, usable=4, quota=None, threads=4
    ),
    memory=Memory(total=16 * GIB, available=8 * GIB, limit=None, swap=2 * GIB, swap_used=0),
    shm=Space(path="/dev/shm", size=8 * GIB, free=8 * GIB),
    limits=Limits(open_files=65536, locked=8 << 20, virtual=None),
    interfaces=(
        Interface(name="eth0", up=True, speed=10000, addresses=("10.0.0.1", "fe80::1")),
        Interface(name="eth1", up=False, speed=None, addresses=()),
        Interface(name="lo", up=True, speed=None, addresses=("127.0.0.1", "::1")),
    ),
    carriers=(
        Carrier(name="gloo", usable=True, about="a group forms"),
        Carrier(name="gloo here", usable=True, about="a group forms"),
        Carrier(name="shared memory", usable=True, about="memfd"),
        Carrier(name="nccl", usable=False, about="torch is built without it"),
    ),
    fabric=("no InfiniBand or RoCE device",),
    accelerator="none",
    clock="tsc",
    port=Port(number=29500, free=True),
    ephemeral=(32768, 60999),
    environment=(("RANK", "0"),),
    findings=(),
)  # fmt: skip
