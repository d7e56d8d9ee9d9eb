"""What differs from leaf to leaf: blocks that are skipped, parameters that are not used, leaves without backward."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
from torch import Tensor, nn

from tests.engine.test_models import WIDTH, Block, Stack
from tests.engine.trials import PLACES, Leaf, Result, adamw, assert_same, inputs, plain, train


class Chosen(Stack):
    """Uses the blocks that it is told to use, in that order."""

    def forward(self, x: Tensor, chosen: list[int]) -> Tensor:
        x = self.first(x)
        for i in chosen:
            x = self.blocks[i](x)
        return self.last(x)


def choosing(choose: Callable[[int, int], list[int]]) -> Leaf:
    def leaf(model: nn.Module, step: int, number: int) -> Tensor:
        return model(inputs(step, number, 3, 5), choose(step, number)).square().mean()

    return leaf


def dropped(*key: int) -> list[int]:
    """Each of six blocks stays with one half."""
    generator = random.Random(str(key))
    return [i for i in range(6) if generator.random() < 0.5]


class Experts(nn.Module):
    """One unit with experts of which a leaf uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList([Choice(), Choice()])

    def forward(self, x: Tensor, expert: int) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x, expert)
        return self.last(x)


class Choice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expert0, self.expert1, self.expert2 = Block(), Block(), Block()

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return x if expert == 3 else self.get_submodule(f"expert{expert}")(x)


def one_expert(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 3, 5), (step + number) % 4).square().mean()


def no_backward_for_some(model: nn.Module, step: int, number: int) -> Tensor:
    """As a loop does that skips losses that are not finite."""
    loss = model(inputs(step, number, 3, 5)).square().mean()
    return loss.detach() if number == (step + 1) % 4 else loss


def no_backward_in_the_first_leaf(model: nn.Module, step: int, number: int) -> Tensor:
    loss = model(inputs(step, number, 3, 5)).square().mean()
    return loss.detach() if step == 0 and number in (0, 1, 2) else loss


CASES: dict[str, tuple[Callable[[], nn.Module], Leaf]] = {
    "a block in some leaves": (lambda: Chosen(3), choosing(lambda _s, n: [0, 1, 2] if n == 1 else [0, 2])),
    "a block in some steps": (lambda: Chosen(3), choosing(lambda s, _n: [0, 1, 2] if s == 1 else [0, 2])),
    "a block in the first step only": (lambda: Chosen(3), choosing(lambda s, _n: [0, 1] if s else [0, 1, 2])),
    "the first block later": (lambda: Chosen(3), choosing(lambda s, _n: [0, 1, 2] if s else [1, 2])),
    "the last block later": (lambda: Chosen(3), choosing(lambda s, _n: [0, 1, 2] if s else [0, 1])),
    "all blocks later": (lambda: Chosen(3), choosing(lambda s, _n: [0, 1, 2] if s else [])),
    "layer drop, alike on all ranks": (lambda: Chosen(6), choosing(lambda s, _n: dropped(s))),
    "layer drop, per leaf": (lambda: Chosen(6), choosing(lambda s, n: dropped(s, n))),
    "layer drop, after a whole first step": (lambda: Chosen(6), choosing(lambda s, n: dropped(s, n) if s else list(range(6)))),
    "experts": (Experts, one_expert),
    "no backward for some": (Stack, no_backward_for_some),
    "no backward in the first leaf": (Stack, no_backward_in_the_first_leaf),
}  # fmt: skip


@cache
def reference(case: str) -> Result:
    make_model, leaf = CASES[case]
    return plain(make_model, leaf, make_optimizer=adamw, steps=4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_leaves_that_differ(case: str, place: str) -> None:
    make_model, leaf = CASES[case]
    assert_same(train(place, make_model, leaf, make_optimizer=adamw, steps=4), reference(case))


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("case", CASES)
def test_leaves_that_differ_in_a_world_of_one(case: str, strategy: str) -> None:
    """Where gradients stay the tensors that autograd made."""
    make_model, leaf = CASES[case]
    assert_same(train((1, strategy), make_model, leaf, make_optimizer=adamw, steps=4), reference(case))


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("case", ["layer drop, per leaf", "experts"])
def test_whoever_runs_first(case: str, order: int) -> None:
    make_model, leaf = CASES[case]
    for world in (3, 4):
        got = train((world, "zero3"), make_model, leaf, make_optimizer=adamw, steps=4, order=order)
        assert_same(got, reference(case))
