"""`shoal run`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli import app
from tests.cli.test_main import MAIN


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)


def shoal_run(script: str, *before: str, after: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    Path("train.py").write_text(script)
    command = [*MAIN, "run", *before, "train.py", *after]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_what_follows_the_script_belongs_to_it() -> None:
    after = ("--workers", "3", "--help", "--", "-x", "--json")
    done = shoal_run("import sys; print(sys.argv)", "--workers", "2", after=after)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{['train.py', *after]}\n", "")


def test_options_reach_the_workers_as_flags() -> None:
    script = """
import os
from shoal.settings import resolve
resolved = resolve({"seed": 1, "threads": 2}, environ=os.environ, cwd=".")
print("\\n".join(line for line in resolved.table().splitlines() if not line.endswith("default")))
"""
    before = (
        "--strategy", "zero3", "--leaves", "4", "--seed", "7", "--precision", "bfloat16", "--timeout", "3",
        "--set", "cut=parameter", "--set", "overlap=false", "--run-dir", "here",
    )  # fmt: skip
    assert shoal_run(script, *before).stdout.splitlines() == [
        "strategy        zero3      flag --strategy",
        "leaves          4          flag --leaves",
        "precision       bfloat16   flag --precision",
        "cut             parameter  flag --set cut",
        "seed            7          flag --seed",
        "threads         2          code",
        "timeout         3.0        flag --timeout",
        "overlap         false      flag --set overlap",
        "run_dir         here       flag --run-dir",
    ]
    assert Path("here/events.jsonl").exists()


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("", 0),
        ("raise ValueError", 1),
        ("from shoal.errors import BatchError as E; raise E('no')", 2),
        ("from shoal.errors import DamagedError as E; raise E('no')", 4),
        ("from shoal.errors import EnvironmentFault as E; raise E('no')", 5),
    ],
)
def test_exit_codes(script: str, code: int) -> None:
    assert shoal_run(script).returncode == code


def test_json_outcome_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    script = "import os; print('hello'); rank = int(os.environ['RANK'])\nif rank: raise ValueError('boom')"
    done = shoal_run(script, "--workers", "2", "--run-dir", "here", "--json")
    outcome = json.loads(done.stdout)
    assert done.returncode == outcome["exit_code"] == 1
    assert outcome["run_dir"] == str(tmp_path / "here")
    assert [(rank["rank"], rank["exit_code"], rank["end"]) for rank in outcome["ranks"]] == [
        (0, 0, "rank 0 had finished"),
        (1, 1, "rank 1: ValueError: boom"),
    ]
    assert outcome["ranks"][0]["failure"] is None
    assert outcome["ranks"][1]["failure"] == json.loads(Path("here/failure-1.json").read_text())
    assert "hello" in done.stderr


MISTAKES = {
    ("gone.py",): ("E02", "there is no script 'gone.py' in ", "the path of a Python file"),
    ("--set", "seed", "gone.py"): ("E02", "--set seed has no value", "--set seed=VALUE"),
    ("--seed", "1", "--set", "seed=2", "gone.py"): ("E02", "seed is given twice: 1 and 2", "leave one of them out"),
    ("--set", "leafs=2", "here.py"): ("E02", "unknown setting 'leafs' (flag --set leafs)", "did you mean 'leaves'? "),
    ("--strategy", "zero9", "here.py"): ("E01", "there is no strategy 'zero9'", "did you mean 'zero3'? "),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words: tuple[str, ...]) -> None:
    Path("here.py").touch()
    code, what, remedy = MISTAKES[words]
    said = CliRunner().invoke(app, ["run", *words])
    assert (said.exit_code, said.stdout) == (2, "")
    assert said.stderr.startswith(f"shoal[{code}] {what}")
    assert f"\n  try:   {remedy}" in said.stderr
    told = CliRunner().invoke(app, ["run", "--json", *words])
    assert (told.exit_code, told.stderr) == (2, "")
    record = json.loads(told.stdout)
    assert list(record) == ["code", "what", "cause", "remedy"]
    assert record["code"] == code
    assert record["what"].startswith(what)
    assert record["remedy"].startswith(remedy)
