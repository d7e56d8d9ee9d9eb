"""Sets larger than memory: a mapped file of tokens, samples in many files."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.data import FileShards, TokenFile
from shoal.errors import DataError

# ---------------------------------------------------------------- tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    np.arange(23, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    return tmp_path / "tokens.bin"


def test_windows(tokens: Path) -> None:
    plain = TokenFile(tokens, 5)
    assert [w.tolist() for w in plain] == [[*range(n, n + 5)] for n in (0, 5, 10, 15)]
    assert (plain[-1].dtype, plain[-1][0]) == (torch.int64, 15)
    overlapping = TokenFile(tokens, 5, stride=4)
    targets = [t for w in overlapping for t in w[1:].tolist()]
    assert targets == list(range(1, 21)), "each is a target once"
    assert len(TokenFile(tokens, 23)) == 1
    with pytest.raises(IndexError):
        plain[4]


def test_a_loader_worker_maps_it_itself(tokens: Path) -> None:
    there = TokenFile(tokens, 5)
    assert there[1].tolist() == [5, 6, 7, 8, 9]
    sent = pickle.dumps(there)
    assert len(sent) < 1000
    assert pickle.loads(sent)[1].equal(there[1])


def test_other_numbers(tmp_path: Path) -> None:
    np.arange(4, dtype=">i4").tofile(tmp_path / "t")
    assert TokenFile(tmp_path / "t", 2, dtype=">i4")[1].tolist() == [2, 3]


# ---------------------------------------------------------------- files


def written(path: Path, sizes: list[int]) -> list[Path]:
    at = 0
    for number, size in enumerate(sizes):
        np.save(path / f"{number}.npy", np.arange(at, at + size))
        at += size
    return [path / f"{n}.npy" for n in range(len(sizes))]


@pytest.mark.parametrize("counts", [None, [3, 0, 4, 1]])
def test_samples_of_files(tmp_path: Path, counts: list[int] | None) -> None:
    read: list[str] = []

    def load(path: Path) -> np.ndarray:
        read.append(path.stem)
        return np.load(path)

    there = FileShards(written(tmp_path, [3, 0, 4, 1]), load, counts=counts, keep=2)
    assert (len(there), there.cumulative_sizes) == (8, [3, 3, 7, 8])
    assert read == ([] if counts else ["0", "1", "2", "3"])
    read.clear()
    assert [int(there[n]) for n in range(8)] == list(range(8))
    assert read == ["0", "2", "3"]
    assert [int(there[n]) for n in (-1, 3, 0)] == [7, 3, 0]
    assert read == ["0", "2", "3", "0"], "two are kept, the latest used"
    assert not pickle.loads(pickle.dumps(FileShards(there.files, np.load)))._held


def test_two_are_never_there_if_one_is_kept(tmp_path: Path) -> None:
    held = [0, 0]

    class Counted(list[int]):
        def __init__(self, path: Path) -> None:
            super().__init__(np.load(path).tolist())
            held[0] += 1
            held[1] = max(held)

        def __del__(self) -> None:
            held[0] -= 1

    there = FileShards(written(tmp_path, [2, 2, 2]), Counted)
    assert [there[n] for n in (0, 2, 4, 1, 5)] == [0, 2, 4, 1, 5]
    assert held[1] == 1


# ---------------------------------------------------------------- larger than memory

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from torch import nn
import shoal
from shoal.comm.threads import run
from shoal.data import FileShards, TokenFile

kind, path = sys.argv[1], Path(sys.argv[2])
MIB = 2**20
if kind == "mapped":
    with open(path / "tokens", "wb") as file:
        file.truncate(512 * MIB)                  # zeros that take no room on the disk
    dataset = TokenFile(path / "tokens", 8 * MIB)
else:
    files = []
    for n in range(16):
        files.append(path / f"{n}.npy")
        with open(files[-1], "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (4, 2 * MIB)})
            file.truncate(file.tell() + 32 * MIB)
    dataset = FileShards(files, np.load, counts=[4] * 16)

def read(job):
    loader = job.loader(dataset, global_batch=2, partition="row" if kind == "mapped" else "file")
    total = sum(int(batch.shape[1]) for batch in loader)
    assert total == len(loader) * dataset[0].shape[0]
    return loader.report().used

with open("/proc/self/status") as status:
    now = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + 256 * MIB, now + 256 * MIB))
try:
    np.ones(512 * MIB, dtype=np.uint8)
    sys.exit("there is no limit")
except MemoryError:
    pass
with shoal.init("ddp", leaves=2, run_dir="none", device="cpu") as job:
    print(read(job), "of", len(dataset))
"""


@pytest.mark.parametrize(("kind", "said"), [("mapped", "32 of 32"), ("files", "64 of 64")])
def test_larger_than_memory(kind: str, said: str, tmp_path: Path) -> None:
    """512 MiB of data in a process that may have 256 more than it begins with."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


# ---------------------------------------------------------------- mistakes


def refuse(path: Path) -> dict[str, tuple[Callable[[], object], str]]:
    (path / "odd").write_bytes(b"123")
    (file,) = written(path, [2])
    return {
        "nothing there": (lambda: TokenFile(path / "no", 2), "no cannot be read: No such file"),
        "half a number": (lambda: TokenFile(path / "odd", 1), "has 3 bytes, no multiple of the 2 of uint16"),
        "too short": (lambda: TokenFile(path / "odd", 4, dtype="uint8"), "has 3 tokens of uint8, and a sample 4"),
        "no length": (lambda: TokenFile(path / "odd", 0), "length=0, stride=None"),
        "no stride": (lambda: TokenFile(path / "odd", 1, stride=0), "length=1, stride=0"),
        "no files": (lambda: FileShards([], np.load), "FileShards: 0 files, keep=1"),
        "none kept": (lambda: FileShards([file], np.load, keep=0), "1 files, keep=0"),
        "counts": (lambda: FileShards([file], np.load, counts=[1, 2]), "2 counts for 1 files"),
        "another count": (lambda: FileShards([file], np.load, counts=[5])[0], "has 2 samples, and its count says 5"),
        "no such file": (lambda: FileShards([path / "x"], np.load), "x cannot be read: "),
    }


def test_mistakes_are_named(tmp_path: Path) -> None:
    for name, (call, what) in refuse(tmp_path).items():
        with pytest.raises(DataError) as e:
            call()
        assert what in str(e.value), name
