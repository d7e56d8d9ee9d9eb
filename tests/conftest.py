"""What all tests share: the pool of workers, and the count of tests left to other targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.pool import Pool

LEFT = pytest.StashKey[dict[str, int]]()


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
    config.stash[LEFT] = {"system": 0, "slow": 0}


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        target = next((name for name in ("system", "slow") if item.get_closest_marker(name)), None)
        if target is not None:
            item.config.stash[LEFT][target] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr:
        left = ", ".join(f"to make test-{name}: {count}" for name, count in config.stash[LEFT].items())
        terminalreporter.write_line(f"left {left}")
