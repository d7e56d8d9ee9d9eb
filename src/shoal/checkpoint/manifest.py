"""The manifest: which elements of which parameter are where, with a digest of everything."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import NamedTuple, cast

import torch

from shoal.checkpoint.facts import Meta, dicts, take, whole_numbers
from shoal.checkpoint.tensors import CODES, RESTORE
from shoal.errors import DamagedError, ResumeError
from shoal.layout import Box, Interval

FORMAT = 1
MANIFEST = "manifest.json"

# Every format keeps this first line, over the bytes that follow, and the key `format`: a file can always be told to be
# whole before it is understood. `tail -n +2 manifest.json | sha256sum` checks it by hand.
_FIRST_LINE = re.compile(rb'\{"digest": "([0-9a-f]{64})",\n')
_FILE_NAME = re.compile(r"rank-[0-9]{5,}\.safetensors")
_KIND = re.compile(r"param|buffer|(state|extra):.+", re.DOTALL)


class Param(NamedTuple):
    """A parameter as one prints it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One safetensors file: its size in bytes and the digest of its header (the tensors have their own)."""

    name: str
    bytes: int
    header: str

    @classmethod
    def decode(cls, record: Mapping[str, object]) -> File:
        """From JSON, believing nothing.

        Raises:
            DamagedError: a field is missing, or it lies elsewhere.
        """
        name = take(record, "name", str)
        if not _FILE_NAME.fullmatch(name):
            raise DamagedError(f"it names the file {name!r}, and only rank-00000.safetensors and so on belong to it")
        return cls(name=name, bytes=take(record, "bytes", int), header=take(record, "header", str))


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One stored tensor: elements `start:stop` of the box at `offset` with `size` of what is called `name`.

    `kind` is "param", "state:<key>" (of the parameter's shape, cut like it), "buffer", or "extra:<key>" (state of a
    shape of its own). `key` is its name inside `file`, `sha256` the digest of its raw bytes.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    stop: int
    file: str
    key: str
    sha256: str

    def __str__(self) -> str:
        return self.name if self.kind == "param" else f"{self.name} ({self.kind})"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (self.stop - self.start,) if is_cut(self.kind) else self.shape

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * getattr(torch, self.dtype).itemsize

    def interval(self, owner: int) -> Interval:
        """The same as layouts see it, in a shard of its own."""
        return Interval(self.name, self.shape, Box(self.offset, self.size), self.start, self.stop, owner, 0)

    @classmethod
    def decode(cls, record: Mapping[str, object]) -> Entry:
        """From JSON, believing nothing.

        Raises:
            DamagedError: a field is missing, or says what cannot be.
        """
        entry = cls(
            kind=take(record, "kind", str),
            name=take(record, "name", str),
            shape=whole_numbers(record, "shape"),
            dtype=take(record, "dtype", str),
            offset=whole_numbers(record, "offset"),
            size=whole_numbers(record, "size"),
            start=take(record, "start", int),
            stop=take(record, "stop", int),
            file=take(record, "file", str),
            key=take(record, "key", str),
            sha256=take(record, "sha256", str),
        )
        fits = (
            entry.dtype in CODES
            and is_kind(entry.kind)
            and len(entry.offset) == len(entry.size) == len(entry.shape)
            and all(o + n <= whole for o, n, whole in zip(entry.offset, entry.size, entry.shape, strict=True))
            and 0 <= entry.start <= entry.stop <= prod(entry.size)
        )
        if not fits:
            raise DamagedError(f"the manifest describes {entry} as something that cannot be: {asdict(entry)}")
        return entry


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint holds. `digest` tells it from every other one."""

    path: Path
    digest: str
    format: int
    step: int
    meta: Meta
    files: tuple[File, ...]
    entries: tuple[Entry, ...]

    @property
    def strategy(self) -> Mapping[str, object]:
        return self.meta.strategy

    @property
    def leaves(self) -> int:
        return self.meta.leaves

    @property
    def world(self) -> int:
        return self.meta.world

    @property
    def versions(self) -> Mapping[str, str]:
        return self.meta.versions

    @property
    def params(self) -> tuple[Param, ...]:
        """Every parameter once, in the order of names."""
        aliases: dict[str, list[str]] = {}
        for alias, name in self.meta.aliases.items():
            aliases.setdefault(name, []).append(alias)
        found = {e.name: e for e in self.entries if e.kind == "param"}
        return tuple(Param(n, e.shape, e.dtype, tuple(aliases.get(n, ()))) for n, e in found.items())


def is_cut(kind: str) -> bool:
    """Is it stored as flat pieces of a parameter's shape, or whole?"""
    return kind == "param" or kind.startswith("state:")


def is_kind(kind: str) -> bool:
    return _KIND.fullmatch(kind) is not None


def render(step: int, meta: Mapping[str, object], files: Iterable[File], entries: Iterable[Entry]) -> bytes:
    """The text of a manifest: JSON, one file and one tensor a line. Same content, same bytes."""
    content: dict[str, object] = {"format": FORMAT, "step": step, **meta}
    content["files"] = [asdict(f) for f in sorted(files, key=lambda f: f.name)]
    content["entries"] = [asdict(e) for e in sorted(entries, key=_order)]
    lines = [f"{json.dumps(key)}: {_value(value)}" for key, value in content.items()]
    body = (",\n".join(lines) + "}\n").encode()
    return f'{{"digest": "{hashlib.sha256(body).hexdigest()}",\n'.encode() + body


def _value(value: object) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, allow_nan=False)
    return "[\n " + ",\n ".join(json.dumps(v, allow_nan=False) for v in cast("list[object]", value)) + "]"


def _order(entry: Entry) -> tuple[object, ...]:
    return entry.name, entry.kind, entry.offset, entry.start


def parse(raw: bytes, path: Path) -> Manifest:
    """A manifest from the bytes of its file in the directory `path`.

    Raises:
        DamagedError: it is not what was written, or names files outside its directory.
        ResumeError: another program or a newer shoal wrote it.
    """
    found = _FIRST_LINE.match(raw)
    if not found or hashlib.sha256(raw[found.end() :]).hexdigest().encode() != found[1]:
        raise _stranger(raw, path)
    content = _json(raw)
    if not isinstance(content, dict):
        raise DamagedError(f"{path / MANIFEST} is not JSON", remedy=RESTORE)
    record = cast("dict[str, object]", content)
    if record.get("format") != FORMAT:
        raise ResumeError(
            f"{path} has format {record.get('format')!r} and this shoal reads format {FORMAT}",
            cause=f"it was written with {record.get('versions')!r}",
            remedy="that version of shoal",
        )
    try:
        return _manifest(record, path, found[1].decode())
    except DamagedError as e:
        raise DamagedError(f"{path / MANIFEST}: {e.what}", cause="it was not written by shoal") from e


def _json(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _stranger(raw: bytes, path: Path) -> DamagedError | ResumeError:
    """Two of our words at least outlive one flipped bit; another program's manifest has neither."""
    content = _json(raw)
    if content is None:
        return DamagedError(f"{path / MANIFEST} is truncated or flipped: it is not JSON", remedy=RESTORE)
    if isinstance(content, dict) and ("digest" in content or "entries" in content):
        return DamagedError(f"{path / MANIFEST} is truncated or flipped: its digest does not fit", remedy=RESTORE)
    named = cast("dict[str, object]", content).get("format") if isinstance(content, dict) else None
    return ResumeError(
        f"{path} is not a checkpoint of shoal: its manifest has format {named!r} and no digest",
        remedy="the directory step-N that job.save() returned",
    )


def _manifest(record: Mapping[str, object], path: Path, digest: str) -> Manifest:
    files = tuple(File.decode(f) for f in dicts(record, "files"))
    names = {f.name for f in files}
    entries = tuple(Entry.decode(e) for e in dicts(record, "entries"))
    for entry in entries:
        if entry.file not in names:
            raise DamagedError(f"{entry} is said to be in {entry.file!r}, which is not among the files")
    try:
        check_complete(entries)
    except ValueError as e:
        raise DamagedError(str(e)) from e
    return Manifest(
        path=path, digest=digest, format=FORMAT, step=take(record, "step", int),
        meta=Meta.decode(record), files=files, entries=entries,
    )  # fmt: skip


def check_complete(entries: Iterable[Entry]) -> None:
    """Is every element of everything there, and only once?

    Raises:
        ValueError: no, and where.
    """
    for _, group in groupby(sorted(entries, key=_order), key=lambda e: (e.name, e.kind)):
        pieces = list(group)
        first = pieces[0]
        for e in pieces:
            if (e.shape, e.dtype) != (first.shape, first.dtype):
                both = f"{first.dtype} of shape {first.shape} in {first.file} and {e.dtype} of shape {e.shape}"
                raise ValueError(f"{e} is {both} in {e.file}")
        total = prod(first.shape)
        if total == 0 and len(pieces) > 1:
            raise ValueError(f"{first} is in {first.file} and again in {pieces[1].file}")
        _check_runs(pieces, total)


def _check_runs(pieces: list[Entry], total: int) -> None:
    runs = [
        (at, at + n, e.file)
        for e in pieces
        for at, _, n in Box(e.offset, e.size).runs(e.shape, e.start, e.stop)
    ]  # fmt: skip
    done, last = 0, ""
    for start, stop, file in [*sorted(runs), (total, total, "")]:
        if start > done:
            raise ValueError(f"elements {done}:{start} of {pieces[0]} are in no file")
        if start < done:
            raise ValueError(f"element {start} of {pieces[0]} is in {last} and again in {file}")
        done, last = stop, file
