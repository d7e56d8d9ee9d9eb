"""`job.reduce`, `gather`, `broadcast`, `barrier` and `print`."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal import collectives
from shoal.collectives import SMALL
from shoal.comm.meter import dry_run
from shoal.comm.threads import run
from shoal.errors import DivergedError, SettingError

T = TypeVar("T")
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int8,
    torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip


def together(world: int, body: Callable[[shoal.Job], T], **settings: object) -> list[T]:
    """What `body(job)` returns on every rank."""

    def rank_main(_rank: int) -> T:
        with shoal.init(settings.get("strategy", "ddp"), run_dir="none", device="cpu") as job:
            return body(job)

    return run(world, rank_main, seed=settings.get("order"))


def made(rank: int, dtype: torch.dtype, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=g) * 3).to(dtype)


def assert_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.view(-1).view(torch.uint8), want.view(-1).view(torch.uint8))


# ---------------------------------------------------------------- reduce


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.bool], ids=str)
def test_the_sum_of_any_dtype(dtype: torch.dtype, world: int) -> None:
    parts = [made(r, dtype, 5, 3) for r in range(world)]
    wide = [p.float() if dtype in (torch.float16, torch.bfloat16) else p for p in parts]
    want = wide[0] if world == 1 else (wide[0] + wide[1] if world == 2 else (wide[0] + wide[1]) + wide[2]).to(dtype)
    for found in together(world, lambda job: job.reduce(parts[job.rank])):
        assert_bits(found, want.to(dtype))


@pytest.mark.parametrize(("op", "want"), [("sum", 9), ("prod", 24), ("min", 2), ("max", 4)])
def test_ops_and_numbers(op: str, want: int) -> None:
    assert together(3, lambda job: job.reduce(job.rank + 2, op)) == [want] * 3
    found = together(3, lambda job: job.reduce(torch.tensor(job.rank + 2.0), op))
    assert [t.item() for t in found] == [float(want)] * 3


def test_means_bools_and_complex_numbers() -> None:
    assert together(2, lambda job: job.reduce(job.rank + 0.5, "mean")) == [1.0, 1.0]
    assert together(2, lambda job: job.reduce(job.rank == 1, "max")) == [True, True]
    assert together(2, lambda job: job.reduce(job.rank == 1, "min")) == [False, False]
    assert together(2, lambda job: job.reduce(complex(job.rank, 1))) == [1 + 2j, 1 + 2j]


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_values_have_the_bits_of_small_ones(
    world: int, op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices that owners add up, and all of it added up everywhere."""
    count = SMALL // dtype.itemsize + 7
    large = together(world, lambda job: job.reduce(made(job.rank, dtype, count), op), order=1)
    monkeypatch.setattr(collectives, "SMALL", 1 << 40)
    small = together(world, lambda job: job.reduce(made(job.rank, dtype, count), op))
    for found in large:
        assert_bits(found, small[0])


def test_large_values_send_less() -> None:
    """Twice (n - 1) / n of it, not n - 1 times."""

    def body(job: shoal.Job) -> int:
        job.reduce(torch.zeros(4 * SMALL))
        return job.traffic["collective"]

    assert together(4, body) == [2 * 3 * 4 * SMALL] * 4


def test_what_was_passed_stays_as_it_was() -> None:
    def body(job: shoal.Job) -> None:
        value = torch.ones(3, requires_grad=True)
        handle = job.reduce_async(value)
        with torch.no_grad():
            value.fill_(7.0)
        found = handle.wait()
        assert found.tolist() == [2.0] * 3
        assert not found.requires_grad
        assert value.tolist() == [7.0] * 3
        strided = torch.arange(6.0).view(2, 3).t()
        assert job.reduce(strided).tolist() == (2 * strided).tolist()
        assert job.reduce(torch.empty(0, 4)).shape == (0, 4)

    together(2, body)


def test_handles_may_be_waited_for_in_any_order() -> None:
    def body(job: shoal.Job) -> None:
        handles = [job.reduce_async(torch.full((SMALL,), float(i + job.rank))) for i in range(3)]
        lists = job.gather_async(torch.tensor([job.rank]))
        order = [2, 0, 1] if job.rank else [1, 2, 0]
        for i in order:
            assert handles[i].wait()[0].item() == 2 * i + 1
            assert handles[i].wait() is handles[i].wait()
        assert [t.item() for t in lists.wait()] == [0, 1]

    together(2, body)


@pytest.mark.parametrize(
    ("value", "op", "message"),
    [
        (1.0, "median", "job.reduce\\(op='median'\\)[\\s\\S]*known: sum, mean"),
        (torch.tensor(True), "sum", 'the sum of bool[\\s\\S]*op="max" for any'),
        (torch.tensor(1), "mean", "the mean of int64 is no int64[\\s\\S]*value.float()"),
        (torch.tensor(1j), "max", "the max of complex64, which has no order"),
        ("text", "sum", "job.reduce of a str[\\s\\S]*a tensor or a number"),
    ],
)
def test_what_cannot_be_reduced(value: object, op: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        together(2, lambda job: job.reduce(value, op))


@pytest.mark.parametrize(
    ("zero", "one", "words"),
    [
        (torch.zeros(3), torch.zeros(4), r"float32 \(3,\) on cpu, op='sum'\); rank 1 job.reduce\(float32 \(4,\)"),
        (torch.zeros(3), torch.zeros(3).half(), r"rank 1 job.reduce\(float16 \(3,\)"),
        (torch.zeros(()), 0.0, r"rank 1 job.reduce\(float, "),
        (1, 1.0, r"rank 0 job.reduce\(int, op='sum'\); rank 1 job.reduce\(float, "),
    ],
)
def test_ranks_that_reduce_different_things(zero: object, one: object, words: str) -> None:
    with pytest.raises(DivergedError, match="ranks pass different things: [\\s\\S]*" + words):
        together(2, lambda job: job.reduce(one if job.rank else zero))


def test_ranks_in_different_calls() -> None:
    def body(job: shoal.Job) -> None:
        job.reduce(1) if job.rank else job.barrier()

    with pytest.raises(DivergedError, match=r"rank 0 is in job.barrier; rank 1 is in job.reduce"):
        together(2, body)


# ---------------------------------------------------------------- gather


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_unequal_shapes_of_any_dtype(dtype: torch.dtype) -> None:
    shapes = [(2, 3), (), (0, 5), (7,)]
    for found in together(4, lambda job: job.gather(made(job.rank, dtype, *shapes[job.rank]))):
        for rank, got in enumerate(found):
            assert_bits(got, made(rank, dtype, *shapes[rank]))


def test_gather_what_json_can_say() -> None:
    found = together(3, lambda job: job.gather({"rank": job.rank, "text": "x" * job.rank} if job.rank else None))
    assert found == [[None, {"rank": 1, "text": "x"}, {"rank": 2, "text": "xx"}]] * 3


def test_what_cannot_be_gathered() -> None:
    with pytest.raises(SettingError, match=r"job.gather of a set: [\s\S]*never as pickles"):
        together(2, lambda job: job.gather({1}))
    with pytest.raises(DivergedError, match=r"rank 0 job.gather\(float32 on cpu\); rank 1 job.gather\(int64 on cpu\)"):
        together(2, lambda job: job.gather(torch.tensor(0 if job.rank else 0.0)))
    with pytest.raises(DivergedError, match=r"rank 0 job.gather\(float32 on cpu\); rank 1 job.gather\(a value\)"):
        together(2, lambda job: job.gather(0.0 if job.rank else torch.tensor(0.0)))


# ---------------------------------------------------------------- broadcast, barrier, print


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("root", [0, 2])
def test_broadcast(dtype: torch.dtype, root: int) -> None:
    def body(job: shoal.Job) -> Tensor | None:
        mine = made(5, dtype, 4, 2).t() if job.rank == root else made(job.rank, dtype, 2, 4) if job.rank == 1 else None
        return job.broadcast(mine, root)

    for found in together(3, body):
        assert_bits(found.contiguous(), made(5, dtype, 4, 2).t().contiguous())


def test_broadcast_what_json_can_say() -> None:
    assert (
        together(2, lambda job: job.broadcast({"best": [1, None]} if job.main else None)) == [{"best": [1, None]}] * 2
    )


def test_what_cannot_be_broadcast() -> None:
    with pytest.raises(SettingError, match=r"job.broadcast\(root=2\)[\s\S]*a rank from 0 to 1"):
        together(2, lambda job: job.broadcast(1, root=2))
    with pytest.raises(SettingError, match=r"job.broadcast of a object: "):
        together(2, lambda job: job.broadcast(object()))
    with pytest.raises(DivergedError, match=r"root=0\); rank 1 job.broadcast\(..., root=1\)"):
        together(2, lambda job: job.broadcast(1, root=job.rank))
    with pytest.raises(DivergedError, match=r"rank 0 passes float32 \(1,\) on cpu; rank 1 passes float32 \(2,\)"):
        together(2, lambda job: job.broadcast(torch.zeros(job.rank + 1)))
    with pytest.raises(
        DivergedError, match=r"rank 0 passes a value; rank 1 passes float32[\s\S]*None on all ranks but 0"
    ):
        together(2, lambda job: job.broadcast(torch.zeros(1) if job.rank else 3))


def test_nobody_leaves_a_barrier_before_all_have_come() -> None:
    came: list[int] = []

    def body(job: shoal.Job) -> int:
        came.append(job.rank)
        job.barrier()
        return len(came)

    assert together(3, body, order=3) == [3, 3, 3]


def test_print() -> None:
    streams = [io.StringIO() for _ in range(2)]

    def body(job: shoal.Job) -> None:
        job.print("loss", 1.5, file=streams[job.rank])
        job.print("I am", job.rank, all=True, file=streams[job.rank])

    together(2, body)
    assert [s.getvalue() for s in streams] == ["loss 1.5\n[rank 0] I am 0\n[rank 1] I am 1\n", ""]


# ---------------------------------------------------------------- beside training


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_loops_of_unequal_length(strategy: str) -> None:
    """As a generation does: who has run out serves the others in the next call, whichever it is."""

    def body(job: shoal.Job) -> list[float]:
        model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Sequential(nn.Linear(64, 4)))
        model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        x = torch.ones(1, 4)
        with torch.no_grad():
            for _ in range(1 + 2 * job.rank):
                x = model.eval()(x)
        return [t.sum().item() for t in job.gather(x)]

    first, second, third = together(3, body, strategy=strategy, order=2)
    assert first == second == third
    assert len(set(first)) == 3


def test_dry_runs_count_them() -> None:
    def rank_main(_rank: int) -> None:
        with shoal.init("ddp", run_dir="none") as job:
            job.reduce(torch.zeros(4 * SMALL, device=job.device))
            job.barrier()

    assert dry_run(0, 4, rank_main)["collective"] == 2 * 3 * 4 * SMALL
