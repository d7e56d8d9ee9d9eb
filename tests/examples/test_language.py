"""Language: BERT and GPT-2 of transformers."""

from __future__ import annotations

import pytest
import torch

from tests.examples.short import alone, load, program, together
from tests.pool import Pool

SMALL = {"CORPUS": 100_000, "BATCH": 8, "HELD_OUT": 16}


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_two_workers_end_in_the_bits_of_one_process(model: str, pool: Pool) -> None:
    one, two = (
        alone(pool, "language", SMALL, "--model", model, "--steps", "3"),
        together(pool, "language", SMALL, "--model", model, "--steps", "3"),
    )
    assert two == one


def test_only_masked_bytes_are_asked_for() -> None:
    example = load("language")
    text = bytes(range(256)) * 2
    windows = example.Windows(text, masks=True)
    torch.manual_seed(0)
    read, labels = windows[1]
    hidden = read == example.MASK
    assert hidden.sum() == example.MASKED
    assert (labels[~hidden] == example.IGNORED).all()
    whole = example.Windows(text, masks=False)[1][0]
    assert torch.equal(torch.where(hidden, labels, read), whole)
    assert not torch.equal(windows[1][0], read)
    torch.manual_seed(0)
    assert torch.equal(windows[1][0], read)


def test_the_loss_by_frequency() -> None:
    example = load("language")
    corpus = load("gpt_model").Corpus(train=b"ab" * 50_000, held_out=b"aaabbb", files=2)
    assert example.by_frequency(corpus) == pytest.approx(0.6957, abs=0.005)  # log 2, and a little for unseen bytes


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("model", "most"), [("bert", 2.9), ("gpt2", 2.3)])
def test_loss_on_held_out_files(model: str, most: float) -> None:
    said = program("language", "--model", model)
    assert float(said["loss on held-out files, nats a byte"]) < most < float(said["of each byte's frequency"])
