"""A save that fails, on a disk that is full or may not be written, changes nothing: not the older ones, not the numbers."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import shoal
from shoal.checkpoint import verify
from shoal.comm.threads import run
from shoal.errors import DamagedError, SaveError
from tests.pool import Pool

SMALL = 20_000  # bytes that a file may have; each rank's part is larger


def train(root: str | None, failing: Callable[[shoal.Job, Path], str]) -> tuple[str, list[str]]:
    """Four steps; saves after the first, the second, which fails, and the fourth. The model's bits and what was told."""
    told: list[str] = []
    with shoal.init("zero3", run_dir="none", device="cpu", leaves=2) as job:
        model = nn.Sequential(nn.Linear(60, 100), nn.Dropout(0.2), nn.Linear(100, 60))
        model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters()))
        while job.step < 4:
            model(torch.randn(4, 60)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if job.stepped and root is not None and job.step in (1, 4):
                job.save(root, keep=3)
            if job.stepped and root is not None and job.step == 2:
                told.append(failing(job, Path(root)))
        state = job.state_dict(model)
    digest = hashlib.sha256()
    for tensor in state.values():
        assert isinstance(tensor, torch.Tensor)
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest(), told


def on_a_full_disk(job: shoal.Job, root: Path) -> str:
    """Rank 1 may not write large files: a limit of its own, and the system's own error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if job.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, hard))
    try:
        with pytest.raises(SaveError) as e:
            job.save(root, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return str(e.value)


def in_a_process(root: str | None) -> tuple[str, list[str]]:
    return train(root, on_a_full_disk)


def test_a_full_disk(pool: Pool, tmp_path: Path) -> None:
    root = tmp_path / "run"
    saving = pool.run(in_a_process, str(root), world=2)
    plain = pool.run(in_a_process, None, world=2)
    assert saving[0][0] == plain[0][0]
    (text,) = saving[0][1]
    assert saving[1][1] == [text]
    assert text.startswith(f"shoal[E42] {root}/step-2 was not saved: rank 1: [Errno 27] File too large")
    assert sorted(p.name for p in root.iterdir()) == ["step-1", "step-4"]
    assert [verify(root / f"step-{n}").step for n in (1, 4)] == [1, 4]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that nobody may enter and write while this process is not root."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o777)
    yield place
    place.chmod(0o700)
    shutil.rmtree(place)


def test_a_directory_that_may_not_be_written(place: Path) -> None:
    me = os.geteuid()

    def failing(job: shoal.Job, root: Path) -> str:
        if job.rank == 0:  # who makes the directory
            root.chmod(0o555)
            os.seteuid(65534 if me == 0 else me)  # root may write anywhere
        try:
            with pytest.raises(SaveError) as e:
                job.save(root)
        finally:
            if job.rank == 0:
                os.seteuid(me)
                root.chmod(0o777)
        return str(e.value)

    saving = run(2, lambda _rank: train(str(place), failing))
    plain = run(2, lambda _rank: train(None, failing))
    assert saving[0][0] == plain[0][0]
    (text,) = saving[0][1]
    assert saving[1][1] == [text]
    assert f"{place}/step-2 was not saved: rank 0: [Errno 13] Permission denied" in text
    assert "older checkpoints are as they were" in text
    assert sorted(p.name for p in place.iterdir()) == ["step-1", "step-4"]
    assert [verify(place / f"step-{n}").step for n in (1, 4)] == [1, 4]


def test_the_line_that_a_refusal_names_works(tmp_path: Path) -> None:
    """The newest was cut short while it was copied; the same job then loads what the error names."""

    def rank_main(_rank: int) -> tuple[int, str]:
        with shoal.init("zero3", run_dir="none", device="cpu") as job:
            model = nn.Linear(60, 100)
            model, optimizer = job.prepare(model, torch.optim.Adam(model.parameters()))
            if not resumed:
                for _ in range(3):
                    model(torch.randn(4, 60)).square().sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    job.save(tmp_path)
                return job.step, ""
            with pytest.raises(DamagedError) as e:
                job.load(tmp_path)
            (line,) = re.findall(r"job\.load\('(.*?)'\)", e.value.remedy)
            return job.load(line), e.value.what

    resumed = False
    assert run(2, rank_main) == [(3, "")] * 2
    (tmp_path / "step-3/manifest.json").unlink()
    resumed = True
    assert run(3, rank_main) == [(2, f"{tmp_path}/step-3/manifest.json is missing")] * 3
