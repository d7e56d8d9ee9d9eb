"""What the MPI carrier says where it cannot be. All else of it is in `tests/processes/test_mpi.py`."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from shoal.comm import mpi
from shoal.comm.mpi import Mpi
from shoal.comm.rendezvous import Address
from shoal.errors import EnvironmentFault

NOWHERE = Address(1, 2, "127.0.0.1", 1, False)


def refused() -> str:
    with pytest.raises(EnvironmentFault) as caught:
        Mpi(NOWHERE, timeout=0.1, report=print)
    return str(caught.value)


def test_there_is_no_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    assert refused() == (
        "shoal[E50] carrier=mpi needs mpi4py and an MPI library: import of mpi4py halted; None in sys.modules\n"
        "  try:   pip install 'shoal[mpi]', and an MPI such as Open MPI where mpirun is; or carrier=gloo"
    )


def test_ranks_that_mpirun_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = SimpleNamespace(COMM_WORLD=SimpleNamespace(rank=0, size=1))
    monkeypatch.setattr(mpi, "_library", lambda: alone)
    assert refused() == (
        "shoal[E50] this is rank 1 of 2, and rank 0 of 1 for MPI\n"
        "  cause: something else than mpirun has started these ranks\n"
        "  try:   mpirun -n <ranks> python script.py, or carrier=gloo"
    )
