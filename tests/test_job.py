"""The end of a job."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import shoal
from shoal.comm.threads import run
from shoal.engine.engine import Engine
from shoal.errors import OrderError
from tests.equivalence.models import on_threads


def test_a_closed_job_leaves_nothing_behind() -> None:
    """Hooks of tensors are out of the garbage collector's sight: they must be taken off."""
    gc.collect()
    before = sum(type(o) is Engine for o in gc.get_objects())
    for name in ("ddp", "zero3"):
        on_threads(2, name, leaves=2)
    gc.collect()
    assert sum(type(o) is Engine for o in gc.get_objects()) <= before


def test_a_model_in_shards_says_that_the_job_is_closed() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", run_dir="none") as job:
            model = nn.Linear(64, 64)
            model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(OrderError, match="the job is closed, and its model's parameters have stayed in shards"):
            model(torch.zeros(1, 64))

    run(2, rank_main)


def test_a_whole_model_goes_on_alone() -> None:
    def rank_main(_rank: int) -> bool:
        with shoal.init("zero1", run_dir="none") as job:
            model = nn.Linear(64, 64)
            model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        return bool(model(torch.ones(1, 64)).isfinite().all())

    assert run(2, rank_main) == [True, True]


def test_the_same_step_may_be_saved_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def main(again: bool) -> tuple[list[Path], int]:
        with shoal.init("zero3", run_dir="none", device="cpu") as job:
            model = nn.Linear(64, 64)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            if again:
                job.load(tmp_path)
            else:
                model(torch.ones(2, 64)).sum().backward()
                optimizer.step()
            saved = [job.save(tmp_path), job.save(tmp_path)]
            model(torch.ones(2, 64)).sum().backward()
            optimizer.step()
            return saved if again else [*saved, job.save(tmp_path / "later")], job.step

    first, manifest = tmp_path / "step-1", tmp_path / "step-1" / "manifest.json"
    assert run(2, lambda _: main(False)) == [([first, first, tmp_path / "later" / "step-2"], 2)] * 2
    assert "stays as it is: this job saved or loaded it" in capfd.readouterr().err
    before = manifest.read_bytes()
    assert run(2, lambda _: main(True)) == [([first, first], 2)] * 2
    assert manifest.read_bytes() == before
