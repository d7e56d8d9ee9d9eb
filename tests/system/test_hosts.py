"""Ranks on two hosts that are network namespaces, joined by a cable of the kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import Host, hosts

pytestmark = pytest.mark.system
ROOT = Path(__file__).parent.parent.parent
ENV = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
PROGRAM = """
import os
from tests.equivalence.models import trainer
print("RESULT", trainer("{strategy}", leaves=4)(int(os.environ.get("RANK", "0"))))
"""


def command(strategy: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(strategy=strategy)]


def start(two: list[Host], rank: int, strategy: str) -> subprocess.Popen[str]:
    place = {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": two[0].address, "MASTER_PORT": "29400",
    }  # fmt: skip
    return two[rank].popen(command(strategy), env=ENV | place, **PIPES)


def result(process: subprocess.Popen[str], timeout: float = 60.0) -> str:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return next(line for line in out.splitlines() if line.startswith("RESULT"))


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "hybrid"])
def test_two_hosts_equal_one_process(strategy: str) -> None:
    """Hybrid: each host is a copy of one rank."""
    with hosts(2) as two:
        ranks = [start(two, rank, strategy) for rank in range(2)]
        got = [result(r) for r in ranks]
    assert got[0] == result(subprocess.Popen(command("ddp"), env=ENV, **PIPES))
    assert got[1] == "RESULT None"


TWO_LEVELS = """
import torch, shoal
with shoal.init("{strategy}", run_dir="none") as job:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(500, 500) for _ in range(4)))
    model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        x = torch.randn(4, 500, generator=torch.Generator().manual_seed(4 * step + job.rank))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print("RESULT", sum(job.crossed.values()))
"""


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_what_is_predicted_to_cross_is_what_the_cables_carry(strategy: str) -> None:
    """Two ranks on each host, who share its memory: two sums or gathers in each step cross, not four."""
    with hosts(2) as two:
        place = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": two[0].address, "MASTER_PORT": "29400"}
        program = [sys.executable, "-c", TWO_LEVELS.format(strategy=strategy)]
        ranks = [
            two[rank // 2].popen(
                program, env=ENV | place | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}, **PIPES
            )
            for rank in range(4)
        ]  # fmt: skip
        said = [int(result(process, 150.0).split()[1]) for process in ranks]
        carried = [host.sent() for host in two]
    model = 4 * 4 * 500 * 501
    gathers = 3 if strategy == "zero3" else 1
    for host in range(2):
        crossed = said[2 * host] + said[2 * host + 1]
        assert crossed < 1.1 * 3 * (1 + gathers) * model / 2
        assert crossed < carried[host] < 1.1 * crossed + 300_000  # headers, and what ranks say to the store
