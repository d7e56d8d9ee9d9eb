"""Programs as people write them: five lines make them run on any number of ranks with the same bits."""

from __future__ import annotations

import difflib
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import shoal
from shoal.against import near
from shoal.trace import By, Trace
from shoal.verify import compare
from tests.pool import Pool

PORTED = Path(__file__).parents[2] / "examples" / "ported"
SHORT = {
    "gan": ["--n_epochs", "1", "--batch_size", "100", "--output", "saved"],
    "hf_no_trainer": ["--max_train_steps", "2", "--output_dir", "saved"],
    "imagenet": ["--epochs", "1", "--batch-size", "80", "--output", "saved"],
    "mnist": ["--epochs", "1", "--batch-size", "80", "--save-model"],
    "nanogpt": ["--max-iters", "3", "--eval-interval", "2", "--eval-iters", "1", "--out", "saved"],
    "word_language_model": ["--epochs", "1", "--words", "2000", "--batch-size", "10", "--save", "saved"],
}
"""Every program, with arguments that make it short."""
LEAVES = 6


def run(path: str, argv: list[str]) -> None:
    """Run a program as `python path argv...` would, in a process that goes on after it."""
    jobs: list[shoal.Job] = []
    init, before, dtype, threads = shoal.init, sys.argv, torch.get_default_dtype(), torch.get_num_threads()

    def remembered(*args: object, **settings: object) -> shoal.Job:
        jobs.append(init(*args, **settings))  # type: ignore[arg-type]
        return jobs[-1]

    shoal.init, sys.argv = remembered, [path, *argv]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        shoal.init, sys.argv = init, before
        for job in jobs:
            job.close()  # as the interpreter's end would
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


def trained(
    pool: Pool, name: str, folder: Path, world: int, strategy: str, *, leaves: int = LEAVES, by: By = By.SHOAL,
    double: bool = False,
) -> Trace:  # fmt: skip
    """Run a ported program. Returns all models after every step that acted."""
    work = folder / f"{world} {strategy} {by.name} {double}"
    trace = Trace(work / "trace", 10**6, by, double=double)
    trace.path.mkdir(parents=True)
    env = {**trace.variable(), "SHOAL_STRATEGY": strategy, "SHOAL_LEAVES": str(leaves), "SHOAL_RUN_DIR": "none"}
    path = str(PORTED / f"{name}.py")
    before = Path.cwd()
    os.chdir(work)
    try:
        pool.run(run, path, SHORT[name], world=world, env=env, timeout=100)
    finally:
        os.chdir(before)
    return trace


def changed(name: str) -> int:
    """How many lines a port changes or adds: of a stretch that is replaced, the longer side. Blank lines do not count."""
    plain, ported = (
        [line for line in path.read_text().splitlines() if line.strip()]
        for path in (PORTED / "plain" / f"{name}.py", PORTED / f"{name}.py")
    )
    codes = difflib.SequenceMatcher(None, plain, ported, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in codes if tag != "equal")


def test_all_are_here() -> None:
    assert {path.stem for path in PORTED.glob("*.py")} == set(SHORT)
    assert {path.stem for path in (PORTED / "plain").glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_five_lines(name: str) -> None:
    assert 3 <= changed(name) <= 5


@pytest.mark.parametrize("name", SHORT)
def test_the_page_shows_the_difference(name: str) -> None:
    """As `difflib` gives it, without the numbers of lines."""
    files = [f"plain/{name}.py", f"{name}.py"]
    plain, ported = ((PORTED / file).read_text().splitlines() for file in files)
    lines = difflib.unified_diff(plain, ported, *files, lineterm="", n=1)
    shown = "\n".join("@@" if line.startswith("@@") else line.rstrip() for line in lines)
    assert f"```diff\n{shown}\n```" in (PORTED.parents[1] / "docs" / "ported.md").read_text()


@pytest.mark.parametrize("name", SHORT)
def test_two_ranks_end_in_the_bits_of_one(name: str, pool: Pool, tmp_path: Path) -> None:
    alone, together = trained(pool, name, tmp_path, 1, "ddp"), trained(pool, name, tmp_path, 2, "zero3")
    report = compare(together.states(), alone.states())
    assert report.equal, report
    assert report.steps >= 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", SHORT)
def test_any_number_of_ranks_ends_in_the_bits_of_one(
    name: str, world: int, strategy: str, pool: Pool, tmp_path: Path
) -> None:
    alone, together = trained(pool, name, tmp_path, 1, "zero3"), trained(pool, name, tmp_path, world, strategy)
    report = compare(together.states(), alone.states())
    assert report.equal, report


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_one_leaf_is_torch_alone(name: str, pool: Pool, tmp_path: Path) -> None:
    """As `shoal verify --plain` sees it."""
    runs = (trained(pool, name, tmp_path, 1, "ddp", leaves=1, by=by) for by in (By.SHOAL, By.ALONE))
    report = compare(*(trace.states() for trace in runs))
    assert report.equal, report
    assert report.steps >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_two_leaves_are_torchs_ddp(name: str, pool: Pool, tmp_path: Path) -> None:
    """As `shoal verify --plain` sees it, in float64."""
    shoal = trained(pool, name, tmp_path, 2, "zero3", leaves=2, double=True)
    report = near(shoal.states(), trained(pool, name, tmp_path, 2, "ddp", leaves=2, by=By.DDP, double=True).states())
    assert report.equal, report
    assert report.steps >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_the_plain_program_runs(name: str, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pool.run(run, str(PORTED / "plain" / f"{name}.py"), SHORT[name], world=1)
    assert list(tmp_path.iterdir())
