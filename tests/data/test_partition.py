"""By rows, by files, by keys: which leaf has a sample hangs on no world size, and every sample is used once."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

import shoal
from shoal.data import FileShards, TokenFile
from shoal.errors import BatchError
from tests.data.reading import Make, flat, handed
from tests.data.test_stream import Numbers as Stream
from tests.engine.trials import Numbers
from tests.equivalence.models import on_threads

SIZES = [7, 1, 19, 4, 4, 12, 0, 6]
FILES = [sum(SIZES[:n]) for n in range(9)]
HOSPITALS = [n * n % 11 % 7 for n in range(53)]


class Part(Dataset[Tensor]):
    """The numbers of a range."""

    def __init__(self, first: int, stop: int) -> None:
        self.numbers = range(first, stop)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self.numbers[index])


def files() -> ConcatDataset[Tensor]:
    return ConcatDataset([Part(a, b) for a, b in itertools.pairwise(FILES)])


def in_files(**how: object) -> Make:
    return lambda job: job.loader(files(), global_batch=12, partition="file", **how)


def by_key(**how: object) -> Make:
    return lambda job: job.loader(Numbers(53), global_batch=12, partition="key", key=HOSPITALS, **how)


MAKE: dict[str, Make] = {
    "file": in_files(), "file, in order": in_files(shuffle=False), "file, full steps": in_files(drop_last=True),
    "key": by_key(), "key, in order": by_key(shuffle=False),
    "key, a function": lambda job: job.loader(Numbers(53), global_batch=12, partition="key", key=lambda n: f"k{n % 9}"),
    "key, an array": lambda job: job.loader(Numbers(53), global_batch=12, partition="key", key=np.array(HOSPITALS)),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKE)
def test_the_same_leaves_whatever_the_world(name: str) -> None:
    want = handed(1, 4, MAKE[name])
    for world in (2, 3, 5):
        assert handed(world, 4, MAKE[name]) == want
    if "full" not in name:
        assert sorted(flat(want)) == list(range(53))


def homes(found: dict[tuple[int, int], list[float]], keys: Iterable[Hashable]) -> dict[Hashable, set[int]]:
    of = list(keys)
    where: dict[Hashable, set[int]] = {}
    for (_, leaf), batch in found.items():
        for number in batch:
            where.setdefault(of[int(number)], set()).add(leaf)
    return where


def test_a_key_has_one_leaf() -> None:
    for name, keys in [
        ("key", HOSPITALS),
        ("key, in order", HOSPITALS),
        ("key, a function", [n % 9 for n in range(53)]),
    ]:
        assert all(len(leaves) == 1 for leaves in homes(handed(3, 4, MAKE[name]), keys).values()), name
    in_rows = handed(3, 4, lambda job: job.loader(Numbers(53), global_batch=12))
    assert any(len(leaves) > 1 for leaves in homes(in_rows, HOSPITALS).values()), "the test sees a difference"


def test_a_file_has_one_leaf_and_is_read_in_one_go() -> None:
    of = [sum(end <= n for end in FILES[1:]) for n in range(53)]
    found = handed(2, 4, MAKE["file"])
    assert all(len(leaves) == 1 for leaves in homes(found, of).values())
    for leaf in range(4):
        order = [of[int(n)] for (_, at), batch in sorted(found.items()) if at == leaf for n in batch]
        changes = sum(a != b for a, b in itertools.pairwise(order))
        assert changes == len(set(order)) - 1
    rows = [n for (_, at), batch in sorted(found.items()) if at == 0 for n in batch]
    assert rows != sorted(rows)


def test_the_largest_go_first() -> None:
    """Files of 19, 12, 7, 6, 4, 4, 1: leaves of 19, 12, 11 and 11."""
    found = handed(1, 4, MAKE["file, in order"])
    sizes = [sum(len(batch) for (_, at), batch in found.items() if at == leaf) for leaf in range(4)]
    assert sorted(sizes) == [11, 11, 12, 19]


def test_a_new_order_every_epoch_and_the_same_leaves() -> None:
    with shoal.init("ddp", leaves=4, run_dir="none", device="cpu") as job:
        loader = in_files()(job)
        epochs = [
            [(job._feed.handed.leaf, batch.tolist()) for batch in loader if job._feed.handed.weight] for _ in range(2)
        ]
    assert epochs[0] != epochs[1]
    sets = [{leaf: sorted(n for at, b in e if at == leaf for n in b) for leaf in range(4)} for e in epochs]
    assert sets[0] == sets[1]


def test_leaves_that_run_out_weigh_nothing() -> None:
    """One key has most samples: in the last steps other leaves are empty, and the bits are those of one process."""
    keys = [0] * 38 + [1] * 9 + [2] * 5 + [3] * 4

    def outcome(world: int, strategy: str) -> object:
        return on_threads(world, strategy, leaves=4, loading={"partition": "key", "key": keys}, epochs=2)

    want = outcome(1, "ddp")
    assert want != on_threads(1, "ddp", leaves=4, epochs=2)
    for world, strategy in [(2, "ddp"), (3, "zero1"), (2, "zero3"), (5, "zero2")]:
        assert outcome(world, strategy) == want


# ---------------------------------------------------------------- resuming, for every kind of set


def token_file(path: Path) -> TokenFile:
    if not path.exists():
        np.arange(60, dtype=np.uint16).tofile(path)
    return TokenFile(path, 3, stride=2)


def shards(path: Path) -> FileShards[Tensor]:
    for number, (first, stop) in enumerate(itertools.pairwise(FILES)):
        torch.save(torch.arange(first, stop), path / f"{number}.pt")
    return FileShards([path / f"{n}.pt" for n in range(8)], torch.load)


def prepared(job: shoal.Job, source: DataLoader[Tensor]) -> Iterable[Tensor]:
    return job._wrap(source)


RESUMED: dict[str, object] = {
    "mapped": lambda job, path: job.loader(token_file(path / "tokens"), global_batch=8),
    "shards": lambda job, path: job.loader(shards(path), global_batch=8, partition="file"),
    "key": lambda job, _: by_key()(job),
    "prepared": lambda job, _: prepared(job, DataLoader(Numbers(53), batch_size=3, shuffle=True)),
    "prepared, with workers": lambda job, _: prepared(
        job, DataLoader(Numbers(53), batch_size=3, shuffle=True, num_workers=2, prefetch_factor=3)
    ),
    "read through": lambda job, _: prepared(job, DataLoader(Stream(), batch_size=2)),
    "read through by a worker": lambda job, _: prepared(job, DataLoader(Stream(), batch_size=2, num_workers=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_going_on_in_the_middle_of_an_epoch(name: str, tmp_path: Path) -> None:
    """Two steps with two ranks, the rest with three: together what one process is handed."""

    def make(job: shoal.Job) -> Iterable[Tensor]:
        return RESUMED[name](job, tmp_path)  # type: ignore[operator]

    want = handed(1, 4, make)
    first = handed(2, 4, make, save=tmp_path / "run")
    rest = handed(3, 4, make, load=tmp_path / "run")
    assert {step for step, _ in first} == {0, 1}
    assert first | rest == want
    assert not first.keys() & rest.keys()


# ---------------------------------------------------------------- refusals

REFUSED = {
    "unknown": ({"partition": "rows"}, "partition='rows' is not known", "did you mean 'row'?"),
    "no key": ({"partition": "key"}, 'partition="key" without key=', "one value for every sample"),
    "a key for rows": ({"key": HOSPITALS}, "key= with partition='row'", 'partition="key"'),
    "too few values": ({"partition": "key", "key": [1, 2]}, "key= has 2 values for 53 samples", "one value for every"),
    "no files": ({"partition": "file"}, "of a Numbers, which does not say where its files end", "shoal.data.FileShards"),
    "too few keys": ({"partition": "key", "key": [n % 3 for n in range(53)]}, "3 keys for leaves=4", "leaves=3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    how, what, remedy = REFUSED[name]
    with shoal.init("ddp", leaves=4, run_dir="none") as job, pytest.raises(BatchError) as e:
        job.loader(Numbers(53), global_batch=12, **how)  # type: ignore[arg-type]
    assert what in e.value.what
    assert remedy in e.value.remedy
