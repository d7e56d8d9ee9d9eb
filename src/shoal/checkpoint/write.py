"""Writing a checkpoint: beside its place, flushed, renamed. What was there before is never touched."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from shoal.checkpoint.facts import Meta, take
from shoal.checkpoint.manifest import MANIFEST, Entry, File, check_complete, is_cut, is_kind, render
from shoal.checkpoint.tensors import CODES, dtype_name, write_file
from shoal.checkpoint.together import Report, Share, together
from shoal.errors import SaveError
from shoal.layout import Box, Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A tensor that this rank contributes.

    Args:
        kind: "param"; "state:<key>", optimizer state of the parameter's shape; "buffer"; or "extra:<key>", optimizer
            state of any other shape.
        interval: which elements of what. Its owner and position do not matter.
        tensor: for "param" and "state:" the elements as one dimension, for "buffer" and "extra:" the whole tensor.
    """

    kind: str
    interval: Interval
    tensor: Tensor

    @classmethod
    def whole(cls, kind: str, name: str, tensor: Tensor) -> Piece:
        """All of a tensor, in the form that its kind asks for."""
        shape = tuple(tensor.shape)
        interval = Interval(name, shape, Box.whole(shape), 0, tensor.numel(), 0, 0)
        return cls(kind=kind, interval=interval, tensor=tensor.reshape(-1) if is_cut(kind) else tensor)

    @property
    def key(self) -> str:
        """Its name in the file."""
        i = self.interval
        at = "" if i.box == Box.whole(i.shape) else f"@{'.'.join(map(str, i.box.offset))}"
        return f"{self.kind}/{i.name}" + at + ("" if i.complete else f"[{i.start}:{i.stop}]")


def save(root: Path, step: int, pieces: Iterable[Piece], meta: Meta, *, rank: int, share: Share) -> Path:
    """Write `root/step-<step>`. Collective: every rank calls it with its own pieces.

    Together the pieces are every element of every tensor, once: a value that several ranks hold comes from one of them.

    Args:
        root: the directory of the checkpoints, on a file system that all ranks see. Created if missing.
        step: the number of finished steps.
        pieces: what this rank contributes; nothing is fine.
        meta: the facts; rank 0's are stored.
        rank: this rank.
        share: the all-gather over all ranks.

    Returns:
        The directory of the new checkpoint.

    Raises:
        SaveError: on every rank, if any rank failed. Nothing new is left, and older checkpoints are as they were.
    """
    assert step >= 0, f"step {step}"
    target = Path(root) / f"step-{step}"
    # Its own name per attempt: a rank of a killed run that still writes cannot reach into this one. Rank 0's counts.
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    contents: list[Piece] = []
    facts: dict[str, object] = {}

    def attempt(work: Callable[[], object]) -> list[object]:
        return together(work, share, lambda report: _error(report, target))

    def prepare() -> object:
        contents.extend(_checked(pieces))
        if rank == 0:
            facts.update(meta.encode())
            _make_room(target, scratch)
        return {"step": step, "scratch": scratch.name}

    try:
        plans = [cast("dict[str, object]", plan) for plan in attempt(prepare)]
        _same_step(plans)
        place = target.with_name(take(plans[0], "scratch", str))
        written = attempt(lambda: _write_share(place, contents, rank))
        attempt(lambda: _finish(place, target, step, facts, written) if rank == 0 else None)
    except BaseException:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def _error(report: Report, target: Path) -> SaveError:
    return SaveError(
        f"{target} was not saved: rank {report.rank}: {report.what}",
        cause=report.cause,
        remedy=report.remedy or "put this right and save again; older checkpoints are as they were",
    )


def _checked(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces in the order of the file: wide elements first, so that each lies at a multiple of its width."""
    found: dict[str, Piece] = {}
    for piece in pieces:
        i, shape = piece.interval, tuple(piece.tensor.shape)
        if not is_kind(piece.kind):
            raise SaveError(f"{i.name} has kind {piece.kind!r}", remedy='"param", "buffer", "state:..." or "extra:..."')
        if shape != ((i.numel,) if is_cut(piece.kind) else i.shape) or not (is_cut(piece.kind) or i.complete):
            raise SaveError(f"{piece.key} is said to be elements {i.start}:{i.stop} of {i.shape} and has shape {shape}")
        if dtype_name(piece.tensor) not in CODES:
            raise SaveError(f"{piece.key} is {dtype_name(piece.tensor)}", cause="safetensors has no such dtype")
        if piece.key in found:
            raise SaveError(f"{piece.key} comes twice")
        found[piece.key] = piece
    return sorted(found.values(), key=lambda p: (-p.tensor.itemsize, p.key))


def _make_room(target: Path, scratch: Path) -> None:
    if os.path.lexists(target):
        raise SaveError(
            f"{target} is there already", remedy="another directory, or job.load of the old one, or remove it yourself"
        )
    new = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for directory in new:
        _flush_directory(directory.parent)
    for rest in target.parent.glob(f".{target.name}.*.tmp"):  # of a run that was killed while saving this step
        shutil.rmtree(rest, ignore_errors=True)
    scratch.mkdir()


def _same_step(plans: list[dict[str, object]]) -> None:
    for rank, plan in enumerate(plans):
        if plan["step"] != plans[0]["step"]:
            steps = f"step {plans[0]['step']} on rank 0 and step {plan['step']} on rank {rank}"
            raise SaveError(f"nothing was saved: it is {steps}", remedy="the same step on every rank")


def _write_share(place: Path, pieces: list[Piece], rank: int) -> object:
    """This rank's file, and what the manifest says about it."""
    if not place.is_dir():
        raise SaveError(
            f"{place} was made by rank 0 and is not seen here",
            cause="the ranks do not share this file system",
            remedy="a directory that all hosts mount",
        )
    if not pieces:
        return {"files": [], "entries": []}
    path = place / f"rank-{rank:05d}.safetensors"
    header, digests = write_file(path, {p.key: p.tensor for p in pieces})
    file = File(name=path.name, bytes=path.stat().st_size, header=header)
    entries = [_entry(p, path.name, digests[p.key]) for p in pieces]
    return {"files": [asdict(file)], "entries": [asdict(e) for e in entries]}


def _entry(piece: Piece, file: str, digest: str) -> Entry:
    i = piece.interval
    return Entry(
        kind=piece.kind, name=i.name, shape=i.shape, dtype=dtype_name(piece.tensor), offset=i.box.offset,
        size=i.box.size, start=i.start, stop=i.stop, file=file, key=piece.key, sha256=digest,
    )  # fmt: skip


def _finish(place: Path, target: Path, step: int, facts: Mapping[str, object], written: list[object]) -> None:
    """The manifest, then the new name: from that moment the checkpoint exists."""
    parts = [cast("dict[str, list[dict[str, object]]]", part) for part in written]
    files = [File.decode(f) for part in parts for f in part["files"]]
    entries = [Entry.decode(e) for part in parts for e in part["entries"]]
    try:
        check_complete(entries)
    except ValueError as e:
        raise SaveError(str(e), cause="what the ranks contribute is not every element once") from e
    with open(place / MANIFEST, "xb") as file:
        file.write(render(step, facts, files, entries))
        file.flush()
        os.fsync(file.fileno())
    _flush_directory(place)
    os.rename(place, target)
    try:
        _flush_directory(target.parent)
    except OSError:
        os.rename(target, place)
        raise


def _flush_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a network file system that has no such thing
            raise
    finally:
        os.close(handle)
