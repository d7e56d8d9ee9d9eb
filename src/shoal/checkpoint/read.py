"""Reading checkpoints: find, check, and take any cut out of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from shoal.checkpoint.manifest import MANIFEST, Entry, File, Manifest, is_cut, parse
from shoal.checkpoint.tensors import CODES, RESTORE, TensorFile, raw_bytes
from shoal.checkpoint.together import Report, Share, together
from shoal.errors import CheckpointError, DamagedError, ResumeError
from shoal.layout import Interval, moves

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")


def latest(root: Path) -> Path:
    """`root` itself if it is a checkpoint or called `step-<N>`, or the one in it with the highest N.

    A damaged one, and a copy that lacks its manifest, is not passed over: the run would silently fall back behind it.

    Raises:
        CheckpointError: there is none, or the directory cannot be read.
    """
    root = Path(root)
    try:
        if _STEP.fullmatch(root.name) or (root / MANIFEST).exists():
            return root
        for number in steps_in(root):
            if _begun(root / f"step-{number}"):
                return root / f"step-{number}"
        seen = sorted(p.name for p in root.iterdir())
    except OSError as e:
        raise CheckpointError(f"there is no checkpoint at {root}: {e.strerror}") from e
    raise CheckpointError(
        f"there is no checkpoint in {root}: looked for {MANIFEST} and for step-<N>/{MANIFEST} in it",
        cause=f"it holds {some(seen) or 'nothing'}",
        remedy="the directory that was given to job.save()",
    )


def steps_in(root: Path) -> list[int]:
    """The numbers of all `step-<N>` in a directory, whatever they are, the highest first. Raises OSError."""
    return sorted((int(m[1]) for m in (_STEP.fullmatch(p.name) for p in root.iterdir()) if m), reverse=True)


def _begun(path: Path) -> bool:
    """Does it hold anything of a checkpoint?"""
    return path.is_dir() and ((path / MANIFEST).exists() or any(path.glob("rank-*.safetensors")))


def newest_whole(root: Path) -> Path | None:
    """The checkpoint with the highest N in `root` of which every byte is as it was written. Reads all of it."""
    try:
        for number in steps_in(root):
            try:
                return verify(root / f"step-{number}").path
            except CheckpointError:
                continue
    except OSError:
        pass
    return None


def inspect(path: Path) -> Manifest:
    """What the checkpoint at `path` holds, after all checks that need not read the tensors.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        DamagedError: the manifest, a file's size or a file's header is not what was written.
        ResumeError: it was not written by this version of shoal's format.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"there is no checkpoint at {path}: it is no directory")
    manifest = parse(_read(path / MANIFEST), path)
    held: dict[str, list[Entry]] = {}
    for e in manifest.entries:
        held.setdefault(e.file, []).append(e)
    for file in manifest.files:
        _check_file(path / file.name, file, held.get(file.name, []))
    return manifest


def verify(path: Path) -> Manifest:
    """The same after reading every byte of it.

    Raises:
        CheckpointError, DamagedError, ResumeError: as `inspect`; a flipped tensor is named.
    """
    manifest = inspect(path)
    check_digests(manifest, manifest.entries)
    return manifest


def check_digests(manifest: Manifest, entries: Sequence[Entry]) -> None:
    """Read these tensors and compare them with their digests.

    Raises:
        DamagedError: one is flipped, with its name and file.
    """
    for name, group in groupby(sorted(entries, key=_place), key=lambda e: e.file):
        file = TensorFile(manifest.path / name)
        for entry in group:
            if hashlib.sha256(raw_bytes(file.whole(entry.key))).hexdigest() != entry.sha256:
                raise DamagedError(f"{file.path} is flipped: {entry} does not fit its digest", remedy=RESTORE)


def some(names: Sequence[str], most: int = 5) -> str:
    """`a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _place(entry: Entry) -> tuple[str, str]:
    return entry.file, entry.key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as e:
        raise DamagedError(f"{path} is missing", cause="an unfinished copy", remedy=RESTORE) from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e


def _check_file(path: Path, file: File, entries: Sequence[Entry]) -> None:
    held = f"it holds {some([str(e) for e in entries])}"
    try:
        size = path.stat().st_size
        with path.open("rb") as raw:  # what is not a tensor is the header; its own word on its length may be flipped
            header = raw.read(max(0, file.bytes - sum(e.bytes for e in entries)))
    except FileNotFoundError as e:
        raise DamagedError(f"{path} is missing", cause=held, remedy=RESTORE) from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    if size != file.bytes:
        what = "truncated" if size < file.bytes else "longer than what was written"
        raise DamagedError(f"{path} is {what}: {size} of {file.bytes} bytes", cause=held, remedy=RESTORE)
    if hashlib.sha256(header).hexdigest() != file.header:
        raise DamagedError(f"{path} is flipped: its header does not fit its digest", cause=held, remedy=RESTORE)
    tensors = TensorFile(path)
    for e in entries:
        shape, code = tensors.about(e.key)
        if (shape, code) != (e.stored_shape, CODES[e.dtype]):
            raise DamagedError(f"{path}: {e} is {code} of shape {shape}, not {e.dtype} of shape {e.stored_shape}")


class Reader:
    """A checkpoint to take tensors from, cut in any way.

    Args:
        path: the directory `step-<N>`.

    Raises:
        CheckpointError, DamagedError, ResumeError: as `inspect`. On a job of several ranks use `together`.
    """

    def __init__(self, path: Path) -> None:
        self.manifest = inspect(path)
        self._last: TensorFile | None = None
        self._entries: dict[str, dict[str, list[Entry]]] = {}
        for e in self.manifest.entries:
            self._entries.setdefault(e.kind, {}).setdefault(e.name, []).append(e)

    @classmethod
    def together(cls, path: Path, *, rank: int, share: Share) -> Reader:
        """Open one checkpoint on every rank and read all of it once, each rank a part, to see that it is whole.

        Args:
            path: a checkpoint, or a directory of them: the latest.
            rank: this rank.
            share: the all-gather over all ranks.

        Raises:
            CheckpointError, DamagedError, ResumeError: as `verify`, on every rank, with the newest whole checkpoint
                beside it; or ranks see different checkpoints.
        """
        try:
            return cls._together(path, rank=rank, share=share)
        except CheckpointError as e:
            root = path.parent if _STEP.fullmatch(path.name) else path
            told = share(str(newest_whole(root) or "").encode() if rank == 0 else b"")[0].decode()
            if not told:
                raise
            remedy = f"job.load({told!r}), the newest whole one" + (f"; or {e.remedy}" if e.remedy else "")
            raise type(e)(e.what, cause=e.cause, remedy=remedy) from e.__cause__

    @classmethod
    def _together(cls, path: Path, *, rank: int, share: Share) -> Reader:
        made: list[Reader] = []

        def find() -> str:
            made.append(cls(latest(path)))
            return made[0].manifest.digest

        found = together(find, share, _error)
        for other, digest in enumerate(found):
            if digest != found[0]:
                raise CheckpointError(f"{path} is one checkpoint on rank 0 and another on rank {other}")
        made[0].digests(rank=rank, share=share)
        return made[0]

    def digests(self, *, rank: int, share: Share) -> None:
        """Check all digests, each rank about as many bytes. Collective.

        Raises:
            DamagedError: on every rank, if any tensor is flipped.
        """
        world = len(share(b""))
        total = sum(e.bytes for e in self.manifest.entries) + 1
        mine: list[Entry] = []
        done = 0
        for e in sorted(self.manifest.entries, key=_place):
            if done * world // total == rank:
                mine.append(e)
            done += e.bytes
        together(lambda: check_digests(self.manifest, mine), share, _error)

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Everything of one kind: name -> shape of the whole."""
        return {name: entries[0].shape for name, entries in self._entries.get(kind, {}).items()}

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """The dtype in which something is stored.

        Raises:
            ResumeError: it is not there.
        """
        return getattr(torch, self._find(kind, name)[0].dtype)

    def state_kinds(self, name: str) -> list[str]:
        """The kinds of optimizer state that are cut like the parameter: "state:exp_avg" and so on."""
        return sorted(k for k, names in self._entries.items() if k.startswith("state:") and name in names)

    def extra_kinds(self, name: str) -> list[str]:
        """The kinds of optimizer state of other shapes: "extra:step" and so on."""
        return sorted(k for k, names in self._entries.items() if k.startswith("extra:") and name in names)

    def compare(self, wanted: Mapping[str, Sequence[int]], kind: str = "param") -> None:
        """Is what the job has what the checkpoint has?

        Args:
            wanted: name -> shape of everything of this kind in the job.
            kind: "param", "buffer" or another.

        Raises:
            ResumeError: the names that are missing or unexpected, and the shapes that differ.
        """
        self._refuse(kind, wanted, [name for name in self.shapes(kind) if name not in wanted])

    def read_into(self, kind: str, wants: Sequence[tuple[Interval, Tensor]]) -> None:
        """Fill tensors with elements of parameters or of their state, in any cut. Only what is wanted is read.

        Args:
            kind: "param" or "state:<key>".
            wants: what (owner and position do not matter) and the one-dimensional tensor to fill.

        Raises:
            ResumeError: something is not in the checkpoint, or has another shape or dtype there; nothing is filled.
            DamagedError: a file cannot be read.
        """
        assert is_cut(kind), f"{kind} is stored whole"
        self._refuse(kind, {i.name: i.shape for i, _ in wants}, [])
        for interval, tensor in wants:
            assert tensor.shape == (interval.numel,), f"{interval} does not fit a tensor of shape {tuple(tensor.shape)}"
            stored = self.dtype(kind, interval.name)
            if stored != tensor.dtype:
                raise ResumeError(
                    f"{interval.name} ({kind}) is {stored} in {self.manifest.path} and {tensor.dtype} in this job",
                    remedy="the precision it was saved with",
                )
        old = [e for name in {i.name for i, _ in wants} for e in self._entries[kind][name]]
        new = [replace(interval, owner=n, at=0) for n, (interval, _) in enumerate(wants)]
        plan = sorted(moves([e.interval(n) for n, e in enumerate(old)], new), key=lambda m: (_place(old[m.src]), m))
        for name, group in groupby(plan, key=lambda m: old[m.src].file):
            file = self._file(name)
            with torch.no_grad():
                for m in group:
                    part = file.part(old[m.src].key, m.src_at, m.src_at + m.numel)
                    wants[m.dst][1][m.dst_at : m.dst_at + m.numel].copy_(part)

    def extra(self, kind: str, name: str) -> Tensor | None:
        """Optimizer state of a shape of its own, whole; None if there is none."""
        return self._whole(kind, name) if name in self._entries.get(kind, {}) else None

    def buffer(self, name: str) -> Tensor:
        """A buffer, whole.

        Raises:
            ResumeError: it is not there.
        """
        return self._whole("buffer", name)

    def _whole(self, kind: str, name: str) -> Tensor:
        entry = self._find(kind, name)[0]
        return self._file(entry.file).whole(entry.key).clone()  # not the mapped file, which may change

    def _file(self, name: str) -> TensorFile:
        """The last one is kept open: calls for many small tensors mostly ask for the same."""
        if self._last is None or self._last.path.name != name:
            self._last = TensorFile(self.manifest.path / name)
        return self._last

    def _find(self, kind: str, name: str) -> list[Entry]:
        found = self._entries.get(kind, {}).get(name, [])
        self._refuse(kind, {name: found[0].shape if found else ()}, [])
        return found

    def _refuse(self, kind: str, wanted: Mapping[str, Sequence[int]], unexpected: Sequence[str]) -> None:
        there, aliases = self._entries.get(kind, {}), self.manifest.meta.aliases
        missing = [n + (f" (there tied to {aliases[n]})" if n in aliases else "") for n in wanted if n not in there]
        other = [
            f"{name} ({there[name][0].shape} there, {tuple(shape)} here)"
            for name, shape in wanted.items()
            if name in there and there[name][0].shape != tuple(shape)
        ]
        lists = {"missing": missing, "unexpected": list(unexpected), "of another shape": other}
        if any(lists.values()):
            told = "; ".join(f"{word}: {some(names)}" for word, names in lists.items() if names)
            raise ResumeError(
                f"the {kind} tensors in {self.manifest.path} are not those of this job: {told}",
                cause="another model or optimizer wrote it",
                remedy="`shoal checkpoint inspect` shows what it holds",
            )


def _error(report: Report) -> CheckpointError:
    sorts = {c.code: c for c in (DamagedError, ResumeError)}
    return sorts.get(report.code, CheckpointError)(report.what, cause=report.cause, remedy=report.remedy)
