"""A checkpoint's model for other programs, in its own names: as Hugging Face lays it out, or as torch writes it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from shoal.checkpoint.manifest import Entry, Manifest
from shoal.checkpoint.read import Reader, check_digests, latest
from shoal.checkpoint.tensors import CODES, header_of, raw_bytes
from shoal.errors import SaveError, SettingError, nearest
from shoal.layout import Box, Interval

DTYPES = ("float32", "bfloat16", "float16")
CHUNK = 1 << 24
"""Elements that are in memory at once, of parameters. Buffers are read whole."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
FORMATS = ("safetensors", "pt", "distributed")
PT, METADATA = "model.pt", ".metadata"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What `export` has written.

    Args:
        files: what was written, in order.
        index: which tensor is in which of them; None for a single file.
        tensors: how many.
        bytes: of all tensors.
        aliases: further names of tied parameters -> the name under which each is stored.
    """

    files: tuple[Path, ...]
    index: Path | None
    tensors: int
    bytes: int
    aliases: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One tensor to write: `name` in the file, `entry` one of its pieces in the checkpoint."""

    name: str
    entry: Entry
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.entry.shape) * self.dtype.itemsize


def export(
    path: str | Path, out: str | Path, *, model: str = "", dtype: str | None = None,
    max_shard_size: int | str | None = None, format: str = "safetensors",
) -> Exported:  # fmt: skip
    """Write a checkpoint's parameters and buffers as `model.safetensors`, or as shards and an index, or for torch.

    Names are those of the model's own state dict. A tied parameter is stored once, under its first name, as
    transformers expects; its other names are in the file's metadata, where `safetensors.torch.load_model` looks.
    No more than one buffer, one stored piece, one parameter in channels_last or `CHUNK` elements are in memory at once.

    torch's own formats hold every tensor under all of its names, and the whole model is in memory while it is written.

    Args:
        path: a checkpoint, or a directory of them: the latest.
        out: a directory; created if missing. What else lies there, such as config.json, stays.
        model: the name that a model has in a job of several.
        dtype: "float32", "bfloat16" or "float16" for all floating tensors; None: as stored.
        max_shard_size: of a file's tensors, in bytes or as "5GB" (10**9 each) or "5GiB". A larger tensor has a file of
            its own. None: 5GB.
        format: "safetensors"; "pt": a state dict in `model.pt`, which `torch.load(weights_only=True)` reads;
            "distributed": `out` is a checkpoint of `torch.distributed.checkpoint`, as FSDP's programs read it.

    Raises:
        SettingError: there is no such model, dtype, size or format.
        CheckpointError, DamagedError, ResumeError: the checkpoint cannot be used.
        SaveError: it could not be written, or `out` holds a model. Nothing new is left.
    """
    if format not in FORMATS:
        raise SettingError(f"format={format!r} is not known", remedy=nearest(format, FORMATS))
    if format != "safetensors" and max_shard_size is not None:
        raise SettingError(f"max_shard_size= with format={format!r}, which is never cut", remedy="leave it out")
    reader, out = Reader(latest(Path(path))), Path(out)
    items = _items(reader.manifest, _prefix(reader.manifest, model), _dtype(dtype))
    most = _size("5GB" if max_shard_size is None else max_shard_size)
    chosen = {(item.entry.kind, item.entry.name) for item in items}
    check_digests(reader.manifest, [e for e in reader.manifest.entries if (e.kind, e.name) in chosen])
    aliases = _aliases(reader.manifest, _prefix(reader.manifest, model), {item.name for item in items})
    try:
        with _Beside(out) as beside:
            if format == "safetensors":
                _write_safetensors(beside, reader, _shards(items, most), aliases)
            else:
                _write_torchs(beside, _state(reader, items, aliases), distributed=format == "distributed")
    except OSError as e:
        raise SaveError(f"{out} was not written: {e}", remedy="put this right and export again") from e
    return Exported(
        files=tuple(out / name for name in beside.names if name != _INDEX),
        index=out / _INDEX if _INDEX in beside.names else None,
        tensors=len(items), bytes=sum(item.bytes for item in items), aliases=aliases,
    )  # fmt: skip


def _write_safetensors(
    beside: _Beside, reader: Reader, shards: Sequence[Sequence[Item]], aliases: Mapping[str, str]
) -> None:  # fmt: skip
    names = [_SINGLE] if len(shards) == 1 else [
        f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        with beside.open(name) as file:
            for raw in _content(reader, shard, aliases):
                file.write(raw)
    if len(shards) > 1:
        where = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
        index = {"metadata": {"total_size": sum(i.bytes for shard in shards for i in shard)}, "weight_map": where}
        with beside.open(_INDEX) as file:
            file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def _write_torchs(beside: _Beside, state: Mapping[str, Tensor], *, distributed: bool) -> None:
    if distributed:
        from shoal.checkpoint.distributed import write

        with beside.folder() as folder:
            write(state, folder)
        return
    with beside.open(PT) as file:
        torch.save(state, file)


def _state(reader: Reader, items: Sequence[Item], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """A state dict in which tied parameters are one tensor under several names."""
    state: dict[str, Tensor] = {}
    for item in items:
        flat = torch.empty(prod(item.entry.shape), dtype=item.dtype)
        at = 0
        for part in _parts(reader, item):
            flat[at : at + part.numel()].copy_(part.reshape(-1))
            at += part.numel()
        state[item.name] = flat.view(item.entry.shape)
    return state | {alias: state[name] for alias, name in aliases.items()}


def _prefix(manifest: Manifest, model: str) -> str:
    """What the names of this model's tensors begin with."""
    prefixes = list(cast("Mapping[str, object]", manifest.meta.extra.get("steps", {"": 0})))
    known = [prefix.removesuffix("/") for prefix in prefixes]
    if model in known:
        return prefixes[known.index(model)]
    if not model:
        raise SettingError(f"{manifest.path} holds several models", remedy=f"--model {' or --model '.join(known)}")
    if known == [""]:
        raise SettingError(f"{manifest.path} holds one model, which has no name", remedy="leave --model out")
    raise SettingError(f"{manifest.path} holds no model {model!r}", remedy=nearest(model, known))


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise SettingError(f"dtype={name!r} is not known", remedy=nearest(name, DTYPES))
    return None if name is None else cast(torch.dtype, getattr(torch, name))


def _size(given: int | str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)?", str(given), re.IGNORECASE)
    size = (
        int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found and (found[2] or "").upper() in _UNITS else 0
    )
    if size < 1:
        raise SettingError(f"max_shard_size={given!r} is no size", remedy="5GB, 500MB, 2GiB or a number of bytes")
    return size


def _items(manifest: Manifest, prefix: str, dtype: torch.dtype | None) -> list[Item]:
    """Parameters and persistent buffers, in the order of their names, numbers as numbers."""
    transient = cast("Sequence[str]", manifest.meta.extra.get("transient", ()))
    first = {(e.kind, e.name): e for e in manifest.entries if e.kind in ("param", "buffer") and e.name not in transient}
    items: list[Item] = []
    for (_, name), entry in first.items():
        stored = cast(torch.dtype, getattr(torch, entry.dtype))
        if name.startswith(prefix):
            wanted = dtype if dtype is not None and stored.is_floating_point else stored
            items.append(Item(name=name.removeprefix(prefix), entry=entry, dtype=wanted))
    return sorted(items, key=lambda item: [int(t) if t.isdigit() else t for t in re.split(r"([0-9]+)", item.name)])


def _aliases(manifest: Manifest, prefix: str, stored: set[str]) -> dict[str, str]:
    found = manifest.meta.aliases.items()
    named = {alias.removeprefix(prefix): name.removeprefix(prefix) for alias, name in found if name.startswith(prefix)}
    return {alias: name for alias, name in named.items() if name in stored}


def _shards(items: Sequence[Item], most: int) -> list[list[Item]]:
    """Files, filled one after the other; at least one."""
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.bytes
    return shards


def _content(reader: Reader, shard: Sequence[Item], aliases: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file, in parts."""
    shard = sorted(shard, key=lambda item: -item.dtype.itemsize)  # each lies at a multiple of its width
    ends = list(accumulate((item.bytes for item in shard), initial=0))
    here = {item.name for item in shard}
    metadata = {"format": "pt", **{alias: name for alias, name in aliases.items() if name in here}}
    fields: dict[str, object] = {"__metadata__": metadata}
    for item, start, end in zip(shard, ends, ends[1:], strict=False):
        code = CODES[str(item.dtype).removeprefix("torch.")]
        fields[item.name] = {"dtype": code, "shape": list(item.entry.shape), "data_offsets": [start, end]}
    yield header_of(fields)
    for item in shard:
        for part in _parts(reader, item):
            yield raw_bytes(part.to(item.dtype))


def _parts(reader: Reader, item: Item) -> Iterator[Tensor]:
    """Its elements in row-major order."""
    entry = item.entry
    if entry.kind == "buffer":
        yield reader.buffer(entry.name)
        return
    numel = prod(entry.shape)
    order = cast("Mapping[str, list[int]]", reader.manifest.meta.extra.get("orders", {})).get(entry.name)
    if order is not None:  # it lies with its dimensions in another order: one piece, to turn it
        flat = torch.empty(numel, dtype=reader.dtype("param", entry.name))
        reader.read_into("param", [(Interval(entry.name, entry.shape, Box.whole(entry.shape), 0, numel, 0, 0), flat)])
        back = sorted(range(len(order)), key=lambda d: order[d])
        yield flat.view([entry.shape[d] for d in order]).permute(back).contiguous()
        return
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        part = torch.empty(stop - start, dtype=reader.dtype("param", entry.name))
        reader.read_into(
            "param", [(Interval(entry.name, entry.shape, Box.whole(entry.shape), start, stop, 0, 0), part)]
        )
        yield part


class _Beside:
    """New files of a directory, under names that nobody looks for until all of them are whole."""

    def __init__(self, out: Path) -> None:
        self.out, self.mark = out, f".{secrets.token_hex(4)}.tmp"
        self.names: list[str] = []

    @contextmanager
    def open(self, name: str) -> Generator[BinaryIO]:
        self.names.append(name)
        with open(self.out / f".{name}{self.mark}", "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def folder(self) -> Generator[Path]:
        """A directory to fill, whose files then are as if each had been opened here; `.metadata` is the last one."""
        folder = self.out / self.mark
        folder.mkdir()
        try:
            yield folder
            for file in sorted(folder.iterdir(), key=lambda path: path.name == METADATA):
                self.names.append(file.name)
                os.rename(file, self.out / f".{file.name}{self.mark}")
        finally:
            shutil.rmtree(folder)

    def __enter__(self) -> _Beside:
        found = [*self.out.glob("model*.safetensors*"), *self.out.glob("*.distcp"), self.out / PT, self.out / METADATA]
        there = sorted(p.name for p in found if p.exists())
        if there:
            raise SaveError(f"{self.out} holds a model: {there[0]}", remedy="another directory, or remove it yourself")
        self.out.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        renamed: list[str] = []
        try:
            for name in self.names if error is None else ():  # the index is the last one
                os.rename(self.out / f".{name}{self.mark}", self.out / name)
                renamed.append(name)
        except OSError:
            for name in renamed:
                (self.out / name).unlink()
            raise
        finally:
            for name in self.names:
                (self.out / f".{name}{self.mark}").unlink(missing_ok=True)
