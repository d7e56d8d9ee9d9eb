"""Images: the residual network with batch norm."""

from __future__ import annotations

import pytest
import torch

from tests.examples.short import alone, load, program, together
from tests.pool import Pool


def test_two_workers_end_in_the_bits_of_one_process(pool: Pool) -> None:
    one, two = alone(pool, "digits", {"BATCH": 256}, "--quick"), together(pool, "digits", {"BATCH": 256}, "--quick")
    assert len(one.sha256) == 64
    assert two == one


def test_training_is_seen_in_the_fingerprint(pool: Pool) -> None:
    sums = {alone(pool, "digits", {"BATCH": 512}, "--quick", "--seed", seed).sha256 for seed in ("0", "1")}
    assert len(sums) == 2


def test_the_data() -> None:
    images, digits = load("digits").read()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    assert digits.bincount().min() > 170
    assert torch.equal(images, load("digits").read()[0])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_accuracy() -> None:
    assert float(program("digits")["accuracy on held-out images"]) > 0.97
