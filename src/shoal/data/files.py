"""Data sets that need not fit into memory: a file of tokens that is mapped, and samples that lie in many files."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from shoal.errors import DataError

T = TypeVar("T")


class TokenFile(Dataset[Tensor]):
    """Windows of a flat file of token numbers, which is mapped: only what is read is in memory.

    Args:
        path: numbers one after the other, without a header.
        length: tokens of a sample, which is an int64 tensor of that shape.
        dtype: of the file's numbers, as numpy calls it.
        stride: from the beginning of a sample to that of the next; None: `length`. With `length - 1` every token but
            the first is once the target of a language model, where inputs are `x[:-1]` and targets `x[1:]`.

    Raises:
        DataError: there is no such file, or it has not even one sample of this length.
    """

    def __init__(self, path: str | Path, length: int, *, dtype: str = "uint16", stride: int | None = None) -> None:
        self.path, self.length, self.stride = Path(path), length, length if stride is None else stride
        self.dtype = np.dtype(dtype)
        if length < 1 or self.stride < 1:
            raise DataError(f"TokenFile: length={length}, stride={stride}", remedy="both 1 or more")
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}", remedy="a file that every rank sees") from error
        self.tokens, rest = divmod(size, self.dtype.itemsize)
        if rest:
            raise DataError(
                f"{path} has {size} bytes, no multiple of the {self.dtype.itemsize} of {self.dtype}",
                cause="another dtype, or a file that is not written to its end",
            )
        if self.tokens < length:
            raise DataError(
                f"{path} has {self.tokens} tokens of {self.dtype}, and a sample {length}", remedy="a smaller length"
            )
        self._map: NDArray[np.integer] | None = None

    def __len__(self) -> int:
        return (self.tokens - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> Tensor:
        start = range(len(self))[index] * self.stride  # IndexError, and numbers from the end
        if self._map is None:  # late: every loader worker has a map of its own
            self._map = np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))
        return torch.from_numpy(self._map[start : start + self.length].astype(np.int64))

    def __getstate__(self) -> object:
        return {**self.__dict__, "_map": None}


class FileShards(Dataset[T]):
    """Samples of many files as one set, of which few files are in memory at a time.

    `job.loader(..., partition="file")` goes through one file after the other, so that each is read once an epoch; by
    rows a shuffled epoch reads files again and again.

    Args:
        files: every one with at least one sample, or none.
        read: gives the samples of a file as something with `len` and numbers, such as `numpy.load` or `torch.load`.
        counts: how many samples each file has; None: every file is read here, once.
        keep: so many files stay in memory, in every process that reads.

    Raises:
        DataError: here: no files, or counts of others. When a sample is read: a file that has another count.
    """

    def __init__(
        self, files: Sequence[str | Path], read: Callable[[Path], Sequence[T]], *,
        counts: Sequence[int] | None = None, keep: int = 1,
    ) -> None:  # fmt: skip
        self.files, self.read, self.keep = [Path(f) for f in files], read, keep
        if not self.files or keep < 1:
            raise DataError(f"FileShards: {len(self.files)} files, keep={keep}", remedy="one or more of both")
        if counts is not None and len(counts) != len(self.files):
            raise DataError(f"FileShards: {len(counts)} counts for {len(self.files)} files")
        self.counts = list(counts) if counts is not None else [len(self._read(f)) for f in self.files]
        self.cumulative_sizes = list(accumulate(self.counts))
        """Up to and with each file, how many samples there are: as torch's ConcatDataset calls it."""
        self._held: OrderedDict[int, Sequence[T]] = OrderedDict()

    def __len__(self) -> int:
        return self.cumulative_sizes[-1]

    def __getitem__(self, index: int) -> T:
        index = range(len(self))[index]
        file = bisect_right(self.cumulative_sizes, index)
        return self._samples(file)[index - (self.cumulative_sizes[file] - self.counts[file])]

    def _samples(self, file: int) -> Sequence[T]:
        if file not in self._held:
            while len(self._held) >= self.keep:  # before, not after: at no time one more
                self._held.popitem(last=False)
            found = self._read(self.files[file])
            if len(found) != self.counts[file]:
                raise DataError(
                    f"{self.files[file]} has {len(found)} samples, and its count says {self.counts[file]}",
                    remedy="counts=None counts them once more",
                )
            self._held[file] = found
        self._held.move_to_end(file)
        return self._held[file]

    def _read(self, file: Path) -> Sequence[T]:
        try:
            return self.read(file)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}", remedy="files that every rank sees") from error

    def __getstate__(self) -> object:
        return {**self.__dict__, "_held": OrderedDict[int, Sequence[T]]()}
