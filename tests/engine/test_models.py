"""Models of every shape train to the bits of a plain PyTorch loop over the leaves, under every strategy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tests.engine.trials import PLACES, Leaf, Result, adamw, assert_same, inputs, plain, train

WIDTH = 68  # a block of this width is a unit of its own


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.back = nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(torch.tanh(self.out(torch.tanh(self.into(x)))))


class Stack(nn.Module):
    """Blocks, and something before and after them."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def square(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 3, 5)).square().mean()


def frozen(*names: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Stack()
        for name in names:
            model.get_submodule(name).requires_grad_(False)
        return model

    return make


class Tied(Stack):
    """The last block's matrix is the first's; input and output share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].into.weight = self.blocks[0].into.weight
        self.last = nn.Linear(WIDTH, 5)
        self.last.weight = nn.Parameter(self.first.weight.detach().T.contiguous())
        self.tail = nn.Linear(5, WIDTH, bias=False)
        self.tail.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.tail.weight.T


class SameBlock(Stack):
    """One block stands in the list twice, and is used a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.last(self.blocks[0](self.first(x)))


class OtherOrder(Stack):
    """Blocks are entered in another order than they are defined in."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in (2, 0, 1):
            x = self.blocks[i](x)
        return self.last(x)


class Unused(Stack):
    """One block, and one parameter of another, are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].spare = nn.Parameter(torch.randn(70))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks[2](self.blocks[0](self.first(x))))


class Outputs(nn.Module):
    """A block between others whose output has some structure."""

    def __init__(
        self, pack: Callable[[Tensor, Tensor], object], unpack: Callable[[object], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([Pair(pack), Pair(pack)])
        self.last = Pair(pack)
        self.unpack = unpack

    def forward(self, x: Tensor) -> object:
        x = self.first(x)
        for block in self.blocks:
            a, b = self.unpack(block(x))
            x = a * b
        return self.last(x)


class Pair(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b, self.pack = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), pack

    def forward(self, x: Tensor) -> object:
        return self.pack(self.a(x), torch.sigmoid(self.b(x)))


@dataclass
class Two:
    a: Tensor
    b: Tensor


class ModelOutput(OrderedDict):
    """As transformers has it: a dict and a dataclass, whose items are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], object], Callable[[object], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda a, b: (a, b), lambda v: v),
    "list in a tuple": (lambda a, b: ([a], b), lambda v: (v[0][0], v[1])),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda v: (v["a"], v["b"])),
    "dataclass": (Two, lambda v: (v.a, v.b)),
    "model output": (lambda a, b: ModelOutput(a=a, b=b), lambda v: (v.a, v["b"])),
}


def both(model: nn.Module, step: int, number: int) -> Tensor:
    a, b = model.unpack(model(inputs(step, number, 3, 5)))
    return a.square().mean() + b.mean()


def only_one(model: nn.Module, step: int, number: int) -> Tensor:
    a, _ = model.unpack(model(inputs(step, number, 3, 5)))
    return a.square().mean()


class ReturnsParameter(nn.Module):
    """Blocks that return their own parameter, or views of it, as embeddings of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Positions(), Positions()])
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        table, row = self.blocks[0](x)
        _, other = self.blocks[1](x)
        return self.last(table[: x.shape[0]] * row + other)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.table, self.table[1]


class Mixed(Stack):
    """Each block has parameters of three dtypes, which become units of their own."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.spin = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))
            block.fine = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
            block.register_forward_hook(lambda m, _args, y: (y * m.spin).abs() + (y * m.fine).float())


class RootParameter(Stack):
    """The model itself returns a parameter beside its result."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.last.weight


def with_decay(model: nn.Module, step: int, number: int) -> Tensor:
    out, weight = model(inputs(step, number, 3, 5))
    return out.square().mean() + 0.1 * weight.square().sum()


class Sometimes(Stack):
    """A block that only some leaves use, and another that only some steps use. All are inside of one unit."""

    def forward(self, x: Tensor, use: tuple[bool, bool]) -> Tensor:
        x = self.first(x)
        for block, used in zip(self.blocks, (True, *use), strict=True):
            x = block(x) if used else x
        return self.last(x)


def some_leaves(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 3, 5), (number == 1, step != 1)).square().mean()


CASES: dict[str, tuple[Callable[[], nn.Module], Leaf]] = {
    "plain": (Stack, square),
    "first block frozen": (frozen("blocks.0"), square),
    "frozen between trained ones": (frozen("blocks.1"), square),
    "all blocks frozen": (frozen("blocks"), square),
    "all but the last frozen": (frozen("first", "blocks"), square),
    "last frozen": (frozen("blocks.2", "last"), square),
    "half of a block frozen": (frozen("blocks.1.into"), square),
    "tied": (Tied, square),
    "the same block twice": (SameBlock, square),
    "entered in another order": (OtherOrder, square),
    "unused": (Unused, square),
    "returns its parameter": (ReturnsParameter, square),
    "root returns its parameter": (RootParameter, with_decay),
    "float64": (lambda: Stack().double(), lambda m, s, n: m(inputs(s, n, 3, 5).double()).square().mean()),
    "bfloat16": (lambda: Stack().bfloat16(), lambda m, s, n: m(inputs(s, n, 3, 5).bfloat16()).square().mean()),
    "several dtypes in a block": (Mixed, square),
    **{f"outputs: {k}": (lambda v=v: Outputs(*v), both) for k, v in OUTPUTS.items()},
    "one of two outputs used": (lambda: Outputs(*OUTPUTS["tuple"]), only_one),
}


@cache
def reference(case: str) -> Result:
    make_model, leaf = CASES[case]
    return plain(make_model, leaf, make_optimizer=adamw)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_trains_as_plain_pytorch(case: str, place: str) -> None:
    make_model, leaf = CASES[case]
    assert_same(train(place, make_model, leaf, make_optimizer=adamw), reference(case))


@pytest.mark.parametrize("case", CASES)
def test_the_same_without_overlap(case: str) -> None:
    make_model, leaf = CASES[case]
    assert_same(train("zero3", make_model, leaf, make_optimizer=adamw, overlap=False), reference(case))
