"""A device for each of two ranks."""

from __future__ import annotations

import signal
import time

import pytest

from shoal.errors import PeerLost, StalledError
from tests.gpu.programs import ENV, TIMEOUT, differs, killed, reduced, train
from tests.pool import Pool

pytestmark = pytest.mark.gpu(2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_equals_one_device(strategy: str, precision: str, pool: Pool) -> None:
    [(alone, _)] = pool.run(train, "ddp", precision, "auto", world=1, env=ENV)
    found = pool.run(train, strategy, precision, "nccl", env=ENV)
    assert found == [(alone, ["Routed", "Gloo", "Nccl"]), (None, ["Routed", "Gloo", "Nccl"])]


def test_a_killed_rank_is_named(pool: Pool) -> None:
    begin = time.monotonic()
    first, second = pool.start(killed, env=ENV).results(60, grace=2 * TIMEOUT)
    assert second.signal == signal.SIGKILL
    assert isinstance(first.exception, PeerLost), first.error
    assert first.exception.what.startswith("rank 1 is gone; rank 0 was in '")
    assert time.monotonic() - begin < 40


def test_what_does_not_match_is_named(pool: Pool) -> None:
    for result in pool.start(differs, env=ENV).results(60, grace=10):
        assert isinstance(result.exception, StalledError), result.error
        assert "rank 0 waits in 'order swap all #1'" in result.exception.what
        assert "rank 1 waits in 'order other all #1'" in result.exception.what


def test_reductions(pool: Pool) -> None:
    total = [1.0, 3.0, 5.0, 7.0]
    assert pool.run(reduced, env=ENV) == [[total, total[:2], [0.0, 1.0]], [total, total[2:], [0.0, 1.0]]]
