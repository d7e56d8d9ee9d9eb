"""The code in README and docs runs, and what it promises to print is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.strategy import Strategy

ROOT = Path(__file__).parent.parent
QUESTIONS = ROOT / "docs" / "questions.md"
WITH_CODE = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in p.read_text()]
PAGES = [p for p in WITH_CODE if p != QUESTIONS]
TOGETHER = """
import sys
for number, block in enumerate(sys.argv[1:], 1):
    exec(compile(f"import shoal\\n{block}", f"question {number}", "exec"), {"__name__": "__main__"})
"""


def blocks_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_runs(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks_of(page.read_text())):
        script = tmp_path / f"block{number}.py"
        script.write_text(f"import shoal\n{block}")
        ended = subprocess.run(
            [sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=100
        )
        assert ended.returncode == 0, f"{page.name}, block {number}:\n{ended.stderr}"


def test_fifty_questions_are_answered_and_run(tmp_path: Path) -> None:
    """In one process, each answer with names of its own: fifty would spend minutes on importing torch."""
    asked = re.findall(r"^### (\d+)\. .*\?$", QUESTIONS.read_text(), flags=re.MULTILINE)
    assert asked == [str(number) for number in range(1, 51)]
    each = [blocks_of(part) for part in QUESTIONS.read_text().split("\n### ")[1:]]
    assert all(len(found) == 1 and "assert " in found[0] for found in each)
    command = [sys.executable, "-W", "error", "-c", TOGETHER, *(found[0] for found in each)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr


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
