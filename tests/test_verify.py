"""The oracle itself: distances in ulps, and what it reports."""

from __future__ import annotations

import pytest
import torch

from shoal.verify import compare, ulps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_neighbours_are_one_ulp_apart(dtype: torch.dtype) -> None:
    for value in (1.0, -1.0, 0.0, 3.75, -1e-6):
        x = torch.tensor([value], dtype=dtype)
        up = torch.nextafter(x, torch.tensor([float("inf")], dtype=dtype))
        assert ulps(x, up).tolist() == [1]
        assert ulps(up, x).tolist() == [1]


def test_zero_and_minus_zero_differ() -> None:
    assert ulps(torch.tensor([0.0]), torch.tensor([-0.0])).tolist() == [1]


def test_across_zero() -> None:
    tiny = torch.tensor([1e-45])
    assert ulps(-tiny, tiny).tolist() == [3]  # -tiny, -0, 0, tiny


def test_integers_and_complex_numbers() -> None:
    assert ulps(torch.tensor([3]), torch.tensor([7])).tolist() == [4]
    assert ulps(torch.tensor([1 + 1j]), torch.tensor([1 + 1j])).tolist() == [[0, 0]]


def test_the_first_difference_is_named() -> None:
    one = {"a": torch.zeros(2), "b": torch.ones(3)}
    two = {"a": torch.zeros(2), "b": torch.nextafter(torch.ones(3), torch.tensor([2.0, 0.5, 1.0]))}
    report = compare([one, two], [one, one])
    assert (report.equal, report.step, report.name, report.ulps, report.differing) == (False, 1, "b", 1, 2)
    assert str(report) == "different after step 1: 'b' by up to 1 ulps in 2 elements"
    assert str(compare([one, one], [one, one])) == "the same bits after each of 2 steps"
