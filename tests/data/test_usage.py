"""What an epoch has used is counted over all ranks and held against what was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, WeightedRandomSampler

import shoal
from shoal.comm.threads import run
from shoal.data import Usage
from shoal.data.loader import Loader
from shoal.errors import BatchError, DivergedError
from tests.data.test_stream import Numbers as Stream
from tests.engine.trials import Numbers, sgd

Make = Callable[[shoal.Job], Loader[Tensor]]


def wrapped(**how: object) -> Make:
    def make(job: shoal.Job) -> Loader[Tensor]:
        model = nn.Linear(1, 1)
        return job.prepare(model, sgd(model), DataLoader(Numbers(14), **how))[2]

    return make


def reports(world: int, make: Make, *, stop: int | None = None, leaves: int = 4) -> list[Usage]:
    def rank_main(_rank: int) -> Usage:
        with shoal.init("ddp", leaves=leaves, run_dir="none", device="cpu") as job:
            loader = make(job)
            for _ in loader:
                if loader.next_step == stop:
                    break
            return loader.report()

    return run(world, rank_main)


KEYS = [0] * 8 + [1] * 3 + [2] * 2 + [3]
TABLE: dict[str, tuple[Make, Usage, str]] = {
    "all": (
        lambda job: job.loader(Numbers(14), global_batch=8),
        Usage(epoch=0, used=14, total=14),
        "epoch 0: 14 of 14 samples used",
    ),
    "drop_last": (
        lambda job: job.loader(Numbers(14), global_batch=8, drop_last=True),
        Usage(epoch=0, used=8, total=14, dropped=6),
        "epoch 0: 8 of 14 samples used, 6 dropped",
    ),
    "by key": (
        lambda job: job.loader(Numbers(14), global_batch=8, partition="key", key=KEYS),
        Usage(epoch=0, used=14, total=14, padded=-1),
        "",
    ),
    "some are drawn": (
        wrapped(batch_size=2, sampler=RandomSampler(range(14), num_samples=9)),
        Usage(epoch=0, used=9, total=14, dropped=5, padded=-1),
        "",
    ),
    "drawn twice": (
        wrapped(batch_size=2, sampler=[3, 3, 5, 1, 3]),
        Usage(epoch=0, used=5, total=14, dropped=11, doubled=2, padded=-1),
        "",
    ),
    "read through": (
        lambda job: job._wrap(DataLoader(Stream(), batch_size=3)),
        Usage(epoch=0, used=23, total=None),
        "epoch 0: 23 samples used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("name", TABLE)
def test_what_was_used(name: str, world: int) -> None:
    make, want, told = TABLE[name]
    found = reports(world, make)
    assert len(set(found)) == 1, "the same on all ranks"
    plain = {f: getattr(found[0], f) for f in Usage.__dataclass_fields__ if f != "padded"}
    assert plain == {f: getattr(want, f) for f in plain}
    if told and world == 1:
        assert str(found[0]) == told


def test_what_is_handed_out_again_is_no_use() -> None:
    """14 samples, 2 a leaf: the second step has 3 leaves of 4, and rank 3 gets one of them again."""
    assert reports(4, TABLE["all"][0])[0] == Usage(epoch=0, used=14, total=14, padded=2)


def test_a_loop_that_is_left() -> None:
    assert str(reports(2, TABLE["all"][0], stop=1, leaves=2)[0]) == "epoch 0: 8 of 14 samples used, 6 left"


def test_going_on_counts_what_was_before(tmp_path: Path) -> None:
    def rank_main(_rank: int) -> list[str]:
        with shoal.init("ddp", leaves=2, run_dir="none", device="cpu") as job:
            model = nn.Linear(1, 1)
            model, optimizer = job.prepare(model, sgd(model))
            loader = job.loader(Numbers(14), global_batch=4)
            if any(tmp_path.glob("step-*")):
                job.load(tmp_path)
            told: list[str] = []
            for x in loader:
                model(x.float()[:, None]).mean().backward()
                optimizer.step()
                if job.stepped and job.step == 2 and not told:
                    job.save(tmp_path)
                    break
            return [str(loader.report())]

    assert run(2, rank_main) == [["epoch 0: 8 of 14 samples used, 6 left"]] * 2
    assert run(1, rank_main) == [["epoch 0: 6 of 14 samples used, 8 before"]]


# ---------------------------------------------------------------- what is refused


class ByRank(Sampler[int]):
    """Divides by rank, and does not say so."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 14, 2))

    def __len__(self) -> int:
        return 7


def test_a_sampler_that_divides_by_rank_is_found() -> None:
    with pytest.raises(DivergedError, match=r"the samplers of ranks draw different samples[\s\S]*divides by rank"):
        reports(2, lambda job: wrapped(batch_size=2, sampler=ByRank(job.rank))(job), leaves=2)


def test_one_that_says_so_is_refused_at_once() -> None:
    sampler = ByRank(0)
    sampler.num_replicas = 2  # type: ignore[attr-defined]
    for how in ({"batch_size": 2, "sampler": sampler}, {"batch_sampler": BatchSampler(sampler, 2, False)}):
        with pytest.raises(BatchError, match=r"the loader's ByRank divides the samples by num_replicas=2"):
            reports(1, wrapped(**how))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_distributed_sampler_is_not_doubled(inside: bool, shuffle: bool) -> None:
    """Given as it is, or inside a batch sampler, whose size and end stay."""
    sampler = DistributedSampler(Numbers(14), 2, 1, shuffle=shuffle)
    how = (
        {"batch_sampler": BatchSampler(sampler, 4, True)}
        if inside
        else {"batch_size": 4, "sampler": sampler, "drop_last": True}
    )
    found = reports(2, wrapped(**how), leaves=2)[0]
    assert (found.used, found.dropped, found.doubled) == (12, 2, 0)


@pytest.mark.parametrize("world", [1, 3])
def test_once_refuses_a_sample_that_comes_twice(world: int) -> None:
    def make(job: shoal.Job) -> Loader[Tensor]:
        loader = wrapped(batch_size=2, sampler=[0, 1, 2, 3, 4, 1])(job)
        loader.once = True
        return loader

    with pytest.raises(BatchError) as e:
        reports(world, make)
    assert "epoch 0: sample 1 is in leaf 0 of step 0 and in leaf 2 of step 0" in e.value.what
    assert "loader.once = False" in e.value.remedy


def test_once_lets_others_pass() -> None:
    def make(job: shoal.Job) -> Loader[Tensor]:
        loader = wrapped(batch_size=2, shuffle=True)(job)
        loader.once = True
        return loader

    assert reports(2, make)[0].used == 14


def test_weights_may_draw_twice() -> None:
    """With replacement: what comes twice is counted."""
    found = reports(2, wrapped(batch_size=2, sampler=WeightedRandomSampler([1.0] * 14, 14)))[0]
    assert found.used == 14
    assert found.doubled == found.dropped > 0


def test_a_rank_that_leaves_earlier_is_named() -> None:
    def rank_main(rank: int) -> None:
        with shoal.init("ddp", leaves=2, run_dir="none", device="cpu") as job:
            loader = job.loader(Numbers(14), global_batch=4)
            for _ in loader:
                if rank:
                    break
            loader.report()

    with pytest.raises(DivergedError, match="samples were used of 14 that were planned"):
        run(2, rank_main)


def test_samples_that_have_no_numbers() -> None:
    """A sampler may draw anything that the data set understands."""

    class Named(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, name: str) -> Tensor:
            return torch.tensor(len(name))

    def make(job: shoal.Job) -> Loader[Tensor]:
        return job._wrap(DataLoader(Named(), batch_size=1, sampler=["a", "bc", "def", "a"]))

    assert str(reports(2, make, leaves=2)[0]) == "epoch 0: 4 of 3 samples used, 1 doubled"
