"""Saving: what is written can be read, and what fails leaves no trace but an error on every rank."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from shoal.checkpoint import Piece, Reader, inspect, latest, save, verify
from shoal.checkpoint import tensors as tensors_module
from shoal.checkpoint import write as write_module
from shoal.checkpoint.tensors import raw_bytes, write_file
from shoal.errors import SaveError
from shoal.layout import Box, Interval, Item, Layout
from tests.checkpoint.ranks import META, Job, alone, bits, make_job, on_ranks

WORLD = 3


def save_all(root: Path, job: Job, step: int = 6, world: int = WORLD) -> list[Any]:
    layout = job.layout(world)
    return on_ranks(world, lambda r, share: save(root, step, job.pieces(r, layout), META, rank=r, share=share))


def save_one(root: Path, *pieces: Piece, step: int = 1) -> Path:
    return save(root, step, pieces, META, rank=0, share=alone)


def part(name: str, shape: tuple[int, ...], start: int, stop: int, tensor: Tensor | None = None) -> Piece:
    interval = Interval(name, shape, Box.whole(shape), start, stop, 0, 0)
    return Piece(kind="param", interval=interval, tensor=torch.zeros(stop - start) if tensor is None else tensor)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# What is written


def test_the_directory_holds_one_file_a_rank_and_the_manifest(tmp_path: Path, job: Job) -> None:
    root = tmp_path / "new" / "run"
    assert save_all(root, job) == [root / "step-6"] * WORLD
    assert names(root) == ["step-6"]
    files = [f"rank-0000{r}.safetensors" for r in range(WORLD)]
    assert names(root / "step-6") == ["manifest.json", *files]


def test_a_rank_with_nothing_writes_no_file(tmp_path: Path) -> None:
    pieces = {1: [part("w", (4,), 0, 4)]}
    on_ranks(3, lambda r, share: save(tmp_path, 0, pieces.get(r, []), META, rank=r, share=share))
    assert names(tmp_path / "step-0") == ["manifest.json", "rank-00001.safetensors"]
    assert [f.name for f in verify(tmp_path / "step-0").files] == ["rank-00001.safetensors"]


def test_a_checkpoint_of_nothing_is_one(tmp_path: Path) -> None:
    assert verify(save_one(tmp_path)).entries == ()


@pytest.mark.parametrize("owners", [1, 2, 3, 7])
def test_files_are_the_librarys_own_bytes(tmp_path: Path, job: Job, owners: int) -> None:
    tensors = {p.key: p.tensor for p in write_module._checked(job.pieces(0, job.layout(owners)))}
    write_file(tmp_path / "ours", tensors)
    written = (tmp_path / "ours").read_bytes()
    assert safetensors.torch.load(written).keys() == tensors.keys()
    for key, tensor in safetensors.torch.load(written).items():
        assert bits(tensor) == bits(tensors[key])
    assert written[8:] == safetensors.torch.save({k: t.clone() for k, t in tensors.items()})[8:]


def test_raw_bytes_of_views_conjugates_and_parameters() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    assert raw_bytes(base.T) == base.T.contiguous().numpy().tobytes()
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    assert raw_bytes(z.conj()) == z.conj().resolve_conj().numpy().tobytes()
    assert raw_bytes(z.conj().imag) == (-z.imag).contiguous().numpy().tobytes()
    assert raw_bytes(torch._neg_view(base)) == (-base).numpy().tobytes()
    assert raw_bytes(torch.nn.Parameter(base)) == base.numpy().tobytes()


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    write_file(tmp_path / "a", {})
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", {})


def test_same_content_gives_the_same_bytes(tmp_path: Path, job: Job) -> None:
    for root in ("a", "b"):
        save_all(tmp_path / root, job)
    for name in names(tmp_path / "a" / "step-6"):
        assert (tmp_path / "a/step-6" / name).read_bytes() == (tmp_path / "b/step-6" / name).read_bytes()


def test_nothing_in_it_is_a_pickle(saved: Path) -> None:
    for file in saved.iterdir():
        raw = file.read_bytes()
        assert raw[:1] == b"{" or raw[8:9] == b"{"
        assert raw[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


def test_the_digest_line_can_be_checked_by_hand(saved: Path) -> None:
    first, rest = (saved / "manifest.json").read_bytes().split(b"\n", 1)
    assert first == f'{{"digest": "{hashlib.sha256(rest).hexdigest()}",'.encode()
    assert json.loads(first + rest)["format"] == 1


# The order of things


def test_everything_is_flushed_before_the_new_name_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b))[1])
    save_all(tmp_path / "run", job, world=1)
    scratch = done[3]
    assert scratch.startswith(".step-6.")
    assert scratch.endswith(".tmp")
    parents = [tmp_path.name]
    assert done == [*parents, "rank-00000.safetensors", "manifest.json", scratch, "rename", "run"]


def test_a_reader_never_sees_an_unfinished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    seen: list[list[str]] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(sorted(p.name for p in tmp_path.glob("step-*"))), fsync(fd))
    )
    save_all(tmp_path, job)
    assert seen[-1] == ["step-6"]
    assert all(there == [] for there in seen[:-1])


def test_a_file_system_that_cannot_flush_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    fsync = os.fsync

    def no_directories(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", no_directories)
    save_all(tmp_path, job)
    verify(tmp_path / "step-6")


def test_steps_are_counted_from_0(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="step -1"):
        save_one(tmp_path, step=-1)


# Never over an old one


@pytest.mark.parametrize("kind", ["checkpoint", "file", "empty directory", "dangling link"])
def test_an_existing_step_is_refused_before_anything_is_written(tmp_path: Path, job: Job, kind: str) -> None:
    target = tmp_path / "step-6"
    match kind:
        case "checkpoint":
            save_all(tmp_path, job)
        case "file":
            target.write_text("mine")
        case "empty directory":
            target.mkdir()
        case _:
            target.symlink_to(tmp_path / "nowhere")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for error in save_all(tmp_path, job):
        assert isinstance(error, SaveError)
        assert error.what == f"{target} was not saved: rank 0: {target} is there already"
        assert "another directory" in error.remedy
    assert names(tmp_path) == ["step-6"]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_one_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    rename = os.rename

    def late(a: Path, b: Path) -> None:
        if not b.exists():
            b.mkdir()
            (b / "manifest.json").write_text("theirs")
        rename(a, b)

    monkeypatch.setattr(os, "rename", late)
    assert all("Directory not empty" in str(e) for e in save_all(tmp_path, job))
    assert names(tmp_path) == ["step-6"]
    assert (tmp_path / "step-6/manifest.json").read_text() == "theirs"


# Failures of the machine


@pytest.fixture
def older(tmp_path: Path) -> Iterator[Path]:
    """A root with step 5 in it, which must be as it was at the end."""
    save_all(tmp_path, make_job(), step=5)
    before = {p: p.read_bytes() for p in (tmp_path / "step-5").iterdir()}
    yield tmp_path
    assert {p: p.read_bytes() for p in (tmp_path / "step-5").iterdir()} == before
    verify(tmp_path / "step-5")
    assert names(tmp_path) == ["step-5"]


def check_failed(errors: list[Any], rank: int, *told: str) -> None:
    assert len({str(e) for e in errors}) == 1
    for number, error in enumerate(errors):
        assert isinstance(error, SaveError)
        assert "step-6 was not saved" in error.what
        assert f": rank {rank}: " in error.what
        assert all(t in error.what for t in told)
        assert error.remedy
        assert (error.__cause__ is not None) == (number == rank)


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_full_disk_on_one_rank(older: Path, monkeypatch: pytest.MonkeyPatch, job: Job, rank: int) -> None:
    fsync = os.fsync

    def full(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(f"rank-0000{rank}.safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    check_failed(save_all(older, job), rank, "[Errno 28] No space left on device")
    monkeypatch.undo()
    save_all(older, job)
    verify(older / "step-6")
    shutil.rmtree(older / "step-6")


def test_a_file_that_may_not_grow(older: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        big = {1: [part("w", (1 << 19,), 0, 1 << 19)], 0: [part("b", (1,), 0, 1)]}
        errors = on_ranks(2, lambda r, share: save(older, 6, big[r], META, rank=r, share=share))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_failed(errors, 1, "[Errno 27] File too large")


@pytest.mark.parametrize("call", ["manifest.json", "scratch", "rename", "parent"])
def test_rank_0_fails_at_the_end(older: Path, monkeypatch: pytest.MonkeyPatch, job: Job, call: str) -> None:
    fsync, rename = os.fsync, os.rename
    fault = OSError(errno.EIO, os.strerror(errno.EIO))

    def bad_fsync(fd: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{fd}"))
        hit = {"manifest.json": place.name, "scratch": place.name[:8] == ".step-6." and "scratch"}.get(call)
        if hit == call or (call == "parent" and place == older):
            raise fault
        fsync(fd)

    def bad_rename(a: Path, b: Path) -> None:
        if call == "rename":
            raise fault
        rename(a, b)

    monkeypatch.setattr(os, "fsync", bad_fsync)
    monkeypatch.setattr(os, "rename", bad_rename)
    check_failed(save_all(older, job), 0, "[Errno 5] Input/output error")


def test_no_permission() -> None:
    """Root may write anywhere, so it becomes nobody for a moment."""
    root = Path(tempfile.mkdtemp(dir="/tmp"))
    save_all(root, make_job(), step=5)
    root.chmod(0o555)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        errors = save_all(root, make_job())
    finally:
        os.seteuid(me)
    try:
        check_failed(errors, 0, "[Errno 13] Permission denied", str(root))
        assert names(root) == ["step-5"]
        verify(root / "step-5")
    finally:
        root.chmod(0o700)
        shutil.rmtree(root)


def test_a_root_that_is_a_file(tmp_path: Path, job: Job) -> None:
    (tmp_path / "run").write_text("")
    check_failed(save_all(tmp_path / "run", job), 0, "[Errno 17] File exists")
    check_failed(save_all(tmp_path / "run" / "deep", job), 0, "[Errno 20] Not a directory")


def test_a_rank_that_does_not_see_the_directory(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_module._write_share

    def write_share(place: Path, pieces: list[Piece], rank: int) -> object:
        return original(older / "elsewhere" if rank == 1 else place, pieces, rank)

    monkeypatch.setattr(write_module, "_write_share", write_share)
    check_failed(save_all(older, make_job()), 1, "was made by rank 0 and is not seen here")


def test_a_rank_whose_pieces_cannot_be_made(older: Path, job: Job) -> None:
    def pieces(rank: int) -> Iterator[Piece]:
        yield from job.pieces(rank, job.layout(WORLD))
        if rank == 2:
            raise KeyError("moment")

    errors = on_ranks(WORLD, lambda r, share: save(older, 6, pieces(r), META, rank=r, share=share))
    check_failed(errors, 2, "KeyError: 'moment'")


def test_facts_that_json_cannot_hold(older: Path, job: Job) -> None:
    meta = replace(META, groups=[{"lr": torch.tensor(0.1)}])
    errors = on_ranks(
        WORLD, lambda r, share: save(older, 6, job.pieces(r, job.layout(WORLD)), meta, rank=r, share=share)
    )
    check_failed(errors, 0, "groups[0].lr is a torch.Tensor, which a manifest cannot hold exactly")


def test_a_lost_peer_leaves_nothing_of_rank_0(older: Path) -> None:
    calls: list[bytes] = []

    def share(mine: bytes) -> list[bytes]:
        calls.append(mine)
        if len(calls) == 2:
            raise ConnectionError("rank 1 is gone")
        return [mine]

    with pytest.raises(ConnectionError):
        save(older, 6, [part("w", (1,), 0, 1)], META, rank=0, share=share)


# Left-overs of killed runs


@pytest.mark.parametrize("moment", ["made", "half a file", "all files", "manifest"])
def test_what_a_killed_run_left_is_removed_by_the_next_save_of_that_step(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    rest = tmp_path / ".step-6.0badf00d.tmp"
    rest.mkdir()
    if moment != "made":
        (rest / "rank-00000.safetensors").write_bytes(b"\x10\0\0")
    if moment in ("all files", "manifest"):
        (rest / "rank-00001.safetensors").write_bytes(b"")
    if moment == "manifest":
        (rest / "manifest.json").write_bytes(b'{"digest"')
    other = tmp_path / ".step-60.0badf00d.tmp"
    other.mkdir()
    save_all(tmp_path, job)
    assert names(tmp_path) == [other.name, "step-6"]
    verify(tmp_path / "step-6")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(5))
def test_killed_at_every_call_that_reaches_the_disk(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """At the flush of the tensors, of the manifest, of the directory, at the rename, at the flush of the parent."""
    save_all(tmp_path, job, step=5)
    calls: list[str] = []

    def counted(call: Any) -> Any:
        def count(*args: Any) -> Any:
            if len(calls) == moment:
                raise Killed
            calls.append(call.__name__)
            return call(*args)

        return count

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", counted(os.fsync))
        m.setattr(os, "rename", counted(os.rename))
        m.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            save(tmp_path, 6, job.pieces(0, job.layout(1)), META, rank=0, share=alone)
    assert calls == ["fsync", "fsync", "fsync", "rename"][:moment]
    newest = latest(tmp_path)
    assert newest.name == ("step-6" if moment == 4 else "step-5")
    verify(newest)
    if moment < 4:
        assert len(names(tmp_path)) == 2
        save_all(tmp_path, job)
    assert names(tmp_path) == ["step-5", "step-6"]
    verify(tmp_path / "step-6")


def test_a_killed_run_that_still_writes_cannot_reach_into_the_new_one(tmp_path: Path, job: Job) -> None:
    made: list[str] = []

    def killed(mine: bytes) -> list[bytes]:
        made.extend(names(tmp_path))
        raise SystemExit

    with pytest.raises(SystemExit):
        save(tmp_path, 6, job.pieces(0, job.layout(1)), META, rank=0, share=killed)
    save_all(tmp_path, job)
    assert len(made) == 1
    assert not (tmp_path / made[0]).exists()


# Pieces that cannot be


@pytest.mark.parametrize(
    ("piece", "told"),
    [
        (replace(part("w", (4,), 0, 4), kind="weight"), "w has kind 'weight'"),
        (replace(part("w", (4,), 0, 4), kind="state:"), "w has kind 'state:'"),
        (part("w", (4,), 0, 3, torch.zeros(4)), "param/w[0:3] is said to be elements 0:3 of (4,) and has shape (4,)"),
        (
            part("w", (2, 2), 0, 4, torch.zeros(2, 2)),
            "param/w is said to be elements 0:4 of (2, 2) and has shape (2, 2)",
        ),
        (replace(part("w", (4,), 0, 3), kind="buffer"), "buffer/w[0:3] is said to be elements 0:3 of (4,)"),
        (replace(part("w", (4,), 0, 3, torch.zeros(4)), kind="extra:x"), "extra:x/w[0:3] is said to be elements 0:3"),
        (part("w", (2,), 0, 2, torch.zeros(2, dtype=torch.complex128)), "param/w is complex128"),
    ],
)
def test_a_piece_that_cannot_be(tmp_path: Path, piece: Piece, told: str) -> None:
    with pytest.raises(SaveError) as caught:
        save_one(tmp_path, piece)
    assert told in caught.value.what
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([[(0, 3)], [(4, 6)]], "elements 3:4 of w are in no file"),
        ([[(0, 3)], [(3, 5)]], "elements 5:6 of w are in no file"),
        ([[(1, 6)], []], "elements 0:1 of w are in no file"),
        ([[(0, 4)], [(3, 6)]], "element 3 of w is in rank-00000.safetensors and again in rank-00001.safetensors"),
        ([[(0, 6)], [(0, 6)]], "element 0 of w is in rank-00000.safetensors and again in rank-00001.safetensors"),
    ],
)
def test_pieces_that_are_not_every_element_once(tmp_path: Path, pieces: list[list[tuple[int, int]]], told: str) -> None:
    def work(rank: int, share: Any) -> Path:
        mine = [part("w", (6,), start, stop) for start, stop in pieces[rank]]
        return save(tmp_path, 6, mine, META, rank=rank, share=share)

    errors = on_ranks(2, work)
    check_failed(errors, 0, told)
    assert "not every element once" in errors[0].cause
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([part("w", (0, 2), 0, 0), part("w", (0, 2), 0, 0)], "w is in rank-00000.safetensors and again in rank-00001"),
        ([part("w", (4,), 0, 2), part("w", (5,), 2, 5)], "float32 of shape (5,) in rank-00001.safetensors"),
        ([part("w", (4,), 0, 2), part("w", (4,), 2, 4, torch.zeros(2).half())], "float16 of shape (4,) in rank-00001"),
        (
            [Piece.whole("extra:step", "w", torch.tensor(1.0)), Piece.whole("extra:step", "w", torch.tensor(1.0))],
            "element 0 of w (extra:step) is in rank-00000.safetensors and again in rank-00001.safetensors",
        ),
    ],
)
def test_ranks_that_contradict_each_other(tmp_path: Path, pieces: list[Piece], told: str) -> None:
    errors = on_ranks(2, lambda r, share: save(tmp_path, 6, [pieces[r]], META, rank=r, share=share))
    check_failed(errors, 0, told)


def test_the_same_piece_twice_on_one_rank(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="param/w comes twice"):
        save_one(tmp_path, part("w", (2,), 0, 2), part("w", (2,), 0, 2))


def test_ranks_at_different_steps(tmp_path: Path) -> None:
    errors = on_ranks(2, lambda r, share: save(tmp_path, 6 + r, [], META, rank=r, share=share))
    for error in errors:
        assert isinstance(error, SaveError)
        assert error.what == "nothing was saved: it is step 6 on rank 0 and step 7 on rank 1"
    assert names(tmp_path) == []


def test_boxes_of_one_parameter_come_from_several_ranks(tmp_path: Path) -> None:
    w = torch.arange(24.0).reshape(4, 6)
    boxes = [Box((0, 0), (4, 2)), Box((0, 2), (3, 4)), Box((3, 2), (1, 4))]

    def work(rank: int, share: Any) -> Path:
        b = boxes[rank]
        tensor = w[tuple(slice(o, o + n) for o, n in zip(b.offset, b.size, strict=True))].reshape(-1)
        interval = Interval("w", (4, 6), b, 0, b.numel, 0, 0)
        return save(tmp_path, 1, [Piece(kind="param", interval=interval, tensor=tensor)], META, rank=rank, share=share)

    path = on_ranks(3, work)[0]
    out = torch.empty(10)
    Reader(path).read_into("param", [(Interval("w", (4, 6), Box((1, 1), (3, 4)), 1, 11, 9, 9), out)])
    assert out.tolist() == w[1:4, 1:5].reshape(-1)[1:11].tolist()
    assert [e.key for e in inspect(path).entries] == ["param/w@0.0", "param/w@0.2", "param/w@3.2"]


def test_layouts_by_parameter(tmp_path: Path, job: Job) -> None:
    layout = Layout.by_parameter([Item(n, tuple(p.shape), 0) for n, p in job.params.items()], 4)
    on_ranks(4, lambda r, share: save(tmp_path, 1, job.pieces(r, layout), META, rank=r, share=share))
    assert all("[" not in e.key for e in verify(tmp_path / "step-1").entries)


def test_the_table_of_codes_is_the_librarys() -> None:
    for name, code in tensors_module.CODES.items():
        tensor = torch.zeros(3, dtype=getattr(torch, name))
        assert json.loads(safetensors.torch.save({"a": tensor})[8:].split(b"}}")[0] + b"}}")["a"]["dtype"] == code
