"""The code in README and docs runs, and what it promises to print is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.strategy import Strategy

ROOT = Path(__file__).parent.parent
PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in p.read_text()]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_runs(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page)):
        script = tmp_path / f"block{number}.py"
        script.write_text(f"import shoal\n{block}")
        ended = subprocess.run(
            [sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=100
        )
        assert ended.returncode == 0, f"{page.name}, block {number}:\n{ended.stderr}"


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
