"""Evaluation between steps, and whole parameters on every rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.comm.threads import run
from tests.engine.test_models import Stack, frozen, square
from tests.engine.trials import PLACES, adamw, assert_bits, assert_same, inputs, plain, train


def evaluate(model: nn.Module, batches: int) -> float:
    model.eval()
    with torch.no_grad():
        total = sum(model(inputs(77, i, 3, 5)).square().mean().item() for i in range(batches))
    model.train()
    return total


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_evaluation_with_as_many_batches_as_a_rank_likes(place: str, overlap: bool) -> None:
    """In a raw loop: rank r evaluates r batches after every step, and every parameter is there for it."""
    seen: dict[int, list[float]] = {}

    def each(job: shoal.Job, model: nn.Module, _optimizer: object) -> None:
        seen.setdefault(job.rank, []).append(evaluate(model, 2 * job.rank))

    want = plain(Stack, square)
    assert_same(train(place, Stack, square, each=each, overlap=overlap), want)
    model = Stack()
    model.load_state_dict(want.model)
    for rank, values in seen.items():
        assert len(values) == 3
        assert values[-1] == evaluate(model, 2 * rank)


@pytest.mark.parametrize("place", PLACES)
def test_evaluation_on_one_rank_in_mid_step(place: str) -> None:
    """Between two leaves of a step the others go on with theirs, and grant what is needed."""

    def leaf(model: nn.Module, step: int, number: int) -> Tensor:
        if number == 2:
            evaluate(model, 1)
        return square(model, step, number)

    assert_same(train(place, Stack, leaf), plain(Stack, leaf))


@pytest.mark.parametrize("place", PLACES)
def test_forward_without_no_grad(place: str) -> None:
    """An evaluation that forgot `no_grad` costs memory, nothing else."""

    def each(job: shoal.Job, model: nn.Module, _optimizer: object) -> None:
        model.eval()
        model(inputs(77, job.rank, 3, 5))
        model.train()

    assert_same(train(place, Stack, square, each=each), plain(Stack, square))


@pytest.mark.parametrize("place", PLACES)
def test_whole_parameters(place: str) -> None:
    """Values, names and shapes are those of one process; one rank alone may run the model; references stay valid."""
    kept: dict[int, list[Tensor]] = {}

    def each(job: shoal.Job, model: nn.Module, _optimizer: object) -> None:
        with job.whole(model):
            kept[job.rank] = [p.detach() for p in model.parameters()]
            kept[job.rank].append(model.first.weight.data[1])
            if job.rank == 1:
                evaluate(model, 2)
                model(inputs(78, 0, 3, 5))
            state = model.state_dict()
        assert list(state) == list(Stack().state_dict())

    want = plain(Stack, square)
    assert_same(train(place, Stack, square, each=each), want)
    for tensors in kept.values():
        for got, value in zip(tensors, [*want.model.values(), want.model["first.weight"][1]], strict=True):
            assert_bits(got, value, "what a user kept")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", PLACES)
def test_writing_inside_whole(place: str, precision: str) -> None:
    """With `write=True` changes last, and only what was changed: masters keep bits that bfloat16 has not."""

    def each(job: shoal.Job, model: nn.Module, _optimizer: object) -> None:
        with job.whole(model, write=True):
            model.blocks[0].into.weight.data[3].zero_()
            nn.init.constant_(model.last.bias, 0.25)

    def each_again(job: shoal.Job, model: nn.Module, _optimizer: object) -> None:
        each(job, model, _optimizer)
        with job.whole(model, write=True):
            pass

    want = train((1, "ddp"), Stack, square, each=each, precision=precision)
    assert_same(train(place, Stack, square, each=each, precision=precision), want)
    assert_same(train(place, Stack, square, each=each_again, precision=precision), want)
    assert want.model["last.bias"].tolist() == [0.25, 0.25]
    assert not want.model["blocks.0.into.weight"][3].any()


@pytest.mark.parametrize("place", ["zero3", "hybrid"])
def test_writing_without_write_is_dropped(place: str) -> None:
    """Where parameters live in shards, what was lent goes back as it came."""

    def each(job: shoal.Job, model: nn.Module, _optimizer: object) -> None:
        with job.whole(model):
            for p in model.parameters():
                p.data.fill_(7.0)

    assert_same(train(place, Stack, square, each=each), plain(Stack, square))


def test_ranks_that_write_differently_agree_afterwards() -> None:
    """Every element is taken from the rank that owns it."""

    def rank_main(rank: int) -> Tensor:
        with shoal.init("zero1", run_dir="none") as job:
            model = nn.Linear(64, 2, bias=False)
            model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            with job.whole(model, write=True):
                model.weight.data.fill_(float(rank))
            return model.weight.detach().clone()

    a, b = run(2, rank_main)
    assert torch.equal(a, b)
    assert a.unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("place", PLACES)
def test_loading_a_state_dict_inside_whole(place: str) -> None:
    state = Stack().state_dict()

    def each(job: shoal.Job, model: nn.Module, _optimizer: object) -> None:
        with job.whole(model, write=True):
            model.load_state_dict(state)

    got = train(place, Stack, square, each=each)
    for name, value in state.items():
        assert_bits(got.model[name], value, name)


def test_an_error_inside_whole_gives_the_parameters_back() -> None:
    """Nothing that was written counts; the error is the user's own."""

    def rank_main(rank: int) -> None:
        with shoal.init("zero3", run_dir="none") as job:
            model = nn.Linear(64, 2)
            model, _ = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            try:
                with job.whole(model, write=True):
                    raise KeyError("mine")
            finally:
                assert model.weight.isnan().all()

    with pytest.raises(KeyError):
        run(2, rank_main)


@pytest.mark.parametrize("make_model", [Stack, frozen("blocks.1")])
def test_at_most_three_blocks_are_here(make_model: Callable[[], nn.Module]) -> None:
    """Under zero3: the block that computes, the one that comes, and the rest of the model around them."""
    most = 0

    def leaf(model: nn.Module, step: int, number: int) -> Tensor:
        nonlocal most

        def count(*_: object) -> None:
            nonlocal most
            if step:
                most = max(
                    most, sum(b.into.weight.untyped_storage().nbytes() >= b.into.weight.nbytes for b in model.blocks)
                )

        handles = [b.register_forward_pre_hook(count) for b in model.blocks]
        handles += [
            b.into.weight.register_post_accumulate_grad_hook(count) for b in model.blocks if b.into.weight.requires_grad
        ]
        loss = square(model, step, number)
        loss.backward()
        for handle in handles:
            handle.remove()
        return loss.detach()

    def make() -> nn.Module:
        torch.manual_seed(1)
        model = make_model()
        for i in range(5):
            model.blocks.append(make_model().blocks[1])
            model.blocks[-1].requires_grad_(i % 2 == 0)
        return model

    train("zero3", make, leaf, make_optimizer=adamw)
    assert 0 < most <= 3
