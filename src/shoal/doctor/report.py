"""`examine`: one host, as it is."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata

import shoal
from shoal.doctor import network, system
from shoal.doctor.advice import advice
from shoal.doctor.facts import Carrier, Finding, Processor, Report, Versions

DEFAULT_PORT = 29500  # torchrun's


def examine(environ: Mapping[str, str] | None = None) -> Report:
    """Look at this host, try its carriers, and say what is wrong. Takes seconds at most.

    Args:
        environ: the environment to judge; None: this process's.
    """
    environ = os.environ if environ is None else environ
    host = socket.gethostname()
    asked = _ask_torch()
    report = Report(
        host=host,
        host_address=network.address_of(host),
        versions=replace(versions(), build=asked.build),
        processor=_processor(asked),
        memory=system.memory(),
        shm=system.space(),
        limits=system.limits(),
        interfaces=network.interfaces(),
        carriers=asked.carriers,
        fabric=system.fabric(),
        accelerator=asked.accelerator,
        clock=system.clock_source(),
        port=system.port_state(meeting_port(environ)),
        ephemeral=system.ephemeral_ports(),
        environment=system.environment(environ),
        findings=(),
    )
    return replace(report, findings=(*asked.findings, *advice(report, environ)))


def versions() -> Versions:
    """Versions, without importing torch: its build is not known so."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = ""
    return Versions(
        shoal=shoal.__version__,
        python=platform.python_version(),
        torch=torch,
        build="",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def meeting_port(environ: Mapping[str, str]) -> int:
    """Where ranks would meet: MASTER_PORT, or the one that torchrun takes."""
    said = system.number(environ.get("MASTER_PORT", ""))
    return said if said is not None and 0 < said < 65536 else DEFAULT_PORT


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What only torch can say. The defaults are for a torch that cannot be imported."""

    build: str = ""
    capability: str = ""
    threads: int = 0
    accelerator: str = "none"
    carriers: tuple[Carrier, ...] = ()
    findings: tuple[Finding, ...] = ()


def _ask_torch() -> _Asked:
    try:
        import torch

        from shoal.comm import probe
    except (ImportError, OSError) as error:  # OSError: a library of its own that does not load
        lost = Finding(
            what=f"torch cannot be imported: {error}",
            remedy="python -m pip install --force-reinstall torch",
            fatal=True,
        )
        return _Asked(findings=(lost,))
    tried = {
        "gloo": probe.gloo("127.0.0.1"),
        "gloo here": probe.gloo(),
        "shared memory": probe.shared_memory(),
        "nccl": probe.nccl(),
        "mpi": probe.mpi(),
    }
    return _Asked(
        build=probe.build(),
        capability=probe.capability(),
        threads=torch.get_num_threads(),
        accelerator=probe.accelerator(),
        carriers=tuple(Carrier(name=name, usable=usable, about=about) for name, (usable, about) in tried.items()),
    )


def _processor(asked: _Asked) -> Processor:
    cores = os.cpu_count() or 1
    return Processor(
        model=system.processor_model(),
        machine=platform.machine(),
        capability=asked.capability,
        cores=cores,
        usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        quota=system.cpu_quota(),
        threads=asked.threads,
    )
