"""The code in README and docs runs, and what it promises to print is printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shoal.settings import Settings
from shoal.strategy import Strategy

ROOT = Path(__file__).parent.parent
QUESTIONS = ROOT / "docs" / "questions.md"
WITH_CODE = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in p.read_text()]
PAGES = [p for p in WITH_CODE if p != QUESTIONS]
TOGETHER = """
import json, os, sys
for name, folder, block in json.load(sys.stdin):
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    exec(compile(f"import shoal\\n{block}", name, "exec"), {"__name__": "__main__"})
"""
"""In one process, each block with names of its own: to import torch for each of them would take minutes."""


def blocks_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_setting_is_named() -> None:
    page = (ROOT / "docs" / "start.md").read_text()
    settings = re.search(r"the same name everywhere: (.*?)\. Those", page, flags=re.DOTALL)
    assert settings is not None
    assert set(re.findall(r"`(\w+)`", settings[1])) == set(Settings.model_fields)


def test_code_runs(tmp_path: Path) -> None:
    blocks = [
        (f"{page.relative_to(ROOT)}, block {number}", str(tmp_path / page.stem), block)
        for page in PAGES
        for number, block in enumerate(blocks_of(page.read_text()), 1)
    ]
    assert len(blocks) > 20
    run_together(blocks, tmp_path)


def run_together(blocks: Sequence[tuple[str, str, str]], folder: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", TOGETHER]
    ended = subprocess.run(command, cwd=folder, input=json.dumps(blocks), capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr


def test_fifty_questions_are_answered_and_run(tmp_path: Path) -> None:
    asked = re.findall(r"^### (\d+)\. .*\?$", QUESTIONS.read_text(), flags=re.MULTILINE)
    assert asked == [str(number) for number in range(1, 51)]
    each = [blocks_of(part) for part in QUESTIONS.read_text().split("\n### ")[1:]]
    assert all(len(found) == 1 and "assert " in found[0] for found in each)
    run_together([(f"question {n}", str(tmp_path), found[0]) for n, found in enumerate(each, 1)], tmp_path)


def test_readme_shows_the_rules_as_they_are() -> None:
    assert Strategy.named("zero3").explain() in (ROOT / "README.md").read_text()


def test_every_error_is_drawn() -> None:
    """The tree in the docstring of errors.py has every class with its code."""
    import shoal.errors

    text = shoal.errors.__doc__ or ""
    for name, value in vars(shoal.errors).items():
        if isinstance(value, type) and issubclass(value, shoal.errors.ShoalError):
            assert name in text
            if "code" in vars(value) and value is not shoal.errors.ShoalError:
                assert re.search(rf"{name} +{value.code} ", text), name
