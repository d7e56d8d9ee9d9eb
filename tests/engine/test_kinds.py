"""Kinds of models that people train: the same bits as plain PyTorch, under every strategy."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import shoal
from shoal.checkpoint import export
from shoal.comm.threads import run
from tests.engine.trials import PLACES, Leaf, Numbers, Result, adamw, assert_same, inputs, plain, train


def square(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 3, 6)).square().mean()


class Convolutions(nn.Module):
    """Weights and images in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(), nn.Conv2d(24, 8, 3, padding=1)
            )
            for _ in range(3)
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = x + block(x)
        return x


def image(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 2, 3, 8, 8)).square().mean()


class Complex(nn.Module):
    """Complex, real, scalar and empty parameters in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(6, 70, dtype=torch.complex64) / 8)
        self.out = nn.Linear(70, 2)
        self.scale, self.nothing = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x.to(torch.complex64) @ self.filter).abs()) * self.scale + self.nothing.sum()


def parametrized(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers = [nn.Linear(6, 90), nn.Linear(90, 90), nn.Linear(90, 5)]
        for layer in layers:
            if kind == "weight norm":
                parametrizations.weight_norm(layer)
            elif kind == "spectral norm":
                parametrizations.spectral_norm(layer)
            elif kind == "orthogonal":
                parametrizations.orthogonal(layer)
            else:
                parametrize.register_parametrization(layer, "weight", Symmetric())
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    return make


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs().sqrt()


class Twice(torch.autograd.Function):
    """A custom function with its own backward, that saves the weight it was given."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight * 2, grad.T @ x * 2


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.wide = nn.ModuleList([nn.Linear(6, 800), nn.Linear(800, 6)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = Twice.apply(x, block.weight) + block.bias
        for block in self.wide:
            x = block(x)
        return x


@dataclasses.dataclass
class Hidden:
    state: Tensor
    notes: dict[str, Tensor]


class Keywords(nn.Module):
    """Blocks called with keyword arguments that return dataclasses."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 400), nn.Linear(400, 6)

        def forward(self, *, hidden: Hidden, scale: float = 1.0) -> Hidden:
            up = self.up(hidden.state).tanh()
            return Hidden(state=hidden.state + self.down(up) * scale, notes={**hidden.notes, "up": up})

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Inner() for _ in range(3))

    def forward(self, *, x: Tensor) -> Hidden:
        hidden = Hidden(x, {})
        for layer in self.layers:
            hidden = layer(hidden=hidden, scale=0.5)
        return hidden


def keywords(model: nn.Module, step: int, number: int) -> Tensor:
    out = model(x=inputs(step, number, 3, 6))
    return out.state.square().mean() + out.notes["up"].abs().mean()


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(6, 40, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(80, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def sequence(model: nn.Module, step: int, number: int) -> Tensor:
    return model(inputs(step, number, 3, 7, 6)).square().mean()


class Transposed(nn.Module):
    """Parameters that are not contiguous: a transposed one, and one with gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(70, 6).t())
        self.second = nn.Parameter(torch.randn(70, 8)[:, ::2])

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first).tanh() @ self.second


CASES: dict[str, tuple[Callable[[], nn.Module], Leaf]] = {
    "channels_last": (Convolutions, image),
    "complex": (Complex, square),
    "weight norm": (parametrized("weight norm"), square),
    "spectral norm": (parametrized("spectral norm"), square),
    "orthogonal": (parametrized("orthogonal"), square),
    "a parametrization of one's own": (parametrized("own"), square),
    "custom function": (Custom, square),
    "keywords and dataclasses": (Keywords, keywords),
    "lstm": (lambda: Recurrent(nn.LSTM), sequence),
    "gru": (lambda: Recurrent(nn.GRU), sequence),
    "strides": (Transposed, square),
    "transformer": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 700, 0.1, batch_first=True), 2), sequence),
}  # fmt: skip


@cache
def reference(case: str) -> Result:
    make_model, leaf = CASES[case]
    return plain(make_model, leaf, make_optimizer=adamw)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_trains_as_plain_pytorch(case: str, place: str) -> None:
    make_model, leaf = CASES[case]
    assert_same(train(place, make_model, leaf, make_optimizer=adamw), reference(case))


@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_channels_last_stays(name: str) -> None:
    """Alone with one leaf the kernels, and so the bits, are plain PyTorch's; weights keep their strides."""

    def rank_main(_rank: int) -> dict[str, Tensor]:
        with shoal.init(name, run_dir="none") as job:
            model = Convolutions()
            model, optimizer = job.prepare(model, adamw(model))
            for step in range(3):
                image(model, step, 0).backward()
                optimizer.step()
                optimizer.zero_grad()
            with job.whole(model):
                assert model.first.weight.is_contiguous(memory_format=torch.channels_last)
            state = job.state_dict(model)
            assert not state or state["first.weight"].is_contiguous(memory_format=torch.channels_last)
            return state

    want = plain(Convolutions, image, make_optimizer=adamw, leaves=1).model
    for key, value in run(1, rank_main)[0].items():
        assert torch.equal(value, want[key]), key
    run(2, rank_main)


def test_channels_last_goes_on_elsewhere(tmp_path: Path) -> None:
    """Saved on three ranks, continued by two; a model that lies otherwise is refused."""

    def trainer(strategy: str, start: int, stop: int, *, last: bool = True) -> Callable[[int], dict[str, Tensor]]:
        def rank_main(_rank: int) -> dict[str, Tensor]:
            with shoal.init(strategy, leaves=2, run_dir="none") as job:
                model = Convolutions() if last else Convolutions().to(memory_format=torch.contiguous_format)
                model, optimizer = job.prepare(model, adamw(model))
                if start:
                    job.load(tmp_path)
                for number in job.loader(Numbers(2 * (stop - start)), global_batch=2, shuffle=False):
                    image(model, *divmod(int(number) + 2 * start, 2)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if not start:
                    job.save(tmp_path)
                return job.state_dict(model)

        return rank_main

    want = run(1, trainer("ddp", 0, 4))[0]
    shutil.rmtree(tmp_path / "step-4")
    half = run(3, trainer("zero3", 0, 2))[0]
    (file,) = export(tmp_path, tmp_path / "out").files
    for key, value in load_file(file).items():
        assert torch.equal(value, half[key]), key
    for key, value in run(2, trainer("zero1", 2, 4))[0].items():
        assert torch.equal(value, want[key]), key
    with pytest.raises(shoal.errors.ResumeError, match="lies in another order of dimensions"):
        run(2, trainer("zero1", 2, 4, last=False))


def test_sparse_gradients_are_refused() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", run_dir="none") as job:
            model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
            job.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))

    with pytest.raises(shoal.errors.ModelError, match="sparse"):
        run(1, rank_main)
