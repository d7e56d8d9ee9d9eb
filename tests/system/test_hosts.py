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


def result(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
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
