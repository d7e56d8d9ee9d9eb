"""The main job, short: with real workers, on the real text."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import sysconfig
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SHOAL_")

Found = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _imports() -> None:
    sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def gpt() -> ModuleType:
    return import_module("gpt")


@pytest.fixture
def gpt_model() -> ModuleType:
    return import_module("gpt_model")


@pytest.fixture
def gpt_report() -> ModuleType:
    return import_module("gpt_report")


def run(*options: str, **place: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(PLACES)} | place
    command = [sys.executable, str(EXAMPLES / "gpt.py"), "--quick", *options]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with two workers leaves behind."""
    out = tmp_path_factory.mktemp("gpt") / "out"
    done = run("--strategy", "zero3", "--workers", "2", "--proof", "32", "--out", str(out))  # the whole run
    assert done.returncode == 0, done.stderr
    (out / "stdout").write_text(done.stdout)
    return out


@pytest.fixture
def found(out: Path) -> Found:
    return json.loads((out / "report.json").read_text())


def test_two_workers_end_in_the_bits_of_one_process(found: Found, out: Path) -> None:
    here, alone = found["proof"]["here"], found["proof"]["alone"]
    assert len(here) == 64
    assert here == alone
    told = (out / "stdout").read_text()
    assert told.count(here) == 2
    assert "same bits: yes" in told


def test_the_loss_falls_on_files_that_were_held_out(found: Found) -> None:
    losses, looks = found["progress"]["losses"], found["progress"]["held_out"]
    assert len(losses) == found["progress"]["steps"] == 32
    assert looks[0][1] > 5.0
    assert found["loss"] < 4.0
    assert all(math.isfinite(loss) for loss in losses)


def test_each_rank_holds_less_than_plain_data_parallelism(found: Found) -> None:
    uses, plain = found["progress"]["uses"], found["plain"]
    assert [use["rank"] for use in uses] == [0, 1]
    for use in uses:
        assert use["memory"]["parameters"] == 0  # between steps
        assert use["memory"]["optimizer"] < 0.51 * plain["optimizer"] + 1000
        state = sum(size for kind, size in use["memory"].items() if kind != "staging")  # of a fixed size
        assert state < sum(plain.values())
        assert use["sent"] > 0


def test_what_is_left_behind(out: Path) -> None:
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "checkpoint" / "step-32" / "manifest.json").is_file()
    assert (out / "run" / "events.jsonl").is_file()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "The same bits." in page
    HTMLParser().feed(page)


@pytest.mark.slow
def test_a_worker_of_another_launcher_replaces_an_earlier_run(out: Path) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = run("--steps", "4", "--out", str(out), **alone, MASTER_PORT=port)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (out / "checkpoint").iterdir()] == ["step-4"]
    assert "step 1/4" in done.stdout  # no terminal: lines


# ---------------------------------------------------------------- options


def test_quick_gives_way_to_what_is_asked_for(gpt: ModuleType) -> None:
    options = gpt.parse(["--quick", "--steps", "7"])
    assert (options.steps, options.width) == (7, gpt.QUICK["width"])
    assert gpt.parse([]).width > options.width
    assert gpt.parse(["--strategy", "hybrid", "--leaves", "4"]).leaves == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strategy", "zero4"], "invalid choice: 'zero4'"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--leaves", "0"], "--leaves 0: at least 1"),
        (["--width", "100", "--heads", "8"], "--width 100 does not divide into --heads 8 of even width"),
        (["--steps", "2", "--proof", "3"], "--proof 3 is more than --steps 2"),
    ],
)
def test_impossible_options(gpt: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        gpt.parse(options)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_strange_checkpoint_is_left_alone(gpt: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "step-1").mkdir(parents=True)
    with pytest.raises(SystemExit, match="is there, and not from this program: choose another --out"):
        gpt.claim(tmp_path)
    assert (tmp_path / "checkpoint" / "step-1").is_dir()


def test_too_little_text(gpt: ModuleType, gpt_model: ModuleType) -> None:
    corpus = gpt_model.Corpus(train=b"x" * 500, held_out=b"x" * 500, files=2)
    options = gpt.parse(["--quick", "--batch", "16"])
    with gpt.open_job(options, "none") as job:
        with pytest.raises(SystemExit, match="--batch 16 windows of --context 64 are more than the text of --corpus 2"):
            gpt.start(job, options, corpus)
        with pytest.raises(SystemExit, match="--batch 16 is too large for 500 bytes of held-out text"):
            gpt.held_out(job, corpus, options, 64)


def test_no_matplotlib(gpt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(sys, "argv", ["gpt.py"])
    with pytest.raises(SystemExit, match=r"pip install 'shoal\[examples\]'"):
        gpt.main()


# ---------------------------------------------------------------- pieces


def test_other_bits_are_told_and_end_in_failure(
    gpt: ModuleType, gpt_report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    progress = gpt_report.Progress(title="", steps=2, tokens=1, losses=[2.0, 1.0], held_out=[(0, 3.0), (2, 1.5)])
    report = gpt_report.Report(
        command="", strategy="zero3", workers=2, leaves=2, parameters=1, progress=progress, loss=1.5, held_out_bytes=1,
        plain=gpt_report.plain_memory(1, "float32"), sample="<a&b>\x1b", checkpoint="", seconds=1.0,
        proof=gpt_report.Proof(steps=1, here="a", alone=""),
    )  # fmt: skip
    options = argparse.Namespace(out=tmp_path)
    monkeypatch.setattr(gpt, "fingerprint_alone", lambda _job: "b")
    assert gpt.finish(report, None, options, 0.0) == 1
    assert "same bits: no" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "DIFFERENT." in page
    assert "&lt;a&amp;b&gt;" in page
    assert gpt.finish(replace(report, proof=replace(report.proof, here="b")), None, options, 0.0) == 0


def test_whole_files_are_held_out_by_their_names(
    gpt_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(60):
        (tmp_path / f"{i}.py").write_text(f"{i:03}\n")
    for skipped in ("test", "site-packages"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "a.py").write_text("no")
    (tmp_path / "binary.py").write_bytes(b"\0")
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    corpus = gpt_model.read_corpus(10_000)
    learned, held_out = ({text[i : i + 4] for i in range(0, len(text), 4)} for text in (corpus.train, corpus.held_out))
    assert corpus.files == len(learned) + len(held_out) == 60
    assert not learned & held_out
    assert gpt_model.read_corpus(len(corpus.train) - 20).train == corpus.train[:-20]


def test_a_library_without_source(gpt_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="too little source of Python's standard library below"):
        gpt_model.read_corpus(1000)


def test_the_live_view_shows_what_is_known(gpt_report: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    progress = gpt_report.Progress(title="zero3, 1 ranks", steps=4, tokens=100)
    console = gpt_report.Console(width=100)
    console.print(gpt_report.panel(progress))
    assert "starts" in capsys.readouterr().out
    progress.uses.append(gpt_report.Use(rank=0, memory={"masters": 2_000_000}, sent=3_000_000))
    progress.resume()
    progress.add(2.5)
    console.print(gpt_report.panel(progress))
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("1/4", "2.500", "2.0 MB", "3.0 MB"))
    assert "step 1/4  loss 2.500" in gpt_report.line(progress)


def test_a_view_is_drawn_seldom(gpt_report: ModuleType) -> None:
    drawn: list[int] = []
    draw = gpt_report.seldom(lambda: drawn.append(1), 3600.0)
    for _ in range(5):
        draw()
    assert drawn == [1]
