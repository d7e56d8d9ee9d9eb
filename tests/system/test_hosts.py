"""Ranks on two hosts that are network namespaces, joined by a cable of the kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import os
from tests.equivalence.models import trainer
print("RESULT", trainer("{strategy}", leaves=4)(int(os.environ.get("RANK", "0"))))
"""


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True, timeout=20, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces with addresses 10.77.0.1 and 10.77.0.2 that reach each other and nothing else."""
    names = [f"shoal-{uuid.uuid4().hex[:6]}-{i}" for i in (1, 2)]
    made: list[str] = []
    try:
        for name in names:
            sh(f"ip netns add {name}")
            made.append(name)
        a, b = (f"v{name[6:12]}{name[-1]}" for name in names)
        sh(f"ip link add {a} netns {names[0]} type veth peer name {b} netns {names[1]}")
        for i, (name, link) in enumerate(zip(names, (a, b), strict=True), start=1):
            sh(f"ip -n {name} addr add 10.77.0.{i}/24 dev {link}")
            sh(f"ip -n {name} link set {link} up")
            sh(f"ip -n {name} link set lo up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)


def start(host: str | None, rank: int, strategy: str) -> subprocess.Popen[str]:
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    if host is not None:
        env |= {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29400",
        }  # fmt: skip
    inside = ["ip", "netns", "exec", host] if host is not None else []
    program = PROGRAM.format(strategy=strategy)
    return subprocess.Popen(
        [*inside, sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return next(line for line in out.splitlines() if line.startswith("RESULT"))


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "hybrid"])
def test_two_hosts_equal_one_process(hosts: list[str], strategy: str) -> None:
    """Hybrid: each host is a copy of one rank."""
    ranks = [start(host, rank, strategy) for rank, host in enumerate(hosts)]
    got = [result(r) for r in ranks]
    assert got[0] == result(start(None, 0, "ddp"))
    assert got[1] == "RESULT None"
