"""Sounds: the Conformer, and what it hears."""

from __future__ import annotations

import pytest
import torch

from tests.examples.short import alone, load, program, together
from tests.pool import Pool


def test_two_workers_end_in_the_bits_of_one_process(pool: Pool) -> None:
    one, two = (
        alone(pool, "sounds", {"SOUNDS": 128, "HELD_OUT": 32}, "--quick"),
        together(pool, "sounds", {"SOUNDS": 128, "HELD_OUT": 32}, "--quick"),
    )
    assert two == one


def test_the_pitch_is_heard_where_it_is() -> None:
    example = load("sounds")
    time = torch.arange(example.LENGTH) / example.RATE
    heard = {kind: example.spectra(example.sound(kind, torch.tensor([600.0]), time)[None])[0] for kind in example.KINDS}
    assert all(spectrum.isfinite().all() for spectrum in heard.values())
    early, late = (slice(2, 6), slice(-6, -2))  # frames

    def band(kind: str, frames: slice) -> float:
        return heard[kind][frames].mean(0).argmax().item()

    assert band("rising", early) < band("tone", early) == band("tone", late) < band("rising", late)
    assert band("falling", early) > band("falling", late)
    assert band("two tones", early) < band("two tones", late)


def test_held_out_sounds_are_others() -> None:
    example = load("sounds")
    (one, kinds), (other, _), (again, _) = (example.invent(16, seed) for seed in (1, 2, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert kinds.bincount().tolist() == [2] * 8


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_accuracy() -> None:
    assert float(program("sounds")["accuracy on held-out sounds"]) > 0.85
