"""One safetensors file: written by hand, read by the library."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.errors import DamagedError

T = TypeVar("T")

RESTORE = "an older step, or this file from a copy"

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "bool": "BOOL", "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""The dtypes a checkpoint can hold, by torch's names, and safetensors' codes for them."""


class _Slice(Protocol):
    def __getitem__(self, index: slice) -> Tensor: ...
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _Opened(Protocol):
    """What of safetensors' untyped `safe_open` is used here."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Tensor: ...


class TensorFile:
    """A safetensors file to read from, mapped into memory as long as this object or a tensor of it lives.

    Raises:
        DamagedError: here and in every method: it is missing, is no safetensors file, or lacks what is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: _Opened = self._read(lambda: safe_open(path, framework="pt"))

    def keys(self) -> list[str]:
        """The names of its tensors."""
        return list(self._file.keys())

    def whole(self, key: str) -> Tensor:
        return self._read(lambda: self._file.get_tensor(key))

    def part(self, key: str, start: int, stop: int) -> Tensor:
        """Elements of a one-dimensional tensor; the others are not read."""
        return self._read(lambda: self._file.get_slice(key)[start:stop])

    def about(self, key: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors' code of the dtype."""
        found = self._read(lambda: self._file.get_slice(key))
        return tuple(found.get_shape()), found.get_dtype()

    def _read(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except FileNotFoundError as e:
            raise DamagedError(f"{self.path} is missing", remedy=RESTORE) from e
        except (OSError, SafetensorError) as e:
            raise DamagedError(f"{self.path} cannot be read: {e}", remedy=RESTORE) from e


def dtype_name(tensor: Tensor) -> str:
    """Without `torch.`: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """Write a new safetensors file and flush it to the disk.

    By hand, not by the library: a digest of each tensor on the way, no second copy of all of them, and the operating
    system's own errors.

    Args:
        path: the file, which must not exist.
        tensors: by name, in the order in which they lie, wide dtypes first.

    Returns:
        The digest of the header and those of the raw bytes of each tensor.

    Raises:
        OSError: it could not be written.
    """
    fields: dict[str, object] = {}
    at = 0
    for key, tensor in tensors.items():
        end = at + tensor.numel() * tensor.itemsize
        fields[key] = {"dtype": CODES[dtype_name(tensor)], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    header = header_of(fields)
    digests: dict[str, str] = {}
    with open(path, "xb") as file:
        file.write(header)
        for key, tensor in tensors.items():
            raw = raw_bytes(tensor)
            digests[key] = hashlib.sha256(raw).hexdigest()
            file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(header).hexdigest(), digests


def header_of(fields: Mapping[str, object]) -> bytes:
    """The beginning of a safetensors file: what each tensor is, and where it lies."""
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in row-major order; no copy of a contiguous one on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
