"""Whole programs under `shoal run` and alone: what their users see when a rank ends before its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from shoal.launch.run import Outcome, launch
from tests.faults.ranks import SLACK, TIMEOUT
from tests.pool import free_port

TRAIN = """\
import os, signal, sys, time
from pathlib import Path
import torch
import shoal

job = shoal.init("zero3", run_dir="none", timeout=3, carrier="{carrier}")
model = torch.nn.Sequential(*(torch.nn.Linear(65, 65) for _ in range(3)))
model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
step = 0

def deed():
    {deed}

def hook(*_):
    if job.rank == {rank} and step == 2: deed()

model[0].register_forward_pre_hook(hook)
while step < {steps}:
    model(torch.randn(4, 65)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if job.rank == 0: Path("steps").write_text(str(step))
"""


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)


def script(deed: str, rank: int = 1, steps: int = 5, carrier: str = "auto") -> str:
    Path("train.py").write_text(TRAIN.format(deed=deed, rank=rank, steps=steps, carrier=carrier))
    return "train.py"


def when(outcome: Outcome, rank: int) -> float:
    failure = outcome.ranks[rank].failure
    return outcome.ranks[rank].time if failure is None else failure.time


RAISED = "rank {} failed:\nTraceback (most recent call last):\n"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
EARLY = "rank {} has finished and closes the job"
"""Said by who waits for a transfer, or finds it where all ranks meet."""
slow = partial(pytest.param, marks=pytest.mark.slow)
CASES = [
    ("gloo", "raise ValueError('boom')", 1, 1, RAISED, "rank {} failed"),
    slow("shared", "raise ValueError('boom')", 1, 1, RAISED, "rank {} failed"),
    ("gloo", "sys.exit(3)", 1, 1, "rank {} left with exit code 3\n", EARLY),
    slow("gloo", KILL, 0, 1, "rank {} was killed by SIGKILL\n", "rank {} is gone"),
    ("shared", KILL, 0, 1, "rank {} was killed by SIGKILL\n", "rank {} is gone"),
    ("shared", "raise shoal.errors.BatchError('boom')", 0, 2, RAISED, "rank {} failed"),
]


@pytest.mark.parametrize(("carrier", "deed", "rank", "code", "first", "others"), CASES)
def test_its_own_story_comes_first(
    carrier: str, deed: str, rank: int, code: int, first: str, others: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends others after 2 s: they must have ended by themselves before."""
    outcome = launch([script(deed, rank, carrier=carrier)], workers=2, run_dir="none")
    err = capfd.readouterr().err
    told = err[err.index(first.format(rank)) :]
    line = told.partition(f"\nrank {1 - rank}: shoal.errors.")[2].partition("\n")[0]
    lost = f"PeerLost: shoal[E30] {others.format(rank)}; rank {1 - rank} was in '"
    assert line.startswith(lost) or (others == EARLY and told_at_a_meeting(line, rank)), told
    assert "Traceback" not in told.partition(f"\nrank {1 - rank}: ")[2]
    assert outcome.exit_code == code
    if "boom" in deed:
        assert "boom" in told.partition(f"\nrank {1 - rank}: ")[0]
        assert outcome.ranks[1 - rank].failure.message.splitlines()[1].endswith("boom")
    assert not outcome.ranks[1 - rank].by_launcher
    assert when(outcome, 1 - rank) - when(outcome, rank) < SLACK


def told_at_a_meeting(text: str, rank: int) -> bool:
    return "DivergedError: shoal[E20] ranks do different things: " in text and EARLY.format(rank) in text


def test_a_finished_rank_s_early_end_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    """`sys.exit(0)` in mid-step, seen only while its interpreter ends."""
    outcome = launch([script("sys.exit(0)", rank=0, carrier="gloo")], workers=2, run_dir="none")
    assert [end.code for end in outcome.ranks] == [0, 1]
    assert outcome.exit_code == 1
    err = capfd.readouterr().err
    assert "rank 1 failed:\nTraceback" in err
    assert f"PeerLost: shoal[E30] {EARLY.format(0)}; rank 1 was in '" in err or told_at_a_meeting(err, 0)
    assert err.endswith("\nrank 0 had finished\n")


SHOAL_RUN = [sys.executable, "-c", "from shoal.cli import main; main()", "run", "--run-dir", "none"]


def pids_of(group: int) -> list[int]:
    """All processes whose parent is `group`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == group:
            found.append(int(path.parent.name))
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def training(process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 30
    while not Path("steps").exists() or int(Path("steps").read_text() or 0) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupt_ends_all_quietly() -> None:
    command = [*SHOAL_RUN, "--workers", "2", script("pass", steps=10**9)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            training(process, 3)
            workers = pids_of(process.pid)
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=15)
        finally:
            process.kill()
    assert time.monotonic() - begin < TIMEOUT + SLACK
    assert process.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith("shoal: zero3")] == ["shoal run: ended by SIGINT"]
    assert len(workers) == 2
    assert all(map(gone, workers))


def test_without_a_launcher() -> None:
    """The ranks are started by hand, as a cluster's own tools do. Rank 0 takes the store with it."""
    rank = 0
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, script("raise ValueError('boom')", rank)]
    ranks = [
        subprocess.Popen(
            command, env=os.environ | place | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE, text=True
        )
        for r in "01"
    ]
    try:
        said = [process.communicate(timeout=30)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 1]
    own, other = said[rank], said[1 - rank]
    assert own.endswith("ValueError: boom\n")
    assert own.count("Traceback") == 1
    assert f"shoal.errors.PeerLost: shoal[E30] rank {rank} failed; rank {1 - rank} was in '" in other
    assert "\n  cause: ValueError: boom\n" in other
    assert other.count("Traceback") == 1
