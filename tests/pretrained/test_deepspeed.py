"""Folders that DeepSpeed itself has written. Where it is not installed (`make race` does) there is nothing here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shoal
from shoal.comm.threads import run
from tests.pretrained.zero import Net

HERE = Path(__file__).parent
READ = """
import sys, torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read
torch.save({name: value.clone() for name, value in read(sys.argv[1]).items()}, sys.argv[2])
"""


def call(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=110, check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def same_as_its_own_reading(stage: int, precision: str, path: Path) -> None:
    """What shoal loads is what DeepSpeed's own `zero_to_fp32` reads, which leaves frozen weights out at stage 1."""
    call(HERE / "zero.py", path / "zero", stage, precision)
    call("-c", READ, path / "zero", path / "want.pt")
    want = torch.load(path / "want.pt")

    def rank_main(_rank: int) -> dict[str, Tensor]:
        with shoal.init("zero3", run_dir="none", device="cpu") as job:
            model = Net()
            model, _ = job.prepare(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
            job.load_pretrained(path / "zero", trust=True)
            return job.state_dict(model)

    got = run(2, rank_main)[0]
    torch.manual_seed(3)
    frozen = "blocks.0.0.weight"
    began = Net().state_dict()
    assert torch.equal(got[frozen], began[frozen].bfloat16().float() if precision == "bf16" else began[frozen])
    assert set(got) - set(want) == ({frozen} if stage == 1 else set())
    assert not torch.equal(got["embed.weight"], began["embed.weight"]), "it was trained"
    for name, value in want.items():
        assert torch.equal(got[name], value.float()), name


if find_spec("deepspeed") is not None:

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_its_own_folders(stage: int, precision: str, tmp_path: Path) -> None:
        same_as_its_own_reading(stage, precision, tmp_path)
