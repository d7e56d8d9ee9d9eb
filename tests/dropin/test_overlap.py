"""Gradients travel while backward runs, and end as if they had travelled afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shoal
from shoal.comm.group import Group, current
from shoal.comm.meter import Meter
from shoal.comm.threads import run
from shoal.dropin.ddp import DistributedDataParallel
from shoal.dropin.mean import Averager
from shoal.dropin.overlap import Overlap
from shoal.errors import DivergedError

STEPS = 6
TINY = 0.0002  # MiB: every layer of `Net` has a bucket of its own, or shares it with one neighbour
Use = Callable[["Net", Tensor, int, int], Tensor]


class Net(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.use = use

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        return self.use(self, x, step, rank)


def in_order(net: Net, x: Tensor, _step: int, _rank: int) -> Tensor:
    for layer in net.layers:
        x = torch.tanh(layer(x))
    return x


def shuffled(net: Net, x: Tensor, step: int, rank: int) -> Tensor:
    for place in torch.randperm(5, generator=torch.Generator().manual_seed(10 * step + rank)).tolist():
        x = torch.tanh(net.layers[place](x))
    return x


def some(net: Net, x: Tensor, step: int, rank: int) -> Tensor:
    """In every other step layers 1 and 2 on one rank only, layer 3 on none."""
    for place, layer in enumerate(net.layers):
        left_out = place == 3 or (place in (1, 2) and rank != 0)
        x = x if left_out and step % 2 else torch.tanh(layer(x))
    return x


def again(net: Net, x: Tensor, step: int, rank: int) -> Tensor:
    """The last layer gets gradients once or twice in a backward; the second time when its bucket may be under way."""
    last = net.layers[4]
    if (step + rank) % 3 == 0:
        x = checkpoint(last, x, use_reentrant=True)
    x = in_order(net, x, step, rank)
    return checkpoint(last, x, use_reentrant=True)


def in_a_word(net: Net, x: Tensor, step: int, rank: int) -> Tensor:
    """Gradients of the step before stay: nobody zeroes those of layer 2."""
    return in_order(net, x, step, rank) if step % 2 else some(net, x, 1, 1)


USES: dict[str, Use] = {
    "in order": in_order, "shuffled": shuffled, "some": some, "again": again, "stale": in_a_word,
}  # fmt: skip


def trained(use: Use, rank: int, world: int) -> list[Tensor | None]:
    torch.manual_seed(0)
    model = shoal.DistributedDataParallel(Net(use), bucket_cap_mb=TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen: list[Tensor | None] = []
    for step in range(STEPS):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step * world + rank)).requires_grad_()
        model(x, step, rank).square().sum().backward()
        seen += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
        if use is not in_a_word:
            optimizer.zero_grad()
    return [*seen, *(p.detach().clone() for p in model.parameters())]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Buckets that were under way when a backward ended."""
    counts: list[int] = []
    start_all = Overlap.start_all

    def count(self: Overlap) -> None:
        counts.append(self.begun)
        start_all(self)

    monkeypatch.setattr(Overlap, "start_all", count)
    return counts


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", USES)
def test_the_same_bits_as_after_backward(
    name: str, world: int, monkeypatch: pytest.MonkeyPatch, begun: list[int]
) -> None:
    got = run(world, lambda rank: trained(USES[name], rank, world), seed=world)
    assert max(begun) > 1
    monkeypatch.setattr(DistributedDataParallel, "_overlaps", property(lambda _self: False))
    want = run(world, lambda rank: trained(USES[name], rank, world))
    for mine, theirs in zip(got, want, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)


def test_from_the_second_backward_on_all_buckets_travel_meanwhile(begun: list[int]) -> None:
    run(2, lambda rank: trained(in_order, rank, 2))
    assert begun[:2] == [0, 0]
    assert set(begun[2:]) == {5}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Per backward, the buckets that got gradients when they were under way, a bit for each."""
    seen: list[int] = []
    finish = Overlap.finish

    def watched(self: Overlap, touched: int, bits: int) -> int:
        seen.append(bits)
        return finish(self, touched, bits)

    monkeypatch.setattr(Overlap, "finish", watched)
    return seen


def test_what_comes_late_is_exchanged_again(late: list[int]) -> None:
    run(2, lambda rank: trained(again, rank, 2))
    assert any(late)
    assert not all(late)


def always_twice(net: Net, x: Tensor, _step: int, _rank: int) -> Tensor:
    """As the backward before has shown: the bucket of the last layer starts when both have come."""
    return again(net, x, 0, 0)


def test_what_comes_as_often_as_before_is_not_late(late: list[int], begun: list[int]) -> None:
    run(2, lambda rank: trained(always_twice, rank, 2))
    assert set(late) == {0}
    assert max(begun) == 5


def test_what_has_come_goes_on_while_backward_runs() -> None:
    """A bucket's second transfer begins when its first is over, not at the end."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones(4)
    overlap = Overlap(Averager(Group("some", range(2), Meter(0, 2)), params, cap=0.0))
    for param in params:
        overlap.accumulated(param)
    assert overlap.finish(0b111, 0) == 0b111
    for param in reversed(params):
        overlap.accumulated(param)
        assert not overlap.journeys.under_way
    assert overlap.begun == 3


def fail(_grad: Tensor) -> Tensor:
    raise ValueError("as an assertion of the user's would")


def failing(net: Net, x: Tensor, step: int, _rank: int) -> Tensor:
    """Layers 2 to 4, whose gradients travelled in the backward that fails, have none in the next."""
    for number, layer in enumerate(list(net.layers)[: 2 if step == 3 else 5]):
        x = torch.tanh(layer(x))
        if number == 1 and step == 2:
            x.register_hook(fail)
    return x


def in_stage(stage: int, use: Use, rank: int, zeroed: str = "optimizer") -> tuple[list[Tensor], list[bool]]:
    """The last parameters of `shoal.ZeRO`, and per backward whether others' gradients were gone after it.

    A step whose backward fails is left out.
    """
    torch.manual_seed(0)
    net = Net(use)
    model = shoal.DistributedDataParallel(net, bucket_cap_mb=TINY) if stage == 1 else net
    optimizer = shoal.ZeRO(net.parameters(), torch.optim.SGD, stage, int(TINY * 2**20), lr=0.5)
    gone: list[bool] = []
    for step in range(STEPS):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step * 3 + rank))
        try:
            model(x, step, rank).square().sum().backward()
            gone.append(any(p.grad is None for p in net.parameters()))
            optimizer.step()
        except ValueError:
            assert step == 2
        (optimizer if zeroed == "optimizer" else net).zero_grad(set_to_none=False)
    return [p.detach().clone() for p in net.parameters()], gone


def assert_equal(got: list[tuple[list[Tensor], list[bool]]], want: list[tuple[list[Tensor], list[bool]]]) -> None:
    for params, _ in got:
        assert all(torch.equal(a, b) for a, b in zip(params, want[0][0], strict=True))


def test_a_backward_that_fails_on_all_ranks_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    got = run(2, lambda rank: in_stage(1, failing, rank))
    monkeypatch.setattr(DistributedDataParallel, "_overlaps", property(lambda _self: False))
    assert_equal(got, run(2, lambda rank: in_stage(1, failing, rank)))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("use", [in_order, shuffled, some, failing], ids=lambda use: use.__name__)
def test_stage_2_as_stage_1(use: Use, size: int, begun: list[int]) -> None:
    want, got = (run(size, lambda rank, stage=stage: in_stage(stage, use, rank)) for stage in (1, 2))
    assert_equal(got, want)
    if use is in_order and size > 1:
        assert set(begun[-size * (STEPS - 1) :]) == {5}


@pytest.mark.parametrize(("zeroed", "gone"), [("optimizer", True), ("model", False)])
def test_in_stage_2_a_backward_that_fails_is_forgotten(zeroed: str, gone: bool) -> None:
    """Where this optimizer zeroes gradients, at once; else those of the next backward are averaged in `step`."""
    want, got = (run(2, lambda rank, stage=stage: in_stage(stage, failing, rank, zeroed)) for stage in (1, 2))
    assert_equal(got, want)
    assert [each for _, each in got] == [[True, True, gone, True, True]] * 2


def half_in_join(rank: int) -> None:
    model = shoal.DistributedDataParallel(nn.Linear(6, 2))
    for step in range(3):
        with model.join(enable=rank == 0 and step == 2):
            model(torch.randn(4, 6)).sum().backward()


def test_join_on_some_ranks_only() -> None:
    with pytest.raises(DivergedError, match=r"rank 0 is inside `with model.join\(\):`, and others are not"):
        run(2, half_in_join)


def there_and_back(rank: int) -> list[Tensor]:
    """With and without join in turns: ranks with unequal data, then equal again."""
    torch.manual_seed(0)
    model = shoal.DistributedDataParallel(Net(in_order), bucket_cap_mb=TINY)
    for epoch in range(4):
        with model.join(enable=epoch % 2 == 1):
            for step in range(2 + rank * (epoch % 2)):
                model(torch.randn(4, 6), step, rank).sum().backward()
                torch.optim.SGD(model.parameters(), lr=0.1).step()
                model.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_in_and_out_of_join() -> None:
    one, other = run(2, there_and_back)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("stage", [None, 2])
@pytest.mark.parametrize("use", [in_order, some], ids=lambda use: use.__name__)
def test_in_one_round(use: Use, stage: int | None) -> None:
    """Small models send all to all, with the same bits."""

    def main(rank: int, one_round: int) -> tuple[object, int]:
        carrier = current.get()
        assert carrier is not None
        carrier.levels.one_round = one_round
        done = trained(use, rank, 3) if stage is None else in_stage(stage, use, rank)
        return done, carrier.sent["agree"]

    nbytes = 4 * 5 * 42
    two, one = (run(3, lambda rank, n=n: main(rank, n)) for n in (nbytes - 1, nbytes))
    assert sum(sent for _, sent in one) * 2 == sum(sent for _, sent in two) * 3 > 0
    assert torch.equal(flat(two), flat(one))


def flat(results: object) -> Tensor:
    """All tensors in it, one after the other."""
    if isinstance(results, Tensor):
        return results.detach().reshape(-1)
    found = [flat(r) for r in results] if isinstance(results, (list, tuple)) else []
    return torch.cat(found) if found else torch.empty(0)
