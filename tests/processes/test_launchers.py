"""The same script however it is started; and ranks that do not come."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shoal
from shoal.errors import EnvironmentFault
from tests.pool import Pool

SCRIPT = """\
import hashlib, sys
import torch
import shoal

with shoal.init("zero3", leaves=2, run_dir="none") as job:
    model = torch.nn.Sequential(torch.nn.Linear(17, 65), torch.nn.Dropout(0.1), torch.nn.Linear(65, 17))
    model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters()))
    data = torch.utils.data.TensorDataset(torch.randn(24, 17, generator=torch.Generator().manual_seed(1)))
    for (x,) in job.loader(data, global_batch=8):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = job.state_dict(model)
    if job.rank == 0:
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values()))
        print(job.world_size, digest.hexdigest(), flush=True)
"""
PYTHON = [sys.executable]
SHOAL = [sys.executable, "-c", "from shoal.cli import main; main()", "run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TIMEOUT, SLACK = 3.0, 2.0


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)


def started(command: list[str], script: str, **more: str) -> subprocess.CompletedProcess[str]:
    Path("train.py").write_text(script)
    environ = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.run([*command, "train.py"], capture_output=True, text=True, timeout=60, env=environ)


def test_a_script_gives_the_same_however_it_is_started() -> None:
    """Plain Python, `shoal run`, torchrun; and nothing is said but the plan and what a leaf is."""
    alone = started(PYTHON, SCRIPT)
    ours = started([*SHOAL, "--workers", "2"], SCRIPT)
    theirs = started(TORCHRUN, SCRIPT)
    assert [done.returncode for done in (alone, ours, theirs)] == [0, 0, 0], alone.stderr + ours.stderr + theirs.stderr
    assert [done.stdout.split()[0] for done in (alone, ours, theirs)] == ["1", "2", "2"]
    assert len({done.stdout.split()[1] for done in (alone, ours, theirs)}) == 1
    for done, ranks in ((alone, 1), (ours, 2)):
        plan, leaf = done.stderr.splitlines()
        held = "1 rank" if ranks == 1 else f"{ranks} ranks, one copy of the state in all"
        assert plan.startswith(f"shoal: zero3, {held}, 2 leaves a step; ")
        assert (
            leaf == "shoal: a leaf is one batch of the loader, 2 a step: 2 x 4 samples; the same bits at any world size"
        )


RESTARTED = """\
import os, sys, time
from pathlib import Path
import shoal
from shoal.comm.watch import Watch

def told(store, rank, enter=Watch.enter):
    enter(store, rank)
    Path("joins").touch()

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if os.environ["RANK"] == "0":
        Watch.enter = told
    else:
        while not Path("joins").exists(): time.sleep(0.05)
        sys.exit(1)
with shoal.init(timeout=10, run_dir="none") as job:
    print(job.mean(float(job.rank)), flush=True)
"""


@pytest.mark.slow
def test_torchrun_restarts_all_ranks() -> None:
    """One rank had joined before the restart, the other had not."""
    done = started([*TORCHRUN, "--max-restarts", "1"], RESTARTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0.5") == 2


# ---------------------------------------------------------------- ranks that do not come


def join(absent: int, port: int | None, worlds: tuple[str, ...]) -> tuple[float, str]:
    rank = int(os.environ["RANK"])
    if rank == absent:
        return 0.0, ""
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    if worlds:
        os.environ["WORLD_SIZE"] = worlds[rank]
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        os.environ["LOCAL_RANK"] = "0"
    begin = time.monotonic()
    try:
        shoal.init("ddp", run_dir="none", timeout=TIMEOUT)
    except EnvironmentFault as error:
        return time.monotonic() - begin, str(error)
    return 0.0, "joined"


HELP = (
    "\n  cause: a rank that did not start, another WORLD_SIZE, or an address that cannot be reached"
    "\n  try:   start all ranks with `shoal run` or torchrun; check MASTER_ADDR and MASTER_PORT; or raise timeout="
)


@pytest.mark.parametrize("absent", [0, 2])
def test_a_missing_rank(absent: int, pool: Pool) -> None:
    results = pool.run(join, absent, None, (), world=3, timeout=15)
    for rank in {0, 1, 2} - {absent}:
        seconds, text = results[rank]
        assert text.startswith(f"shoal[E50] rank {rank} of 3 could not meet the others at 127.0.0.1:")
        why = "[Errno 111] Connection refused" if absent == 0 else "rank 2 did not come"
        assert text.endswith(f"within 3 s: {why}" + HELP)
        assert TIMEOUT - 0.5 < seconds < TIMEOUT + SLACK


def test_ranks_that_are_told_different_worlds(pool: Pool) -> None:
    """Rank 1 waits for a third one."""
    (first, said), (second, missed) = pool.run(join, -1, None, ("2", "3"), timeout=15)
    assert "rank 1 of 3 could not meet the others" in missed
    assert "rank 2 did not come" in missed
    assert "rank 0 of 2 could not meet the others" in said
    assert max(first, second) < TIMEOUT + SLACK


def test_an_address_that_is_taken(pool: Pool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (_, first), (seconds, second) = pool.run(join, -1, port, (), timeout=15)
    assert first.startswith(f"shoal[E50] rank 0 cannot listen at 127.0.0.1:{port}")
    assert first.endswith(": another program does\n  try:   another MASTER_PORT")
    assert second.startswith(f"shoal[E50] rank 1 of 2 could not meet the others at 127.0.0.1:{port}")
    assert seconds < TIMEOUT + SLACK
