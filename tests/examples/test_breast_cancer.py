"""Medicine: five nets as one model, and how they are judged."""

from __future__ import annotations

import pytest
import torch

from tests.examples.short import alone, load, program, together
from tests.pool import Pool


def test_two_workers_end_in_the_bits_of_one_process(pool: Pool) -> None:
    one, two = (
        alone(pool, "breast_cancer", {"BATCH": 64}, "--quick"),
        together(pool, "breast_cancer", {"BATCH": 64}, "--quick"),
    )
    assert two == one
    assert 0.5 < one.numbers["AUROC on held-out cases"] <= 1


def test_no_net_learns_from_what_judges_it() -> None:
    example = load("breast_cancer")
    fold = example.read()[2]
    taught = example.teaches(fold)
    assert (taught.sum(0) == example.FOLDS - 2).all()
    for net in range(example.FOLDS):
        assert not taught[net, fold == net].any()
        assert not taught[net, fold == (net + 1) % example.FOLDS].any()


def test_auroc() -> None:
    auroc = load("breast_cancer").auroc
    malignant = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert auroc(torch.tensor([1.0, 3.0, 2.0, 4.0]), malignant) == 1.0
    assert auroc(torch.tensor([1.0, 0.0, 2.0, 4.0]), malignant) == 0.5
    assert auroc(torch.zeros(4), malignant) == 0.5


def test_calibration_error() -> None:
    error = load("breast_cancer").calibration_error
    logits = torch.full((10,), 0.8).logit()
    assert error(logits, torch.tensor([1.0] * 8 + [0.0] * 2)) == pytest.approx(0.0, abs=1e-6)
    assert error(logits, torch.zeros(10)) == pytest.approx(0.8)
    assert error(torch.tensor([100.0, -100.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5)


def test_a_temperature_takes_back_what_was_too_sure() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, generator=generator)
    malignant = (torch.rand(20_000, generator=generator) < logits.sigmoid()).float()
    assert load("breast_cancer").temperature(3 * logits, malignant).item() == pytest.approx(3.0, rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_scaled_probabilities_are_better_calibrated() -> None:
    said = program("breast_cancer")
    assert float(said["AUROC on held-out cases"]) > 0.98
    assert float(said["calibration error with temperatures"]) < float(said["calibration error"])
