"""The benchmark from its command line, with a model so small that its numbers mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_time.py"
TINY = ["--width", "32", "--layers", "2", "--heads", "2", "--vocabulary", "64", "--context", "16", "--batch", "2"]
TALKING = (
    "torch DDP", "torch ZeroRedundancyOptimizer", "torch FSDP2",
    "shoal ddp", "shoal zero1", "shoal zero2", "shoal zero3",
)  # fmt: skip
CASES = {"one process", "two that do not talk", *TALKING}
UNITS = {
    "step": "ms", "step_min": "ms", "step_max": "ms", "processor": "ms", "final_loss": "nat",
    "ratio": "one process", "ratio_min": "one process", "ratio_max": "one process", "elsewhere": "processor",
    "memory_at_rest": "byte", "memory_peak": "byte",
}  # fmt: skip


def ran(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *TINY, *options]
    return subprocess.run(
        command, env=os.environ | {"SHOAL_LEAVES": "nonsense"}, capture_output=True, text=True, timeout=280
    )


@pytest.mark.timeout(300)  # nine contenders, each in processes of its own
def test_every_contender_is_measured_and_trains_the_same(tmp_path: Path) -> None:
    file = tmp_path / "step_time.json"
    done = ran("--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    lines = json.loads(file.read_text())
    assert all(set(line) == {"bench", "case", "metric", "value", "unit"} for line in lines)
    assert {line["bench"] for line in lines} == {"step_time"}
    assert {line["case"] for line in lines} == CASES
    assert all(line["unit"] == UNITS[line["metric"]] for line in lines)
    found = {(line["case"], line["metric"]): line["value"] for line in lines}
    assert len(found) == len(lines)
    assert all(found[case, "step"] > 0 for case in CASES)
    assert found["one process", "ratio"] == 1
    losses = {case: found[case, "final_loss"] for case in TALKING}
    assert losses["shoal ddp"] == losses["shoal zero1"] == losses["shoal zero2"] == losses["shoal zero3"]
    assert all(loss == pytest.approx(losses["torch DDP"], abs=1e-4) for loss in losses.values())
    table = done.stdout[done.stdout.index("GPT of") :]
    assert all(case in table for case in CASES)


def test_some_contenders_only(tmp_path: Path) -> None:
    file = tmp_path / "step_time.json"
    done = ran("--rounds", "1", "--steps", "1", "--only", "zero3", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert {line["case"] for line in json.loads(file.read_text())} == {"one process", "shoal zero3"}


def test_a_contender_that_fails_ends_the_race() -> None:
    done = ran("--rounds", "1", "--steps", "1", "--only", "talk", "--heads", "5")
    assert done.returncode == 1
    assert "one process: rank 0 failed, see above" in done.stderr
    assert "shape" in done.stderr
