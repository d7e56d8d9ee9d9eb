"""Which carriers work on this host."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shoal.comm import probe


def test_gloo() -> None:
    assert probe.gloo("127.0.0.1") == (True, "a group of two over 127.0.0.1 forms")
    assert probe.gloo() == (True, "a group of two over the default interface forms")


def test_gloo_where_it_cannot_listen() -> None:
    usable, about = probe.gloo("192.0.2.77", patience=1)
    assert not usable
    assert about.startswith("a group of two over 192.0.2.77: ")
    assert len(about) > len("a group of two over 192.0.2.77: ")


def test_gloo_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert probe.gloo() == (False, "torch is built without it")


def test_shared_memory() -> None:
    assert probe.shared_memory() == (True, "memfd, mapped; another process reads it through /proc")
    open_files = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert not [path for path in open_files if "shoal doctor" in path]


def test_shared_memory_of_which_others_see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_READ", "raise OSError('not yours')")
    assert probe.shared_memory() == (False, "another process cannot read a memfd through /proc: OSError: not yours")
    monkeypatch.setattr(probe, "_READ", "import time; time.sleep(9)")
    assert probe.shared_memory(0.2) == (False, "another process cannot read a memfd through /proc: no answer")


def test_no_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert probe.shared_memory() == (False, "no memfd: Too many open files")
    monkeypatch.delattr(os, "memfd_create")
    assert probe.shared_memory() == (False, "this system has no memfd")


MPI = {
    "fine": ("Get_library_version = lambda: 'Open MPI v4.1.4, package: x\\nmore'", (True, "mpi4py 9.9, Open MPI v4.1.4, package: x")),
    "broken": ("raise RuntimeError('cannot load MPI library')", (False, "mpi4py without an MPI that it can use: RuntimeError: cannot load MPI library")),
    "ends": ("import os; os._exit(3)", (False, "mpi4py without an MPI that it can use: exit code 3")),
    "hangs": ("import time; time.sleep(99)", (False, "import mpi4py.MPI does not end within 1 s")),
}  # fmt: skip


@pytest.mark.parametrize("name", MPI)
def test_mpi(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, expected = MPI[name]
    package = tmp_path / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("class rc: initialize = True\n__version__ = '9.9'\n")
    (package / "MPI.py").write_text(f"import mpi4py\nassert not mpi4py.rc.initialize\n{program}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert probe.mpi(1.0 if name == "hangs" else 20.0) == expected


def test_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert probe.mpi() == (False, "no mpi4py: pip install mpi4py")


def test_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert probe.nccl() == (False, "torch is built without it")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    for count, usable in ((0, False), (2, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda c=count: c)
        assert probe.nccl() == (usable, f"2.28.9, {count} devices")


def test_build_capability_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cuda, text in (("none", None, "CPU only"), ("cuda", "12.8", "CUDA 12.8")):
        for kind, value in (("cuda", cuda), ("hip", None), ("xpu", None)):
            monkeypatch.setattr(torch.version, kind, value, raising=False)
        assert probe.build() == text, name
    assert probe.capability() == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert probe.accelerator() == "none"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: "fast")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda _kind: type("M", (), {"get_device_name": lambda i: f"F{i}"}))
    assert probe.accelerator() == "2 x fast F0"
