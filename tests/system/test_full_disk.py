"""A disk that is really full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import shoal
from shoal import checkpoint
from shoal.comm.threads import run
from shoal.errors import SaveError

pytestmark = pytest.mark.system


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True, timeout=20)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=20)


def test_the_old_checkpoint_stays_and_training_goes_on(small_disk: Path) -> None:
    """150 x 300 parameters with Adam: half a MiB a checkpoint. The second does not fit."""

    def rank_main(_rank: int) -> int:
        with shoal.init("zero3", run_dir="none") as job:
            model = nn.Linear(150, 300)
            model, optimizer = job.prepare(model, torch.optim.Adam(model.parameters()))
            for step in range(3):
                model(torch.randn(4, 150)).sum().backward()
                optimizer.step()
                if step == 0:
                    job.save(small_disk)
                if step == 1:
                    with pytest.raises(SaveError, match="No space left"):
                        job.save(small_disk)
            return job.step

    assert run(2, rank_main) == [3, 3]
    assert [p.name for p in small_disk.iterdir()] == ["step-1"]
    assert checkpoint.verify(small_disk / "step-1").step == 1
