"""Programs that people copy from the web, with changed imports and rank set-up only: what shoal says of each."""

from __future__ import annotations

import io
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from shoal.dropin.world import known
from shoal.errors import EnvironmentFault
from tests.pool import Pool

HERE = Path(__file__).parent

SAID: dict[str, str | None] = {
    "mlp_ddp": None,
    "linear_ddp": "the same batch on all 2 ranks, 2 times in a row",
    "conv_ddp": "replicas drifted apart: after 1 steps the ranks' parameters differ; the same optimizer, learning rate",
    "mlp_zero": "the ranks' gradients differ, and each parameter follows those of one rank alone",
    "sgd_no_sampler": "the same batch on all 2 ranks, 2 times in a row",
    "forgotten": "replicas drifted apart: after 1 steps of SGD the ranks' parameters differ, for nothing sent their gradients",
    "horovod_mnist": None,
}
DRIFTS = ("conv_ddp", "forgotten")


def program(name: str) -> tuple[str, str]:
    """What a rank prints, and what shoal says there."""
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        here = known()
        if here is not None:  # as at the interpreter's end
            here.leave()
    return out.getvalue(), said.getvalue()


@pytest.mark.parametrize("name", SAID)
def test_what_is_said(pool: Pool, name: str) -> None:
    (out, said), *others = pool.run(program, name, world=2)
    weights = {re.search(r"weights (\S+)", text).group(1) for text, _ in [(out, said), *others]}
    assert (len(weights) == 1) is (name not in DRIFTS)
    warnings = [line for line in said.splitlines() if line.startswith("shoal: warning: ")]
    told = SAID[name]
    if told is None:
        assert warnings == []
    else:
        assert any(told in line for line in warnings), said
        said_by = (HERE / f"{name}.py").read_text()
        assert "Wrong in the original:" in said_by
    assert all("warning" not in text for _, text in others)  # once, not by every rank


def test_they_learn(pool: Pool) -> None:
    out, _ = pool.run(program, "horovod_mnist", world=2)[0]
    assert float(re.search(r"accuracy (\S+),", out).group(1)) > 0.9
    out, _ = pool.run(program, "mlp_ddp", world=3)[0]
    assert "loss" in out


def test_a_rank_that_is_hard_coded(pool: Pool) -> None:
    """The process that claims another's rank is refused at once."""
    results = pool.start(program, "hard_coded", world=2).results(60, grace=1)
    assert isinstance(results[1].exception, EnvironmentFault)
    assert "RANK=0 contradicts LOCAL_RANK=1" in str(results[1].exception)
    assert "is a rank written into the script?" in str(results[1].exception)


@pytest.mark.slow
def test_with_a_launcher(tmp_path: Path) -> None:
    """As a user starts it; connections are closed at the interpreter's end."""
    command = [
        sys.executable,
        "-c",
        "from shoal.cli import main; main()",
        "run",
        "--workers",
        "2",
        str(HERE / "mlp_ddp.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"rank (\d): loss \S+, weights (\S+)", done.stdout)
    assert [rank for rank, _ in found] == ["0"]  # the others' lines are in their logs
    assert "warning" not in done.stderr
