"""A small job, and a checkpoint of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.checkpoint import save
from tests.checkpoint.ranks import META, Job, make_job, on_ranks


@pytest.fixture
def job() -> Job:
    return make_job()


@pytest.fixture
def saved(tmp_path: Path, job: Job) -> Path:
    """That job as step 5, saved by two ranks."""
    layout = job.layout(2)
    paths = on_ranks(2, lambda r, share: save(tmp_path, 5, job.pieces(r, layout), META, rank=r, share=share))
    assert paths == [tmp_path / "step-5"] * 2
    return paths[0]
