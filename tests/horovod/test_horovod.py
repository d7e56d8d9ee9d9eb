"""Horovod's names, on threads; a whole script by `shoal run` in tests/tutorials."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shoal.horovod as hvd
from shoal.comm.threads import run
from shoal.errors import DivergedError, OptimizerError, OrderError, SettingError


def ranks(size: int, main: Callable[[int], Any], *, order: int | None = None) -> list[Any]:
    def rank_main(rank: int) -> Any:
        hvd.init()
        assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()) == (rank, size, rank, size)
        try:
            return main(rank)
        finally:
            with contextlib.suppress(Exception):
                hvd.shutdown()

    return run(size, rank_main, seed=order)


def numbers(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_allreduce(size: int) -> None:
    every = torch.stack([numbers(r, 3, 4) for r in range(size)])
    whole = torch.stack([torch.arange(5) * (r + 1) - 3 for r in range(size)])
    want = {
        "Average": every.mean(0), "Sum": every.sum(0), "Min": every.min(0)[0], "Max": every.max(0)[0],
        "Product": every.prod(0),
    }  # fmt: skip

    def main(rank: int) -> None:
        mine = numbers(rank, 3, 4)
        for op, value in want.items():
            torch.testing.assert_close(hvd.allreduce(mine, op=getattr(hvd, op)), value)
        assert torch.equal(mine, numbers(rank, 3, 4))
        torch.testing.assert_close(hvd.allreduce(mine, average=False), want["Sum"])
        torch.testing.assert_close(hvd.allreduce(mine, name="loss"), want["Average"])
        torch.testing.assert_close(hvd.allreduce(mine, prescale_factor=2.0, postscale_factor=0.5), want["Average"])
        half = hvd.allreduce(mine, compression=hvd.Compression.fp16)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, want["Average"], atol=2e-3, rtol=1e-2)
        assert torch.equal(hvd.allreduce(whole[rank], op=hvd.Sum), whole.sum(0))
        assert torch.equal(hvd.allreduce(whole[rank]), whole.sum(0).div(size, rounding_mode="floor"))
        assert hvd.allreduce_(mine) is mine
        torch.testing.assert_close(mine, want["Average"])
        assert hvd.allreduce(torch.tensor(float(rank))).item() == pytest.approx((size - 1) / 2)

    ranks(size, main)


def test_sums_have_one_order() -> None:
    """Whoever runs first."""
    found = [ranks(3, lambda r: hvd.allreduce(numbers(r, 50)), order=order) for order in (1, 2)]
    assert all(torch.equal(x, found[0][0]) for each in found for x in each)


def test_handles() -> None:
    def main(rank: int) -> None:
        a = hvd.allreduce_async(torch.ones(3) * rank, name="a")
        b = hvd.allgather_async(torch.ones(1 + rank), name="b")
        into = torch.full((2,), float(rank))
        c = hvd.broadcast_async_(into, root_rank=1)
        d = hvd.allreduce_async_(torch.ones(2), op=hvd.Sum)
        assert hvd.synchronize(d).tolist() == [2.0, 2.0]
        assert hvd.synchronize(c) is into
        assert into.tolist() == [1.0, 1.0]
        assert hvd.synchronize(b).tolist() == [1.0] * 3
        assert hvd.synchronize(a).tolist() == [0.5] * 3
        assert hvd.poll(a)

    ranks(2, main)


def test_allgather_of_unequal_shapes() -> None:
    def main(rank: int) -> None:
        found = hvd.allgather(torch.full((rank, 2), rank))
        assert found.tolist() == [[1, 1], [2, 2], [2, 2]]
        assert hvd.allgather(torch.tensor(rank * 1.5)).tolist() == [0.0, 1.5, 3.0]
        assert hvd.allgather_object({"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]

    ranks(3, main)


def test_broadcast() -> None:
    def main(rank: int) -> None:
        assert hvd.broadcast(torch.tensor([rank, 7]), root_rank=1).tolist() == [1, 7]
        assert hvd.broadcast_object([rank, "epoch"], root_rank=2) == [2, "epoch"]
        into = torch.tensor(rank * 1.0)
        hvd.broadcast_(into, 0)
        assert into.item() == 0.0

    ranks(3, main)


# -------------------------------------------------------------------- optimizer


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, datas: list[list[Tensor]]) -> None:
    for several in datas:
        optimizer.zero_grad()
        for data in several:
            model(data).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("op", ["Average", "Sum"])
def test_distributed_optimizer(op: str, passes: int) -> None:
    """Two ranks against one process that adds the gradients up itself; clipping between synchronize and step."""

    def data(step: int, rank: int) -> list[Tensor]:
        return [numbers(100 * step + 10 * n + rank, 6, 4) for n in range(passes)]

    def main(rank: int) -> dict[str, Tensor]:
        model = net(rank)
        plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        made = hvd.DistributedOptimizer(
            plain, named_parameters=model.named_parameters(), backward_passes_per_step=passes, op=getattr(hvd, op)
        )
        assert isinstance(made, torch.optim.SGD)
        assert made.param_groups is plain.param_groups
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(made, root_rank=0)
        torch.optim.lr_scheduler.StepLR(made, 1)
        train(model, made, [data(s, rank) for s in range(2)])
        made.zero_grad()
        for each in data(2, rank):
            model(each).square().mean().backward()
        made.synchronize()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with made.skip_synchronize():
            made.step()
        assert norm > 0.01
        return {n: p.detach() for n, p in model.named_parameters()}

    model = net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            for each in data(step, rank):
                (model(each).square().mean() / (2 if op == "Average" else 1)).backward()
        if step == 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    for got in ranks(2, main):
        for name, value in model.named_parameters():
            torch.testing.assert_close(got[name], value.detach(), atol=1e-5, rtol=1e-4)


def test_half_precision_on_the_wire() -> None:
    def main(rank: int) -> Tensor:
        p = nn.Parameter(torch.zeros(3))
        made = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), compression=hvd.Compression.fp16)
        p.grad = torch.tensor([1 + 2**-12, 1.0, 2.0]) * (rank + 1)
        made.step()
        assert p.dtype == torch.float32
        return p.detach()

    assert ranks(2, main)[0].tolist() == [-1.5, -1.5, -3.0]


def test_optimizer_state_from_one_rank() -> None:
    """State, learning rate and tuples, where only the root has stepped."""

    def main(rank: int) -> None:
        model = net(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1 / (rank + 1), betas=(0.5 + rank / 10, 0.9))
        if rank == 1:
            train(model, optimizer, [[numbers(0, 6, 4)]])
        hvd.broadcast_optimizer_state(optimizer, root_rank=1)
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert optimizer.param_groups[0]["betas"] == (0.6, 0.9)
        assert all(torch.equal(v, hvd.broadcast(v, 1)) for s in optimizer.state.values() for v in s.values())
        assert len(optimizer.state) == 6
        with pytest.raises(OptimizerError, match=r"broadcast_optimizer_state of LBFGS[\s\S]*another optimizer"):
            hvd.broadcast_optimizer_state(torch.optim.LBFGS(model.parameters()), 0)

    ranks(2, main)


def test_join() -> None:
    """A rank out of data brings zeros; averages divide by all ranks; all hear who was last."""

    def main(rank: int) -> tuple[int, list[float]]:
        p = nn.Parameter(torch.zeros(1))
        made = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1.0))
        seen: list[float] = []
        for _ in range(1 + 2 * rank):
            p.grad = torch.ones(1) * (rank + 1)
            made.step()
            seen.append(hvd.allreduce(torch.ones(2), name="ones")[0].item())
            seen.append(hvd.allreduce(torch.tensor([4]), op=hvd.Sum)[0].item())
            assert hvd.allreduce(torch.tensor([5.0]), op=hvd.Min).item() == 5.0  # whoever has joined brings nothing
        return hvd.join(), [*seen, p.item()]

    found = ranks(2, main)
    assert found[0] == (1, [1.0, 8, -1.5])
    assert found[1] == (1, [1.0, 8, 0.5, 4, 0.5, 4, -3.5])


@pytest.mark.parametrize("what", ["allgather", "broadcast", "broadcast_object", "allgather_object"])
def test_what_cannot_go_on_without_a_rank(what: str) -> None:
    def main(rank: int) -> None:
        if rank == 0:
            hvd.join()
        value = [1] if "object" in what else torch.ones(2)
        getattr(hvd, what)(value, *([0] if "broadcast" in what else []))

    with pytest.raises(
        OrderError, match=rf"hvd.{what} while rank 0 is in hvd.join\(\)[\s\S]*only allreduce and a Dist"
    ):
        ranks(2, main)


# -------------------------------------------------------------------- mistakes


def test_different_calls_are_named() -> None:
    def main(rank: int) -> None:
        hvd.allreduce(torch.ones(2 + rank), name="loss")

    with pytest.raises(DivergedError) as e:
        ranks(2, main)
    assert "rank 0 calls allreduce(name=loss, shape=[2]" in str(e.value)
    assert "rank 1 calls allreduce(name=loss, shape=[3]" in str(e.value)
    assert "the same calls in the same order on all ranks; hvd.join()" in str(e.value)


def test_the_end_of_a_program_is_a_call() -> None:
    def main(rank: int) -> None:
        hvd.init()
        if rank == 0:
            hvd.allreduce(torch.ones(1))
        hvd.shutdown()

    with pytest.raises(DivergedError, match=r"rank 0 calls allreduce.*rank 1 calls end of the program"):
        run(2, main)


def test_joined_ranks_hear_of_the_end() -> None:
    def main(rank: int) -> None:
        hvd.init()
        if rank == 0:
            hvd.join()
        hvd.shutdown()

    with pytest.raises(
        DivergedError, match=r"came to the end of its program while others are in hvd.join\(\)[\s\S]*on a"
    ):
        run(2, main)


def test_before_init() -> None:
    assert not hvd.is_initialized()
    with pytest.raises(OrderError, match=r"before hvd.init\(\)[\s\S]*import shoal.horovod as hvd; hvd.init\(\)"):
        hvd.rank()


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "Adasum": (SettingError, "op=hvd.Average", lambda: hvd.allreduce(torch.ones(1), op=hvd.Adasum)),
    "process set": (SettingError, "process_group=", lambda: hvd.allreduce(torch.ones(1), process_set=1)),
    "root": (OrderError, "such as root_rank=0", lambda: hvd.broadcast(torch.ones(1), root_rank=4)),
    "object": (SettingError, "which are sent no code", lambda: hvd.broadcast_object(print)),
    "Adasum's optimizer": (SettingError, "op=hvd.Average, or hvd.Sum", lambda: optimizer_of(op=hvd.Adasum)),
    "a set of an optimizer": (SettingError, "process_set=", lambda: optimizer_of(process_set=3)),
    "a name twice": (OptimizerError, "has 'a' twice", lambda: optimizer_of(names="aa")),
    "a name is missing": (OptimizerError, "lacks 1 of the optimizer's 2 parameters", lambda: optimizer_of(names="a")),
    "skip": (OrderError, "optimizer.synchronize() first", lambda: optimizer_of().skip_synchronize().__enter__()),
}


def optimizer_of(names: str | None = None, **keywords: Any) -> Any:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    named = None if names is None else list(zip(names, params, strict=False))
    return hvd.DistributedOptimizer(torch.optim.SGD(params, lr=0.1), named, **keywords)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    kind, text, call = REFUSED[name]
    with pytest.raises(kind) as e:
        ranks(2, lambda _rank: call())
    assert text in str(e.value)


def test_what_is_not_here() -> None:
    assert not hasattr(hvd, "elastic")
    with pytest.raises(AttributeError, match=r"has no 'SyncBatchNorm'; it has Adasum, .*GroupNorm"):
        hvd.SyncBatchNorm  # noqa: B018
    assert not hvd.mpi_threads_supported()
    assert not hvd.nccl_built()


def test_an_optimizer_that_nobody_distributes_is_said() -> None:
    """The forgotten line: every rank trains alone."""

    def main(distribute: bool, rank: int) -> None:
        model = net(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if distribute:
            optimizer = hvd.DistributedOptimizer(optimizer)
        train(model, optimizer, [[numbers(rank, 6, 4)]])

    said = io.StringIO()
    with redirect_stderr(said):
        ranks(2, lambda rank: main(False, rank))
    assert "replicas drifted apart: after 1 steps of SGD the ranks' parameters differ" in said.getvalue()
    said = io.StringIO()
    with redirect_stderr(said):
        ranks(2, lambda rank: main(True, rank))
    assert said.getvalue() == ""
