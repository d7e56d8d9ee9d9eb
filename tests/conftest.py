"""What all tests share: the pool of workers, who runs beside whom, and the count of tests left to other targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol
from zlib import crc32

import pytest

from shoal.engine import units
from tests.pool import Pool

LEFT = pytest.StashKey[dict[str, int]]()
TARGETS = ("gpu", "system", "slow")
"""Marks of tests that have a target of make of their own."""
HERE = Path(__file__).parent
PROCESSES = (
    "benchmarks",
    "cli",
    "doctor",
    "dropin",
    "examples",
    "faults",
    "gpu",
    "launch",
    "processes",
    "system",
    "test_docs.py",
    "test_notebook.py",
    "test_pool.py",
    "test_spawn.py",
    "tutorials",
)
"""Tests that start processes: one after the other, beside those that do not."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the marks
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(HERE).parts[0] in PROCESSES:
            item.add_marker(pytest.mark.xdist_group("processes"))
        every = item.get_closest_marker("every")
        if every is not None and crc32(item.name.encode()) % every.args[0]:  # a stride would skip whole columns
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _small_units() -> Iterator[None]:
    """Every block of the tests' small models is a unit of its own, as blocks of large ones are. `units=` says otherwise."""
    before, units.SIZE = units.SIZE, 0
    yield
    units.SIZE = before


@pytest.fixture(scope="session")
def session_pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def pool(session_pool: Pool) -> Iterator[Pool]:
    """Worker processes; calls that a test left running end with it."""
    yield session_pool
    session_pool.end_running()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT] = dict.fromkeys(TARGETS, 0)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        target = next((name for name in TARGETS if item.get_closest_marker(name)), None)
        if target is not None:
            item.config.stash[LEFT][target] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # pytest-xdist: one of several processes, which all deselect the same
        output["left"] = session.config.stash[LEFT]


class Node(Protocol):
    """A process of pytest-xdist."""

    config: pytest.Config
    workeroutput: Mapping[str, dict[str, int]]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Node) -> None:
    node.config.stash[LEFT] = getattr(node, "workeroutput", {}).get("left", node.config.stash[LEFT])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr:
        left = ", ".join(f"to make test-{name}: {count}" for name, count in config.stash[LEFT].items())
        terminalreporter.write_line(f"left {left}")
