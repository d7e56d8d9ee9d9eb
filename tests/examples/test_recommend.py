"""Recommendation: two towers with wide embeddings."""

from __future__ import annotations

import pytest
import torch

from tests.examples.short import alone, load, program, together
from tests.pool import Pool

SMALL = {"USERS": 300, "ITEMS": 400, "BATCH": 256}


def test_two_workers_end_in_the_bits_of_one_process(pool: Pool) -> None:
    one, two = alone(pool, "recommend", SMALL, "--quick"), together(pool, "recommend", SMALL, "--quick")
    assert two == one
    assert len(one.numbers) == 2


def test_choices_are_made_once_and_some_items_are_popular(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("recommend")
    monkeypatch.setattr(example, "USERS", 500)
    choices = example.invent()
    assert choices.shape == (500, example.CHOICES)
    assert all(len(set(mine)) == len(mine) for mine in choices.tolist())
    counts = choices.flatten().bincount(minlength=example.ITEMS).sort(descending=True).values
    assert counts[: example.ITEMS // 10].sum() > 0.4 * counts.sum()
    assert torch.equal(choices, example.invent())


def test_recall_leaves_out_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("recommend")
    monkeypatch.setattr(example, "TOP", 1)
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    known = torch.tensor([[0], [1]])
    assert example.recall(scores, known, torch.tensor([1, 0])) == 1.0
    assert example.recall(scores, known, torch.tensor([1, 2])) == 0.5
    assert example.recall(scores, known, torch.tensor([0, 1])) == 0.0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_better_than_the_most_popular() -> None:
    said = program("recommend")
    assert float(said["recall@20 of held-out choices"]) > 1.4 * float(said["recall@20 of the most popular"])
