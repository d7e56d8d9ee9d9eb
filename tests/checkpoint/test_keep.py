"""keep=K: what goes, and what never goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.checkpoint import Piece, keep_newest, latest, save, verify
from shoal.comm.threads import run
from shoal.errors import SaveError, SettingError
from tests.checkpoint.ranks import META, alone


def make(root: Path, *steps: int) -> None:
    for step in steps:
        save(root, step, [Piece.whole("param", "w", torch.full((100,), float(step)))], META, rank=0, share=alone)


def keep(root: Path, count: int | None, newest: int, resumed: Path | None = None) -> None:
    keep_newest(root / f"step-{newest}", count, resumed, rank=0, share=alone)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


@pytest.mark.parametrize(
    ("count", "left"), [(1, [10]), (2, [9, 10]), (3, [5, 9, 10]), (9, [1, 5, 9, 10]), (None, [1, 5, 9, 10])]
)
def test_the_newest_stay(tmp_path: Path, count: int | None, left: list[int]) -> None:
    make(tmp_path, 1, 5, 9, 10)
    keep(tmp_path, count, 10)
    assert names(tmp_path) == sorted(f"step-{n}" for n in left)
    assert all(verify(tmp_path / f"step-{n}").step == n for n in left)


def test_newer_ones_stay(tmp_path: Path) -> None:
    """The job was taken back to step 5 and goes another way."""
    make(tmp_path, 4, 5, 9, 10, 6)
    keep(tmp_path, 1, 6)
    assert names(tmp_path) == ["step-10", "step-6", "step-9"]


def test_what_is_not_ours_or_not_whole_stays_and_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, *range(1, 10))
    (tmp_path / "step-8/rank-00000.safetensors").write_bytes(b"short")
    (tmp_path / "step-7/manifest.json").unlink()
    (tmp_path / "step-6/manifest.json").write_text('{"format": "another program"}')
    (tmp_path / "step-3/notes.txt").write_text("the best so far")
    (tmp_path / "step-2").rename(tmp_path / "best")
    (tmp_path / "step-2").symlink_to(tmp_path / "best")
    (tmp_path / "step-0").write_text("a file")
    (tmp_path / "step-01").mkdir()
    keep(tmp_path, 2, 9)
    assert names(tmp_path) == sorted(["best", *(f"step-{n}" for n in ("0", "01", 2, 3, 5, 6, 7, 8, 9))])
    assert verify(tmp_path / "best").step == 2
    assert (tmp_path / "step-3/notes.txt").exists()


def test_the_source_stays_until_enough_others_are_good(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4)
    file = tmp_path / "step-3/rank-00000.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"!")  # only its digest tells
    source = tmp_path / "elsewhere" / ".." / "step-2"
    (tmp_path / "elsewhere").mkdir()
    keep(tmp_path, 2, 4, source)
    assert names(tmp_path) == ["elsewhere", "step-2", "step-3", "step-4"]
    file.write_bytes(good)
    keep(tmp_path, 2, 4, source)
    assert names(tmp_path) == ["elsewhere", "step-3", "step-4"]


def test_nothing_goes_if_the_newest_is_not_whole(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3)
    (tmp_path / "step-3/rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(SaveError, match=r"step-3 is not whole, although it was written: .* is truncated: 0 of "):
        keep(tmp_path, 1, 3)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_deleting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Before the rename, after it, after one file, after both files of the directory."""
    make(tmp_path, 1, 2)
    calls: list[str] = []

    def counted(call: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == moment:
                raise Killed
            calls.append(call.__name__)
            return call(*args, **kwargs)

        return count

    with monkeypatch.context() as m:
        for name in ("rename", "unlink", "rmdir"):
            m.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(Killed):
            keep(tmp_path, 1, 2)
    assert calls == ["rename", "unlink", "unlink"][:moment]
    steps = [p for p in tmp_path.iterdir() if p.name.startswith("step-")]
    assert [p.name for p in sorted(steps)] == (["step-2"] if moment else ["step-1", "step-2"])
    assert all(verify(p) for p in steps)
    assert latest(tmp_path).name == "step-2"
    make(tmp_path, 3)
    keep(tmp_path, 2 - (not moment), 3)
    assert names(tmp_path) == (["step-2", "step-3"] if moment else ["step-3"])


def test_what_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, 1, 2, 3)

    def busy(*_: Any) -> None:
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as m:
        m.setattr(os, "rename", busy)
        keep(tmp_path, 1, 3)
    said = capsys.readouterr().err
    assert said.count("shoal: warning: ") == 2
    assert "step-1 is to go, and cannot be deleted: [Errno 16] Device or resource busy" in said
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]


def test_a_job_keeps_so_many(tmp_path: Path) -> None:
    """Three steps with keep=2, then a second job that goes on from the third."""

    def rank_main(_rank: int) -> int:
        with shoal.init("zero3", run_dir="none", device="cpu") as job:
            model = nn.Linear(40, 30)
            model, optimizer = job.prepare(model, torch.optim.Adam(model.parameters()))
            if tmp_path.joinpath("step-3").exists():
                job.load(tmp_path)
            for _ in range(3):
                model(torch.ones(4, 40)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                job.save(tmp_path, keep=2)
            with pytest.raises(SettingError, match="keep=0: so many checkpoints are kept"):
                job.save(tmp_path, keep=0)
            return job.step

    assert run(2, rank_main) == [3, 3]
    assert names(tmp_path) == ["step-2", "step-3"]
    assert run(3, rank_main) == [6, 6, 6]
    assert names(tmp_path) == ["step-5", "step-6"]
    assert verify(tmp_path / "step-6").step == 6
