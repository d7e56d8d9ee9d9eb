"""What the short examples share."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

from tests.examples.short import alone, load, program
from tests.pool import Pool


@pytest.mark.slow
def test_as_a_program(pool: Pool) -> None:
    said = program("breast_cancer", "--epochs", "1", "--strategy", "zero3", "--workers", "2")
    one = alone(pool, "breast_cancer", {}, "--epochs", "1")
    assert said.pop("sha256 of parameters and buffers") == one.sha256
    assert said == {name: f"{value:.4f}" for name, value in one.numbers.items()}


def test_quick_gives_way_to_what_is_asked_for() -> None:
    common = load("common")
    parser = common.options("A line.\n\nMore.", epochs=(9, 2), size=(5, 1))
    assert common.parse(parser, []).epochs == 9
    assert common.parse(parser, ["--quick"]).epochs == 2
    quick = common.parse(parser, ["--quick", "--epochs", "3"])
    assert (quick.epochs, quick.size) == (3, 1)
    assert parser.description == "A line."


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strategy", "zero4"], "invalid choice: 'zero4'"),
        (["--epochs", "0"], "0: at least 1"),
        (["--workers", "-1"], "-1: at least 1"),
        (["--leaves", "0"], "0: at least 1"),
    ],
)
def test_impossible_options(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    common = load("common")
    with pytest.raises(SystemExit) as end:
        common.parse(common.options("A line.", epochs=(9, 2)), options)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_the_learning_rate_rises_and_falls() -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = load("common").cosine(optimizer, 20)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    top = rates.index(max(rates))
    assert top == 2
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.02
