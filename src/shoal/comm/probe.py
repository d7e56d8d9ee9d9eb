"""Which carriers work on this host: each is tried or asked, within seconds."""

from __future__ import annotations

import importlib.util
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Final, Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

Tried = tuple[bool, str]
"""Whether it works, and what there is to say about it."""

_PATIENCE: Final = 10.0  # seconds
_WORD: Final = b"shoal"
_READ: Final = "import os, sys; sys.stdout.buffer.write(os.pread(os.open(sys.argv[1], os.O_RDONLY), 9, 0))"
_MPI: Final = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print("mpi4py", mpi4py.__version__ + ",", MPI.Get_library_version().splitlines()[0].strip(" \\0"))
"""


class _Sums(Protocol):
    """What we use of a process group."""

    def allreduce(self, tensors: list[torch.Tensor], options: dist.AllreduceOptions) -> dist.Work: ...


def gloo(address: str | None = None, patience: float = _PATIENCE) -> Tried:
    """Two threads form a group and sum a tensor.

    Args:
        address: where they listen, 127.0.0.1 for loopback; None: wherever gloo chooses on this host.
    """
    if not dist.is_gloo_available():
        return False, "torch is built without it"
    store, ended = HashStore(), ["", ""]

    def member(rank: int) -> None:
        try:
            ended[rank] = _member(store, rank, address, patience)
        except RuntimeError as error:
            ended[rank] = str(error).splitlines()[0]

    threads = [threading.Thread(target=member, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience + 1)
    wrong = next((words for words in ended if words != "3.0"), None)
    where = f"a group of two over {address or 'the default interface'}"
    return (True, f"{where} forms") if wrong is None else (False, f"{where}: {wrong or f'nothing for {patience:g} s'}")


def _member(store: Store, rank: int, address: str | None, patience: float) -> str:
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore
    options._timeout = timedelta(seconds=patience)
    gloo = dist.ProcessGroupGloo
    device = gloo.create_default_device() if address is None else gloo.create_device(hostname=address)  # pyright: ignore
    options._devices = [device]
    group = cast(_Sums, gloo(dist.PrefixStore("doctor", store), rank, 2, options))  # pyright: ignore
    value = torch.full((1,), float(rank + 1))
    group.allreduce([value], dist.AllreduceOptions()).wait()
    return str(value.item())


def shared_memory(patience: float = _PATIENCE) -> Tried:
    """A memfd is made and mapped, and another process reads it through /proc."""
    if not hasattr(os, "memfd_create"):
        return False, "this system has no memfd"
    try:
        fd = os.memfd_create("shoal doctor")
    except OSError as error:
        return False, f"no memfd: {error.strerror}"
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE) as pages:
            pages[: len(_WORD)] = _WORD
            return _read_by_another(fd, patience)
    except OSError as error:
        return False, f"a memfd cannot be mapped: {error.strerror}"
    finally:
        os.close(fd)


def _read_by_another(fd: int, patience: float) -> Tried:
    done = _python("-I", "-S", "-c", _READ, f"/proc/{os.getpid()}/fd/{fd}", patience=patience)
    if done is not None and done.stdout.startswith(_WORD):
        return True, "memfd, mapped; another process reads it through /proc"
    said = "no answer" if done is None else done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return False, f"another process cannot read a memfd through /proc: {''.join(said)}"


def mpi(patience: float = _PATIENCE) -> Tried:
    """mpi4py is imported in a process of its own, as a broken MPI ends the process, and is not initialised."""
    if importlib.util.find_spec("mpi4py") is None:
        return False, "no mpi4py: pip install mpi4py"
    done = _python("-c", _MPI, patience=patience)
    if done is None:
        return False, f"import mpi4py.MPI does not end within {patience:g} s"
    if done.returncode == 0:
        return True, done.stdout.decode(errors="replace").strip()
    said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
    return False, f"mpi4py without an MPI that it can use: {said[-1]}"


def nccl() -> Tried:
    """Whether torch has it, and devices for it."""
    if not dist.is_nccl_available():
        return False, "torch is built without it"
    asked = cast("Callable[[], tuple[int, ...]]", torch.cuda.nccl.version)  # pyright: ignore
    count = torch.cuda.device_count()
    return count > 0, f"{'.'.join(map(str, asked()))}, {count} devices"


def accelerator() -> str:
    """Its kind, the number of devices and the first one's name, or "none"."""
    if not torch.accelerator.is_available():
        return "none"
    kind = torch.accelerator.current_accelerator()
    module = torch.get_device_module(kind)
    name = module.get_device_name(0) if hasattr(module, "get_device_name") else ""
    return f"{torch.accelerator.device_count()} x {kind} {name}".strip()


def build() -> str:
    """What torch was compiled for."""
    version = torch.version
    kinds = {"CUDA": version.cuda, "ROCm": version.hip, "XPU": getattr(version, "xpu", None)}
    return ", ".join(f"{kind} {found}" for kind, found in kinds.items() if found) or "CPU only"


def capability() -> str:
    """The instructions that torch's kernels use on this processor."""
    return torch.backends.cpu.get_cpu_capability()


def _python(*args: str, patience: float) -> subprocess.CompletedProcess[bytes] | None:
    """None: it did not end."""
    try:
        return subprocess.run([sys.executable, *args], capture_output=True, timeout=patience, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return None
