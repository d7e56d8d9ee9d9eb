"""Which parameters travel together: chosen by size, or named by the user."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from shoal.engine.units import choose
from shoal.errors import AwayError, ModelError
from tests.engine.test_conditional import Chosen, choosing
from tests.engine.test_models import SameBlock, Stack, Tied, square
from tests.engine.trials import PLACES, adamw, assert_same, inputs, plain, train


class Tower(nn.Module):
    """Lists in lists, a Sequential in a block, a small block, and layers that are in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 70)
        self.stages = nn.ModuleList(
            nn.ModuleList([nn.Sequential(nn.Linear(70, 70), nn.Tanh()), nn.Linear(70, 70)]) for _ in range(2)
        )
        self.head = nn.Sequential(nn.Linear(70, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for stage in self.stages:
            for layer in stage:
                x = x + layer(x)
        return self.head(x)


def test_blocks_of_lists_that_are_not_very_small() -> None:
    """Containers of containers are entered; a Sequential that is one layer of the model is one of them."""
    assert list(choose(Tower())) == ["stages.0.0.0", "stages.0.1", "stages.1.0.0", "stages.1.1", ""]
    assert list(choose(Stack())) == ["blocks.0", "blocks.1", "blocks.2", ""]
    assert list(choose(SameBlock())) == ["blocks.0", "blocks.1", ""]
    assert list(choose(nn.Linear(3, 3))) == [""]


def test_named() -> None:
    assert list(choose(Tower(), ["head", "stages.1.0", "embed"])) == ["embed", "stages.1.0", "head", ""]
    assert list(choose(Tower(), [])) == [""]


NAMES: dict[str, list[str]] = {
    "all in one": [],
    "layers": ["first", "blocks.0.into", "blocks.0.out", "blocks.2", "last"],
    "inside each other": ["blocks.1", "blocks.1.into", "blocks.1.back"],
    "one block": ["blocks.1"],
}


@pytest.mark.parametrize("place", ["ddp", "zero2", "zero3", "hybrid"])
@pytest.mark.parametrize("name", NAMES)
def test_units_change_no_numbers(name: str, place: str) -> None:
    for make_model in (Stack, Tied):
        got = train(place, make_model, square, make_optimizer=adamw, units=NAMES[name])
        assert_same(got, plain(make_model, square, make_optimizer=adamw))


@pytest.mark.parametrize("place", PLACES)
def test_automatic_units_of_a_tower(place: str) -> None:
    assert_same(train(place, Tower, square), plain(Tower, square))


REFUSED = {
    "no module": (["blocks.7"], "units= names 'blocks.7', which is no module", "did you mean 'blocks.2'"),
    "a parameter": (["last.weight"], "units= names 'last.weight', which is no module", "'last'"),
    "a list": (
        ["blocks"],
        "units= names 'blocks', a ModuleList, which has no forward to enter",
        "name blocks.0, blocks.1, blocks.2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    names, what, remedy = REFUSED[name]

    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", run_dir="none") as job:
            model = Stack()
            job.prepare(model, adamw(model), units=names)

    with pytest.raises(ModelError) as e:
        run(1, rank_main)
    assert what in str(e.value)
    assert remedy in str(e.value)


def test_the_remedy_of_an_order_that_changes() -> None:
    """Blocks in another order than in the first leaf are an error that proposes `units=`, and that helps."""
    leaf = choosing(lambda step, _number: [2, 1, 0] if step else [0, 1, 2])

    def make() -> nn.Module:
        return Chosen(3)

    want = plain(make, leaf)
    assert_same(train("zero2", make, leaf), want)
    with pytest.raises(shoal.errors.PlanError) as e:
        train("zero3", make, leaf)
    assert "is entered more often, or earlier, than in the first leaf" in str(e.value)
    assert "name a larger block with units=, or shoal.init(..., overlap=False)" in str(e.value)
    assert_same(train("zero3", make, leaf, units=[]), want)
    assert_same(train("zero3", make, leaf, overlap=False), want)


# -------------------------------------------------------------------- layers of all kinds, whose autograd saves views


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(inplace=True), nn.Conv2d(16, 32, 3, groups=4), nn.PReLU(32),
            nn.Conv2d(32, 16, 3), nn.ConvTranspose2d(16, 32, 3), nn.LeakyReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(-1, 1, 8, 8)).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(16, 20, 2, batch_first=True, bidirectional=True), nn.GRU(40, 20)])

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.layers[0](x.view(4, 4, 16))
        return self.layers[1](x)[0]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32, padding_idx=0)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True),
            3,
            nn.LayerNorm(32),
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 10).long().clamp(max=49).view(-1, 64)[:, :9]
        return self.head(self.layers(self.embed(tokens)))


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parametrizations = nn.utils.parametrizations
        self.layers = nn.ModuleList(
            [
                parametrizations.weight_norm(nn.Linear(64, 70)),
                parametrizations.spectral_norm(nn.Linear(70, 70)),
                nn.Bilinear(70, 70, 8),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](torch.tanh(self.layers[0](x.view(-1, 64))))
        return self.layers[2](x, x)


LAYERS: list[Callable[[], nn.Module]] = [Convolutions, Recurrent, Transformer, Parametrized]


def image(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 4, 64)).square().mean()


@pytest.mark.parametrize("place", ["zero1", "zero3", "hybrid"])
@pytest.mark.parametrize("make_model", LAYERS)
def test_layers_of_all_kinds(make_model: Callable[[], nn.Module], place: str) -> None:
    assert_same(train(place, make_model, image, make_optimizer=adamw), plain(make_model, image, make_optimizer=adamw))


def layers(*but: str) -> list[str]:
    modules = Transformer().named_modules()
    return [n for n, m in modules if n and not list(m.children()) and list(m.parameters()) and not n.endswith(but)]


def test_a_unit_for_every_layer() -> None:
    want = plain(Transformer, image, make_optimizer=adamw)
    units = layers("out_proj")
    assert_same(train((3, "zero3"), Transformer, image, make_optimizer=adamw, units=units), want)


def test_a_unit_that_is_never_called() -> None:
    """Attention uses the parameters of its output projection without calling it."""
    with pytest.raises(AwayError) as e:
        train("zero3", Transformer, image, units=layers("?"))
    assert "backward went through unit" in str(e.value)
    assert "its parameters are used without calling it" in str(e.value)
    assert "name larger blocks with units=" in str(e.value)
