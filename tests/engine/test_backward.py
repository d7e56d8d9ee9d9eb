"""Backward calls of every kind: several a leaf, through checkpoints, and those that cannot be followed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shoal
from shoal.comm.threads import run
from shoal.errors import AwayError, OrderError, PlanError
from tests.engine.test_models import OUTPUTS, WIDTH, Block, Outputs, Stack, square
from tests.engine.trials import PLACES, Leaf, Result, adamw, assert_same, inputs, plain, train


def two_losses_one_graph(model: nn.Module, step: int, number: int) -> Tensor:
    a, b = model.unpack(model(inputs(step, number, 3, 5)))
    a.square().mean().backward(retain_graph=True)
    b.square().mean().backward()
    return b.detach().mean()


def two_losses_summed(model: nn.Module, step: int, number: int) -> Tensor:
    a, b = model.unpack(model(inputs(step, number, 3, 5)))
    return a.square().mean() + 0.3 * b.mean()


def twice_forward_and_backward(model: nn.Module, step: int, number: int) -> Tensor:
    square(model, step, number).backward()
    loss = square(model, step + 100, number)
    loss.backward()
    return loss.detach()


def twice_forward_then_backward(model: nn.Module, step: int, number: int) -> Tensor:
    first, second = square(model, step, number), square(model, step + 100, number)
    first.backward()
    second.backward()
    return second.detach()


def siamese(model: nn.Module, step: int, number: int) -> Tensor:
    return (model(inputs(step, number, 3, 5)) - model(inputs(step + 100, number, 3, 5))).square().mean()


def forward_without_grad_first(model: nn.Module, step: int, number: int) -> Tensor:
    """As models with a target do: one pass without gradients inside a leaf."""
    with torch.no_grad():
        target = model(inputs(step + 100, number, 3, 5))
    return (model(inputs(step, number, 3, 5)) - target).square().mean()


def only_parameters(model: nn.Module, step: int, number: int) -> Tensor:
    """The gradient of some parameters only, by `inputs=`."""
    loss = square(model, step, number)
    loss.backward(inputs=[p for n, p in model.named_parameters() if "blocks" in n])
    return loss.detach()


def autocast(model: nn.Module, step: int, number: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return square(model, step, number).float()


def gradient_penalty(model: nn.Module, step: int, number: int) -> Tensor:
    """The gradient with respect to the input, squared, is part of the loss: a backward through a backward."""
    x = inputs(step, number, 3, 5).requires_grad_()
    out = model(x).square().sum()
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    return out + slope.square().mean()


class Checkpointed(Stack):
    """Runs blocks, or runs of blocks, again in backward."""

    def __init__(self, runs: tuple[tuple[int, ...], ...], *, reentrant: bool) -> None:
        super().__init__(4)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)
        self.runs, self.reentrant = runs, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        for number, run_ in enumerate(self.runs):

            def part(x: Tensor, run_: tuple[int, ...] = run_) -> Tensor:
                for i in run_:
                    x = self.drop(self.blocks[i](x))
                return x

            x = checkpoint(part, x, use_reentrant=self.reentrant)
            if number == 0:
                x = torch.tanh(self.middle(x)) * self.middle.weight[1]  # of the root, between blocks
        return self.last(x)


class Nested(Checkpointed):
    """A checkpoint around blocks that are checkpointed themselves."""

    def forward(self, x: Tensor) -> Tensor:
        def inner(i: int, x: Tensor) -> Tensor:
            return checkpoint(self.blocks[i], x, use_reentrant=self.reentrant)

        def outer(x: Tensor) -> Tensor:
            return inner(2, self.drop(inner(1, x)))

        x = inner(0, self.first(x))
        x = checkpoint(outer, x, use_reentrant=self.reentrant)
        return self.last(self.blocks[3](x))


class CheckpointedInside(nn.Module):
    """The checkpoint is inside of a block."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList(Inside(reentrant) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Inside(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = Block(), Block(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.b, checkpoint(self.a, x, use_reentrant=self.reentrant), use_reentrant=self.reentrant)


def kinds(make: Callable[..., nn.Module], *args: object) -> dict[str, tuple[Callable[[], nn.Module], Leaf]]:
    return {
        f"{make.__name__} {args or ''} {'reentrant' if r else 'not reentrant'}": (
            lambda r=r: make(*args, reentrant=r),
            square,
        )
        for r in (True, False)
    }


CASES: dict[str, tuple[Callable[[], nn.Module], Leaf]] = {
    "two losses, one graph": (lambda: Outputs(*OUTPUTS["tuple"]), two_losses_one_graph),
    "two losses summed": (lambda: Outputs(*OUTPUTS["dict"]), two_losses_summed),
    "forward and backward twice": (Stack, twice_forward_and_backward),
    "forward twice, then backward twice": (Stack, twice_forward_then_backward),
    "siamese": (Stack, siamese),
    "a forward without gradients first": (Stack, forward_without_grad_first),
    "only some parameters": (Stack, only_parameters),
    "autocast": (Stack, autocast),
    "gradient penalty": (Stack, gradient_penalty),
    **kinds(Checkpointed, ((0,), (1,), (2,), (3,))),
    **kinds(Checkpointed, ((0, 1), (2, 3))),
    **kinds(Checkpointed, ((0, 1, 2, 3),)),
    **kinds(Nested, ()),
    **kinds(CheckpointedInside),
}


@cache
def reference(case: str) -> Result:
    make_model, leaf = CASES[case]
    return plain(make_model, leaf, make_optimizer=adamw)


pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # nested reentrant checkpoints


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_backward_of_every_kind(case: str, place: str) -> None:
    make_model, leaf = CASES[case]
    assert_same(train(place, make_model, leaf, make_optimizer=adamw), reference(case))


@pytest.mark.parametrize("case", CASES)
def test_the_same_without_overlap(case: str) -> None:
    make_model, leaf = CASES[case]
    assert_same(train("zero3", make_model, leaf, make_optimizer=adamw, overlap=False), reference(case))


# -------------------------------------------------------------------- what cannot be followed


def once_more(model: nn.Module, step: int, number: int) -> Tensor:
    """From the second step on, leaf 1 has a backward call more than the first leaf had."""
    loss = square(model, step, number)
    if step and number == 1:
        loss.backward()
        loss = square(model, step + 100, number)
    return loss


@pytest.mark.parametrize("place", PLACES)
def test_a_backward_call_too_many(place: str) -> None:
    with pytest.raises(PlanError) as e:
        train(place, Stack, once_more)
    assert "after those of unit" in str(e.value) or "is entered more often, or earlier, than in the first leaf" in str(
        e.value
    )
    assert "overlap=False" in str(e.value)


@pytest.mark.parametrize("place", PLACES)
def test_any_number_of_backward_calls_without_overlap(place: str) -> None:
    assert_same(train(place, Stack, once_more, overlap=False), plain(Stack, once_more))


@pytest.mark.parametrize("place", PLACES)
def test_fewer_backward_calls_are_no_error(place: str) -> None:
    def leaf(model: nn.Module, step: int, number: int) -> Tensor:
        if step < 1 or number == 2:
            square(model, step + 100, number).backward()
        return square(model, step, number)

    assert_same(train(place, Stack, leaf), plain(Stack, leaf))


class Kept(Block):
    """Keeps a loss as an attribute; its parameters lead into it by themselves, or by a view of them."""

    view = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.loss = (y * self.into.weight[1]).mean() if self.view else self.into(y).square().mean()
        return y


class KeptView(Kept):
    view = True


class SidePath(Stack):
    def __init__(self, block: type[Kept]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("block", [Kept, KeptView])
def test_a_gradient_through_a_side_path(block: type[Kept], overlap: bool) -> None:
    """Only where parameters are away it is an error; never a read of freed memory."""

    def leaf(model: nn.Module, step: int, number: int) -> Tensor:
        loss = square(model, step, number)
        return loss + sum(b.loss for b in model.blocks)

    def make() -> nn.Module:
        return SidePath(block)

    for place in ("ddp", "zero2"):
        assert_same(train(place, make, leaf, overlap=overlap), plain(make, leaf))
    with pytest.raises(AwayError) as e:
        train("zero3", make, leaf, overlap=overlap)
    assert "backward went through unit 1 'blocks.1' while its parameters were away" in str(e.value)
    assert "return it from the block, or name larger blocks with units=" in str(e.value)


def test_the_side_path_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit for everything: `units=[]`."""

    def leaf(model: nn.Module, step: int, number: int) -> Tensor:
        loss = square(model, step, number)
        return loss + sum(b.loss for b in model.blocks)

    def make() -> nn.Module:
        return SidePath(KeptView)

    assert_same(train("zero3", make, leaf, units=[]), plain(make, leaf))


# -------------------------------------------------------------------- zero_grad


def by_hand(
    place: str, program: Callable[[shoal.Job, nn.Module, torch.optim.Optimizer], None], **settings: object
) -> Tensor:
    """Run a loop without a loader; all parameters afterwards."""
    world, strategy = PLACES[place]

    def rank_main(_rank: int) -> Tensor:
        with shoal.init(strategy, run_dir="none", device="cpu", **settings) as job:
            model = Stack()
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            while job.step < 3:
                program(job, model, optimizer)
            with job.whole(model):
                return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

    found = run(world, rank_main)
    for other in found[1:]:
        assert torch.equal(found[0], other)
    return found[0]


def loss_of(job: shoal.Job, model: nn.Module, more: int = 0) -> Tensor:
    return square(model, job.step + more, job.rank)


def after_step(job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(job, model).backward()
    optimizer.step()
    optimizer.zero_grad()


def before_forward(job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(job, model).backward()
    optimizer.step()


def before_backward(job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = loss_of(job, model)
    model.zero_grad()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("leaves", [None, 8])
@pytest.mark.parametrize("place", PLACES)
def test_zero_grad_at_any_of_three_places(place: str, leaves: int | None) -> None:
    settings = {} if leaves is None else {"leaves": leaves}
    first, *others = (by_hand(place, p, **settings) for p in (after_step, before_forward, before_backward))
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("zero_grad", ["optimizer", "model", "by hand"])
@pytest.mark.parametrize("place", PLACES)
def test_zero_grad_in_mid_leaf_discards(place: str, zero_grad: str) -> None:
    """Without overlap: what the leaf has gathered so far counts for nothing, what earlier leaves have stays."""

    def discards(job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss = loss_of(job, model)
        loss_of(job, model, 100).backward()
        if zero_grad == "by hand":
            for p in model.parameters():
                p.grad = None
        else:
            {"optimizer": optimizer, "model": model}[zero_grad].zero_grad()
        loss.backward()
        optimizer.step()

    assert torch.equal(by_hand(place, discards, overlap=False, leaves=8), by_hand(place, after_step, leaves=8))


def left_out(job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A backward that fails half way comes before that of the step."""

    def fail(_grad: Tensor) -> Tensor:
        raise ValueError("as an assertion of the user's would")

    def fails(_block: nn.Module, _args: object, output: Tensor) -> None:
        output.register_hook(fail)

    hook = cast(Stack, model).blocks[0].register_forward_hook(fails)
    loss = loss_of(job, model, 100)
    hook.remove()
    with pytest.raises(ValueError, match="as an assertion"):
        loss.backward()
    optimizer.zero_grad()
    after_step(job, model, optimizer)


@pytest.mark.parametrize("place", PLACES)
def test_a_backward_that_fails_may_be_left_out_without_overlap(place: str) -> None:
    assert torch.equal(by_hand(place, left_out, overlap=False), by_hand(place, after_step))


@pytest.mark.parametrize("place", PLACES)
def test_with_overlap_a_backward_that_fails_cannot_be_left_out(place: str) -> None:
    def later(job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        (left_out if job.step else after_step)(job, model, optimizer)

    with pytest.raises((OrderError, PlanError)) as e:
        by_hand(place, later)
    assert "shoal.init(..., overlap=False)" in str(e.value)


@pytest.mark.parametrize("zero_grad", ["optimizer", "model"])
@pytest.mark.parametrize("place", PLACES)
def test_zero_grad_too_late(place: str, zero_grad: str) -> None:
    """With overlap a leaf's gradients have been handed on when its backward ends, from the second leaf on."""

    def too_late(job: shoal.Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss_of(job, model).backward()
        if job.step:
            {"optimizer": optimizer, "model": model}[zero_grad].zero_grad()
        optimizer.step()

    with pytest.raises(OrderError) as e:
        by_hand(place, too_late)
    assert "zero_grad() came after this leaf's gradients had been handed on" in str(e.value)
    assert "before backward or after step(), or shoal.init(..., overlap=False)" in str(e.value)


# -------------------------------------------------------------------- calls that make no sense


MISUSES: dict[str, tuple[Callable[[shoal.Job, nn.Module, torch.optim.Optimizer], None], str]] = {}


def misuse(text: str) -> Callable[..., object]:
    def keep(program: Callable[[shoal.Job, nn.Module, torch.optim.Optimizer], None]) -> object:
        MISUSES[program.__name__] = (program, text)
        return program

    return keep


@misuse("backward without a training forward of the prepared model since optimizer.step()")
def in_eval_mode(job, model, _optimizer):
    model.eval()
    loss_of(job, model).backward()


@misuse("backward without a training forward of the prepared model since optimizer.step()")
def after_the_step(job, model, optimizer):
    loss = loss_of(job, model)
    loss.backward(retain_graph=True)
    optimizer.step()
    loss.backward()


@misuse("forward between clip_grad_norm() and optimizer.step()")
def forward_after_clipping(job, model, _optimizer):
    loss_of(job, model).backward()
    job.clip_grad_norm(1.0)
    loss_of(job, model)


@misuse("job.weight(0.5) came after backward")
def weight_after_backward(job, model, _optimizer):
    loss_of(job, model).backward()
    job.weight(1, full=2)


@misuse("optimizer.step(closure) runs forward and backward inside the step")
def closure(job, model, optimizer):
    optimizer.step(lambda: loss_of(job, model).backward())


@misuse("job.whole in the middle of a leaf")
def whole_in_a_leaf(job, model, _optimizer):
    loss_of(job, model)
    with job.whole(model):
        pass


@misuse("job.whole inside job.whole")
def whole_in_whole(job, model, _optimizer):
    with job.whole(model), job.whole(model):
        pass


@misuse("job.save in the middle of a step")
def save_in_a_step(job, model, _optimizer):
    loss_of(job, model).backward()
    job.save("nowhere")


@misuse("job.state_dict in the middle of a step")
def state_in_a_step(job, model, _optimizer):
    loss_of(job, model)
    job.state_dict(model)


@misuse("was not prepared by this job")
def another_model(job, _model, _optimizer):
    with job.whole(nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize("place", ["ddp", "zero3"])
@pytest.mark.parametrize("name", MISUSES)
def test_calls_that_make_no_sense(name: str, place: str) -> None:
    program, text = MISUSES[name]
    with pytest.raises(shoal.errors.ShoalError) as e:
        by_hand(place, program)
    assert text in str(e.value)
    assert "try:" in str(e.value)
