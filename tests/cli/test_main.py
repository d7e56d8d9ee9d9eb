"""The command line as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from shoal.cli import app

MAIN = [sys.executable, "-c", "import sys; sys.argv[0] = 'shoal'; from shoal.cli import main; main()"]
VERBS = [["run"], ["verify"], ["doctor"], ["checkpoint", "inspect"], ["checkpoint", "verify"], ["checkpoint", "export"]]


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "shoal", "--help"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Train one PyTorch model with many workers." in done.stdout


@pytest.mark.parametrize("words", [[], ["checkpoint"], *VERBS])
def test_help_does_not_import_torch(words: list[str]) -> None:
    program = f"""
import sys
sys.argv = ["shoal", *{words}, "--help"]
from shoal.cli import main
try:
    main()
except SystemExit as left:
    assert left.code == 0, left.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {' '.join(['shoal', *words])} ")


@pytest.mark.parametrize("words", VERBS)
def test_every_verb_has_an_example_and_json(words: list[str]) -> None:
    text = CliRunner().invoke(app, [*words, "--help"]).output
    assert f"  Example:\n    shoal {' '.join(words)} " in text
    assert "--json" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["trian"], "No such command 'trian'"),
        (["run"], "Missing argument 'script'"),
        (["run", "--wrkers", "2", "x.py"], "No such option: --wrkers (Possible options: --workers)"),
        (["run", "--workers", "two", "x.py"], "Invalid value for '--workers': "),
        (["checkpoint", "inspect"], "Missing argument 'path'"),
    ],
)
def test_usage_errors(words: list[str], text: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert text in done.stderr
    assert done.stdout == ""
