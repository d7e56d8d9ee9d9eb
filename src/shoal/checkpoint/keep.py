"""Old checkpoints go when enough newer ones are whole. What this program has not written is never touched."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from shoal.checkpoint.manifest import MANIFEST, Manifest
from shoal.checkpoint.read import check_digests, inspect, steps_in
from shoal.checkpoint.together import Share, together
from shoal.errors import CheckpointError, SaveError, SettingError
from shoal.logs import warn

_LEFT = re.compile(r"\.step-[0-9]+\.[0-9a-f]{8}\.old")


def check_keep(keep: object) -> None:
    """Raises `SettingError` for what is no number of checkpoints."""
    if type(keep) is not int or keep < 1:
        raise SettingError(f"keep={keep!r}: so many checkpoints are kept", remedy="a number of at least 1")


def keep_newest(newest: Path, keep: int | None, resumed: Path | None, *, rank: int, share: Share) -> None:
    """Delete checkpoints older than `newest` beside it, so that `keep` whole ones stay. Collective; rank 0 decides.

    Whole is one whose manifest, files, sizes and headers are as they were written. Damaged ones, those of other
    programs or formats, and links do not count and stay; one that holds anything else stays too. What cannot be deleted
    stays, with a warning.

    Args:
        newest: what was just saved.
        keep: at least 1, `newest` included; None: all.
        resumed: the checkpoint that this job goes on from. It goes only when every byte of those that stay was read.
        rank: this rank.
        share: the all-gather over all ranks.

    Raises:
        SaveError: on every rank: the newest is not whole. Nothing has been deleted.
    """

    def work() -> None:
        if rank == 0 and keep is not None:
            there = inspect(newest)
            try:
                _delete(there, keep, resumed)
            except OSError as e:
                warn(f"older checkpoints are to go, and {newest.parent} cannot be read: {e}")

    together(work, share, lambda report: SaveError(
        f"{newest} is not whole, although it was written: {report.what}", cause=report.cause,
        remedy="older checkpoints are as they were; look at this disk",
    ))  # fmt: skip


def _delete(newest: Manifest, keep: int, resumed: Path | None) -> None:
    root = newest.path.parent
    older = [number for number in steps_in(root) if number < newest.step]
    whole = [m for m in (_whole(root / f"step-{number}") for number in older) if m is not None]
    stay = [newest, *whole[: keep - 1]]
    for manifest in whole[keep - 1 :]:
        source = resumed is not None and manifest.path.resolve() == resumed.resolve()
        if _only_ours(manifest) and not (source and any(_flipped(m) for m in stay)):
            _forget(manifest.path)
    for rest in root.iterdir():  # of a run that was killed while deleting
        if _LEFT.fullmatch(rest.name):
            shutil.rmtree(rest, ignore_errors=True)


def _only_ours(manifest: Manifest) -> bool:
    return {p.name for p in manifest.path.iterdir()} == {MANIFEST, *(f.name for f in manifest.files)}


def _flipped(manifest: Manifest) -> bool:
    try:
        check_digests(manifest, manifest.entries)
    except CheckpointError:
        return True
    return False


def _whole(path: Path) -> Manifest | None:
    try:
        return None if path.is_symlink() else inspect(path)
    except CheckpointError:
        return None


def _forget(path: Path) -> None:
    """Under its new name nobody takes it for a checkpoint, however little of it has been deleted."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    try:
        os.rename(path, aside)
        shutil.rmtree(aside)
    except OSError as e:
        warn(f"{path} is to go, and cannot be deleted: {e}")
