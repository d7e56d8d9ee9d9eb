"""Work that takes longer than `timeout`, between real processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import shoal
from tests.pool import Pool


def slow(kind: str, path: str) -> list[object]:
    """A program of one rank whose work takes longer than `timeout`."""

    def work() -> str:
        time.sleep(3)
        with Path(path).open("a") as file:
            file.write("x")
        return "done"

    with shoal.init("ddp", run_dir="none", timeout=1.0) as job:
        if kind == "once":
            return [job.once(work)]
        with job.main as here:
            if here:
                work()
        job.barrier()
        return ["done"]


@pytest.mark.parametrize("kind", ["once", "main"])
def test_the_clock_stops_meanwhile(kind: str, pool: Pool, tmp_path: Path) -> None:
    assert pool.run(slow, kind, str(tmp_path / "worked")) == [["done"], ["done"]]
    assert (tmp_path / "worked").read_text() == "x"
