"""The directory of a run."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from shoal.errors import EnvironmentFault
from shoal.launch.rundir import RunDir, make_run_dir, open_run_dir
from shoal.settings import ACTIVE_RUN_DIR, resolve


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(code: dict[str, object], environ: dict[str, str]) -> RunDir | None:
    return open_run_dir(resolve(code, environ={}, cwd="/"), environ=environ)


def test_fresh_directories_are_named_after_the_time_and_differ(tmp_path: Path) -> None:
    paths = [make_run_dir(None, tmp_path) for _ in range(3)]
    assert len(set(paths)) == 3
    for path in paths:
        assert path.parent == tmp_path / "runs"
        assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{os.getpid()}(-[23])?", path.name)


@pytest.mark.parametrize(
    ("code", "environ", "path"),
    [
        ({"run_dir": "here/it/is"}, {}, "here/it/is"),
        ({"run_dir": "here"}, {ACTIVE_RUN_DIR: "there"}, "there"),
        ({"run_dir": "none"}, {ACTIVE_RUN_DIR: "there"}, "there"),
        ({"run_dir": "here"}, {ACTIVE_RUN_DIR: "none"}, None),
        ({"run_dir": "none"}, {}, None),
    ],
)
def test_which_directory(code: dict[str, object], environ: dict[str, str], path: str | None, tmp_path: Path) -> None:
    run_dir = opened(code, environ)
    if run_dir is None:
        assert path is None
        assert list(tmp_path.iterdir()) == []
    else:
        with run_dir:
            assert path is not None
            assert run_dir.path == tmp_path / path


def test_settings_and_events_are_kept(tmp_path: Path) -> None:
    before = time.time()
    for n in range(2):  # a run that goes on in the same directory
        run_dir = opened({"run_dir": "here", "seed": 3 + n}, {})
        assert run_dir is not None
        with run_dir:
            run_dir.event("saved", step=n, path=Path("x"))
            lines = (tmp_path / "here/events.jsonl").read_text().splitlines()  # flushed
    events = [json.loads(line) for line in lines]
    assert [(e["event"], e["step"], e["path"]) for e in events] == [("saved", 0, "x"), ("saved", 1, "x")]
    assert before <= events[0]["time"] <= events[1]["time"] <= time.time()
    settings = json.loads((tmp_path / "here/settings.json").read_text())
    assert settings["seed"] == {"value": 4, "origin": "code"}
    assert settings["leaves"] == {"value": None, "origin": "default"}


@pytest.mark.parametrize(
    ("blocked", "path", "reason"),
    [
        ("here", "here", "File exists"),
        ("here", "here/deeper", "Not a directory"),
        ("here/events.jsonl/x", "here", "Is a directory"),
        ("here/settings.json/x", "here", "Is a directory"),
    ],
)
def test_a_directory_that_cannot_be_written(blocked: str, path: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).touch()
    with pytest.raises(EnvironmentFault) as caught:
        opened({"run_dir": path}, {})
    assert str(caught.value) == (
        f"shoal[E50] the run directory {tmp_path / path} cannot be written: {reason}\n"
        "  try:   another run_dir, or run_dir=none"
    )
