"""What a look at one host finds. Sizes are bytes; None: no limit, or not known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Versions:
    """What runs here. `torch` is empty where it cannot be imported; `build`: what it was compiled for."""

    shoal: str
    python: str
    torch: str
    build: str
    system: str


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The processor: `cores` it has, `usable` ones by affinity, `quota` of them by cgroup, torch's `threads`."""

    model: str
    machine: str
    capability: str
    cores: int
    usable: int
    quota: float | None
    threads: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The host's memory, and this process's limit by cgroup."""

    total: int | None
    available: int | None
    limit: int | None
    swap: int | None
    swap_used: int | None


@dataclass(frozen=True, kw_only=True)
class Space:
    """A file system, here /dev/shm."""

    path: str
    size: int | None
    free: int | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Soft limits of this process, as `ulimit` says."""

    open_files: int | None
    locked: int | None
    virtual: int | None


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface. `speed`: Mbit/s, as its driver says."""

    name: str
    up: bool
    speed: int | None
    addresses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """A way of moving bytes between ranks, and whether it works here."""

    name: str
    usable: bool
    about: str


@dataclass(frozen=True, kw_only=True)
class Port:
    """The port where ranks meet."""

    number: int
    free: bool


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it should be, with the way out. `fatal`: shoal cannot work so."""

    what: str
    remedy: str
    fatal: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found on one host.

    Args:
        host: its name, and `host_address`, what the name stands for here ("" if nothing).
        carriers: gloo, shared memory, NCCL, MPI.
        fabric: what is known without running about NCCL's transports and GPUDirect RDMA, one fact a line.
        accelerator: as torch names it, or "none".
        clock: the kernel's clock source, "" if it does not say.
        ephemeral: first and last port that the system hands out.
        environment: variables that matter, by name; values that look like secrets are hidden.
        findings: what is wrong or doubtful.
    """

    host: str
    host_address: str
    versions: Versions
    processor: Processor
    memory: Memory
    shm: Space
    limits: Limits
    interfaces: tuple[Interface, ...]
    carriers: tuple[Carrier, ...]
    fabric: tuple[str, ...]
    accelerator: str
    clock: str
    port: Port
    ephemeral: tuple[int, int] | None
    environment: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """Whether shoal can work here."""
        return not any(finding.fatal for finding in self.findings)
