"""One device: alone, and for two ranks through host memory."""

from __future__ import annotations

import pytest

from shoal.errors import EnvironmentFault
from tests.gpu.programs import ENV, seconds, train
from tests.pool import Pool

pytestmark = pytest.mark.gpu(1)
ONE = {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_ranks_on_one_device_equal_one(strategy: str, precision: str, pool: Pool) -> None:
    [(alone, _)] = pool.run(train, "ddp", precision, "auto", world=1, env=ENV | ONE)
    assert alone is not None
    found = pool.run(train, strategy, precision, "auto", env=ENV | ONE)
    assert found == [(alone, ["Routed", "Gloo", "Staged"]), (None, ["Routed", "Gloo", "Staged"])]


def test_nccl_wants_a_device_for_each_rank(pool: Pool) -> None:
    with pytest.raises(EnvironmentFault, match=r"carrier=nccl, but ranks 0 and 1 share a device \("):
        pool.run(train, "ddp", "float32", "nccl", env=ENV | ONE)


def test_overhead_over_the_plain_loop(pool: Pool) -> None:
    [plain] = pool.run(seconds, None, world=1, env=ENV | ONE)
    for strategy in ("ddp", "zero3"):
        [ours] = pool.run(seconds, strategy, world=1, env=ENV | ONE)
        assert ours < 1.3 * plain, strategy
