"""The zoo from its command line, with an encoder-decoder, a mixture of experts and a vision model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "zoo.py"


def ran(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *options]
    environment = os.environ | {"SHOAL_LEAVES": "nonsense"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_three_architectures_have_the_same_bits(tmp_path: Path) -> None:
    file = tmp_path / "zoo.json"
    done = ran("--only", "t5", "mixtral", "resnet", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 architectures with equal bits under ddp and zero3" in done.stdout
    assert "0 unequal or refused; 0 not trained" in done.stdout
    lines = json.loads(file.read_text())
    assert all(set(line) == {"bench", "case", "metric", "value", "unit"} for line in lines)
    found = {(line["case"], line["metric"]): line["value"] for line in lines}
    for case in ("t5", "mixtral", "resnet"):
        assert found[case, "equal_ddp"] == found[case, "equal_zero3"] == 1
        assert found[case, "trained"] == found[case, "parameters"] > 10_000
        assert found[case, "units"] > 2


@pytest.mark.slow
def test_what_plain_pytorch_cannot_train_is_told_and_is_no_failure() -> None:
    done = ran("--only", "prompt_depth_anything")
    assert done.returncode == 0, done.stderr
    assert "Training is not implemented yet" in done.stdout
    assert "1 not trained in plain PyTorch" in done.stdout
