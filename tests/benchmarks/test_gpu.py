"""`benchmarks/gpu.py` where there is no accelerator, and its parts on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
PARTS = """
import torch
import gpu
from dataclasses import replace
from models import GPT, Sizes

tiny = Sizes(width=32, layers=2, heads=2, vocabulary=64, context=16, batch=2)
found = {}
for strategy, ranks in ((None, 1), ("zero3", 1), ("ddp", 2)):
    case = gpu.Case(table="overhead", name=str(strategy), sizes=tiny, strategy=strategy, steps=2, ranks=ranks)
    found[strategy] = gpu.visit(case, "cpu")
    print(gpu.line(case, found[strategy], found[None], 1e12))
assert found[None].loss == found["zero3"].loss
assert sum(found['zero3'].at_rest.values()) > 3 * 4 * found[None].parameters  # with both moments of AdamW
assert found[None].parameters == sum(p.numel() for p in GPT(tiny).parameters())
print("FINE", gpu.operations(tiny, 30000), [c.name for c in gpu.cases(True) if c.table == "use"])
"""


def test_without_an_accelerator_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch, sys, gpu; torch.accelerator.is_available = lambda: False; sys.exit(gpu.main([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert done.stderr == "benchmarks/gpu.py needs an accelerator such as CUDA, and torch finds none here\n"


@pytest.mark.slow
def test_its_parts() -> None:
    done = subprocess.run([sys.executable, "-c", PARTS], cwd=FOLDER, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    tokens, matrices, attention = 2 * 16, 30000 - (64 + 16) * 32, 2 * 16 * 32
    names = [f"{size} {how}" for size in ("0.1 B", "0.4 B") for how in ("plain loop", "ddp", "zero3")]
    assert done.stdout.splitlines()[-1] == f"FINE {tokens * 6 * (matrices + attention)} {names}"
    assert "1.00 x" in done.stdout
