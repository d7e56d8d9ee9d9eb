"""`benchmarks/budget.py` from its command line, with a model so small that its times mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
UNITS = {"memory": "byte", "step": "ms", "step_min": "ms", "step_max": "ms", "payload": "byte", "ratio": "no budget"}


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    file, plots = tmp_path / "budget.json", tmp_path / "plots"
    command = [
        sys.executable,
        "budget.py",
        "--quick",
        "--model",
        "trial",
        "--steps",
        "2",
        "--json",
        file,
        "--plots",
        plots,
    ]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    lines = json.loads(file.read_text())
    assert all(set(line) == {"bench", "case", "metric", "value", "unit"} for line in lines)
    assert {line["bench"] for line in lines} == {"budget"}
    assert {line["metric"]: line["unit"] for line in lines} == UNITS
    found = {(line["case"].removeprefix("trial "), line["metric"]): line["value"] for line in lines}
    assert [case for case, metric in found if metric == "step"] == ["none", "0%", "50%", "100%"]
    sent = [found[case, "payload"] for case in ("0%", "50%", "100%")]
    assert sent[0] >= sent[1] >= sent[2] < sent[0]
    memory = [found[case, "memory"] for case in ("0%", "50%", "100%")]
    assert memory == sorted(memory)
    assert done.stdout.rstrip().endswith("budget_trial.svg")
    assert (plots / "budget_trial.svg").read_text().startswith("<?xml")
