"""Reading: any cut of what was saved, and every kind of damage by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.checkpoint import Entry, Param, Piece, Reader, inspect, latest, save, verify
from shoal.checkpoint import manifest as manifest_module
from shoal.checkpoint import read as read_module
from shoal.errors import CheckpointError, DamagedError, ResumeError
from shoal.layout import Box, Interval, Item, Layout
from tests.checkpoint.ranks import META, Job, alone, bits, on_ranks


def read_all(reader: Reader, job: Job, layout: Layout, kind: str) -> dict[str, Tensor]:
    """Every owner's pieces, put together again."""
    tensors = {n: torch.full((t.numel(),), 99).to(t.dtype) for n, t in kind_of(job, kind).items()}
    for owner in range(layout.owners):
        for name in tensors:
            mine = [i for i in layout.pieces(owner) if i.name == name]
            reader.read_into(kind, [(i, tensors[name][i.start : i.stop]) for i in mine])
    return {n: t.reshape(kind_of(job, kind)[n].shape) for n, t in tensors.items()}


def kind_of(job: Job, kind: str) -> dict[str, Tensor]:
    return job.params if kind == "param" else job.states


def interval(tensor: Tensor, name: str, start: int = 0, stop: int | None = None) -> Interval:
    shape = tuple(tensor.shape)
    return Interval(name, shape, Box.whole(shape), start, tensor.numel() if stop is None else stop, 0, 0)


# Any cut


@pytest.mark.parametrize("world", [1, 2, 5])
def test_any_cut_of_what_any_world_saved(tmp_path: Path, job: Job, world: int) -> None:
    cuts = [job.layout(world), job.layout(world, granule=64)]
    cuts.append(Layout.by_parameter([Item(n, tuple(p.shape), 0) for n, p in job.params.items()], world))
    for step, cut in enumerate(cuts):
        on_ranks(world, lambda r, share, s=step, c=cut: save(tmp_path, s, job.pieces(r, c), META, rank=r, share=share))
    for step in range(len(cuts)):
        reader = Reader(tmp_path / f"step-{step}")
        for owners in (1, 3, 40):
            for kind in ("param", "state:exp_avg"):
                read = read_all(reader, job, job.layout(owners), kind)
                assert {n: bits(t) for n, t in read.items()} == {n: bits(t) for n, t in kind_of(job, kind).items()}


def test_only_what_is_wanted_is_filled(saved: Path, job: Job) -> None:
    out = torch.full((20,), 7.0)
    Reader(saved).read_into("param", [(interval(job.params["wte.weight"], "wte.weight", 60, 70), out[5:15])])
    flat = job.params["wte.weight"].reshape(-1)
    assert out.tolist() == [7.0] * 5 + flat[60:70].tolist() + [7.0] * 5


def test_a_parameter_that_wants_gradients_is_filled(saved: Path, job: Job) -> None:
    out = torch.nn.Parameter(torch.zeros(195))
    Reader(saved).read_into("param", [(interval(job.params["wte.weight"], "wte.weight"), out)])
    assert bits(out) == bits(job.params["wte.weight"].reshape(-1))
    Reader(saved).read_into("param", [])


def test_whole_tensors(saved: Path, job: Job) -> None:
    reader = Reader(saved)
    for piece in job.whole:
        name = piece.interval.name
        read = reader.buffer(name) if piece.kind == "buffer" else reader.extra(piece.kind, name)
        assert read is not None
        assert bits(read) == bits(piece.tensor)
    assert reader.extra("extra:row", "bias") is None
    assert reader.extra("extra:col", "head") is None


def test_what_was_read_outlives_the_files(saved: Path) -> None:
    buffer = Reader(saved).buffer("bn.running_mean")
    before = bits(buffer)
    for file in saved.iterdir():
        file.write_bytes(b"")
    assert bits(buffer) == before


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "complex64", "float8_e4m3fn"],
)
def test_every_dtype_in_every_place(tmp_path: Path, dtype: str) -> None:
    raw = torch.randint(256, (24,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    values = (raw & 1 if dtype == "bool" else raw).view(getattr(torch, dtype))
    for step, t in enumerate((values, values[0], values[:0], values.reshape(1, -1, 1))):
        kinds = ["param", "state:x", "buffer", "extra:y"]
        save(tmp_path, step, [Piece.whole(k, "w", t) for k in kinds], META, rank=0, share=alone)
        reader = Reader.together(tmp_path / f"step-{step}", rank=0, share=alone)
        assert bits(reader.buffer("w")) == bits(t)
        extra = reader.extra("extra:y", "w")
        assert extra is not None
        assert bits(extra) == bits(t)
        for kind in ("param", "state:x"):
            out = torch.zeros(t.numel(), dtype=t.dtype)
            reader.read_into(kind, [(interval(t, "w"), out)])
            assert bits(out.reshape(t.shape)) == bits(t)
            assert reader.dtype(kind, "w") == t.dtype


# What it says


def test_the_manifest_for_printing(saved: Path, job: Job) -> None:
    for manifest in (inspect(saved), verify(saved)):
        assert (manifest.path, manifest.format, manifest.step) == (saved, 1, 5)
        assert (manifest.strategy, manifest.leaves, manifest.world) == ({"name": "zero3"}, 4, 2)
        assert manifest.versions == {"torch": "2", "shoal": "0.1"}
        assert manifest.meta == META
        assert [(f.name, f.bytes) for f in manifest.files] == [
            (p.name, p.stat().st_size) for p in sorted(saved.glob("rank-*"))
        ]
        expected = {n: (tuple(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in job.params.items()}
        assert {p.name: (p.shape, p.dtype) for p in manifest.params} == expected


def test_aliases_are_shown_with_their_parameter(tmp_path: Path) -> None:
    meta = replace(META, aliases={"head": "wte", "out": "wte"})
    pieces = [Piece.whole("param", n, torch.zeros(2, 3)) for n in ("wte", "b")]
    path = save(tmp_path, 1, pieces, meta, rank=0, share=alone)
    assert inspect(path).params == (
        Param("b", (2, 3), "float32", ()),
        Param("wte", (2, 3), "float32", ("head", "out")),
    )
    with pytest.raises(ResumeError, match=r"missing: head \(there tied to wte\); unexpected: wte\n"):
        Reader(path).compare({"head": (2, 3), "b": (2, 3)})


def test_kinds_and_shapes(saved: Path, job: Job) -> None:
    reader = Reader(saved)
    assert reader.state_kinds("head") == ["state:exp_avg"]
    assert reader.state_kinds("mask") == []
    assert reader.extra_kinds("head") == ["extra:row", "extra:step"]
    assert reader.extra_kinds("bias") == ["extra:step"]
    assert reader.shapes("param") == {n: tuple(p.shape) for n, p in job.params.items()}
    assert reader.shapes("extra:row") == {"head": (2, 1)}
    assert reader.shapes("state:nothing") == {}
    reader.compare(reader.shapes("param"))
    reader.compare(reader.shapes("buffer"), kind="buffer")


# What does not fit the job


def test_names_that_are_missing_or_unexpected(saved: Path, job: Job) -> None:
    reader = Reader(saved)
    wanted = {n: tuple(p.shape) for n, p in job.params.items() if n != "bias"}
    with pytest.raises(ResumeError) as caught:
        reader.compare({**wanted, "new": (1,), "head": (5, 3, 2)})
    told = "missing: new; unexpected: bias; of another shape: head ((2, 3, 5) there, (5, 3, 2) here)"
    assert caught.value.what == f"the param tensors in {saved} are not those of this job: {told}"
    assert "shoal checkpoint inspect" in caught.value.remedy
    with pytest.raises(ResumeError, match="missing: l0, l1, l2, l3, l4 and 4 more; unexpected"):
        reader.compare({f"l{i}": (1,) for i in range(9)})


def test_wants_that_are_not_there(saved: Path, job: Job) -> None:
    reader = Reader(saved)
    out = torch.full((7,), 5, dtype=torch.bfloat16)
    fine = (interval(job.params["bias"], "bias"), out)
    for name, shape, told in (
        ("gone", (1,), "missing: gone"),
        ("gone", (0,), "missing: gone"),
        ("scale", (1,), "of another shape: scale (() there, (1,) here)"),
    ):
        want = (interval(torch.zeros(shape), name), torch.zeros(shape).reshape(-1))
        with pytest.raises(ResumeError, match=re.escape(told)):
            reader.read_into("param", [fine, want])
    with pytest.raises(ResumeError, match=r"the state:momentum tensors in .* missing: bias"):
        reader.read_into("state:momentum", [fine])
    with pytest.raises(ResumeError, match=r"the buffer tensors in .* missing: running_var"):
        reader.buffer("running_var")
    with pytest.raises(ResumeError, match=r"the param tensors in .* missing: gone"):
        reader.dtype("param", "gone")
    assert set(out.tolist()) == {5.0}


def test_another_dtype_is_refused_with_both(saved: Path, job: Job) -> None:
    wants = [(interval(job.params[n], n), torch.zeros(job.params[n].numel())) for n in ("wte.weight", "bias")]
    with pytest.raises(ResumeError) as caught:
        Reader(saved).read_into("param", wants)
    assert caught.value.what == f"bias (param) is torch.bfloat16 in {saved} and torch.float32 in this job"
    assert caught.value.remedy == "the precision it was saved with"
    assert not wants[0][1].any()
    empty = torch.zeros(0, dtype=torch.float32)
    with pytest.raises(ResumeError, match=r"none \(param\) is torch.float16"):
        Reader(saved).read_into("param", [(interval(job.params["none"], "none"), empty)])


# Damage


def flip(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def refused(path: Path, *told: str, look: Callable[[Path], Any] = inspect) -> None:
    with pytest.raises(DamagedError) as caught:
        look(path)
    for text in told:
        assert text in str(caught.value)
    assert not isinstance(caught.value.__cause__, AssertionError)


def test_every_flipped_byte_of_the_manifest(tmp_path: Path) -> None:
    path = save(tmp_path, 5, [Piece.whole("param", "w", torch.ones(2))], META, rank=0, share=alone)
    file = path / "manifest.json"
    raw = file.read_bytes()
    for at in range(len(raw)):
        flip(file, at, at % 8)
        refused(path, str(file), "manifest.json is truncated or flipped: ")
        file.write_bytes(raw)
    inspect(path)


def test_every_flipped_byte_of_a_file(tmp_path: Path) -> None:
    """The header's length, its text, its padding, and every byte of the tensors."""
    pieces = [Piece.whole("param", "w", torch.ones(5)), Piece.whole("buffer", "b", torch.tensor([True, False]))]
    path = save(tmp_path, 5, pieces, META, rank=0, share=alone)
    file = path / "rank-00000.safetensors"
    raw = file.read_bytes()
    for at in range(len(raw)):
        flip(file, at, at % 8)
        if at < len(raw) - 22:
            refused(path, f"{file} is flipped: its header does not fit its digest", "it holds b (buffer), w")
        else:
            inspect(path)
            entry = "w" if at < len(raw) - 2 else "b (buffer)"
            refused(path, f"{file} is flipped: {entry} does not fit its digest", look=verify)
        file.write_bytes(raw)
    verify(path)


def test_every_bit_of_a_digest_and_of_the_first_line(saved: Path) -> None:
    file = saved / "manifest.json"
    raw = file.read_bytes()
    for at in range(len(b'{"digest": "') + 3):
        for bit in range(8):
            flip(file, at, bit)
            refused(saved, "manifest.json is truncated or flipped")
            file.write_bytes(raw)


def test_every_truncation(tmp_path: Path) -> None:
    path = save(tmp_path, 5, [Piece.whole("param", "w", torch.ones(5))], META, rank=0, share=alone)
    for file, told in (("manifest.json", "truncated or flipped"), ("rank-00000.safetensors", "is truncated: ")):
        raw = (path / file).read_bytes()
        for length in range(len(raw)):
            (path / file).write_bytes(raw[:length])
            refused(path, str(path / file), told)
        (path / file).write_bytes(raw)
    (path / "rank-00000.safetensors").write_bytes(raw + b"\0")
    refused(path, f"is longer than what was written: {len(raw) + 1} of {len(raw)} bytes", "it holds w")


def test_missing_files(saved: Path) -> None:
    for name in ("rank-00001.safetensors", "manifest.json"):
        shutil.move(saved / name, saved.parent / name)
        refused(saved, f"{saved / name} is missing")
        shutil.move(saved.parent / name, saved / name)
    os.remove(saved / "rank-00001.safetensors")
    refused(saved, "it holds bias (extra:step), bn.num_batches_tracked (buffer), ", " more\n")


def test_a_file_that_goes_away_while_it_is_read(saved: Path, job: Job) -> None:
    reader = Reader(saved)
    for file in saved.glob("rank-*"):
        file.unlink()
    out = torch.zeros(195)
    want = [(interval(job.params["wte.weight"], "wte.weight"), out)]
    refused(saved, "rank-00000.safetensors is missing", look=lambda _: reader.read_into("param", want))
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        (saved / name).write_bytes(b"not it")
    refused(saved, "rank-00000.safetensors cannot be read: ", look=lambda _: reader.read_into("param", want))


def test_files_that_cannot_be_opened(saved: Path) -> None:
    for name in ("rank-00000.safetensors", "manifest.json"):
        (saved / name).unlink()
        (saved / name).mkdir()
        with pytest.raises(CheckpointError, match=f"{name} cannot be read: Is a directory") as caught:
            inspect(saved)
        assert type(caught.value) is CheckpointError


# Manifests that shoal did not write


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest with another content and a digest that fits."""
    record = json.loads((path / "manifest.json").read_bytes())
    del record["digest"]
    record = change(record) or record
    body = json.dumps(record)[1:].encode() + b"\n"
    digest = hashlib.sha256(body).hexdigest()
    (path / "manifest.json").write_bytes(f'{{"digest": "{digest}",\n'.encode() + body)


def bias(record: dict[str, Any]) -> dict[str, Any]:
    """The entry of the parameter `bias`, which is whole in the first file."""
    return next(e for e in record["entries"] if (e["kind"], e["name"]) == ("param", "bias"))


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: bias(record).update(fields)


def test_a_forged_one_is_read_like_ours(saved: Path) -> None:
    before = verify(saved)
    forge(saved, lambda record: None)
    assert replace(verify(saved), digest=before.digest) == before


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../step-4/rank-00000.safetensors",
        "rank-00000.safetensors/..",
        "..",
        "a/rank-00000.safetensors",
        "rank-00000.safetensors\n",
        "rank-1.safetensors",
        "",
    ],
)
def test_file_names_outside_the_directory_are_refused(saved: Path, name: str) -> None:
    forge(saved, lambda record: record["files"][0].update(name=name))
    refused(saved, f"manifest.json: it names the file {name!r}, and only rank-00000.safetensors and so on belong to it")


@pytest.mark.parametrize(
    ("forgery", "told"),
    [
        (change(file="/etc/passwd"), "bias is said to be in '/etc/passwd', which is not among the files"),
        (change(kind="pickle"), "as something that cannot be"),
        (change(dtype="__init__"), "as something that cannot be"),
        (change(offset=[1]), "describes bias as something that cannot be"),
        (change(size=[3]), "as something that cannot be"),
        (change(stop=2**70), "as something that cannot be"),
        (change(start=-1), "as something that cannot be"),
        (change(start=5, stop=4), "as something that cannot be"),
        (change(start=5), "elements 0:5 of bias are in no file"),
        (change(stop=5), "elements 5:7 of bias are in no file"),
        (change(shape=[7, 1]), "as something that cannot be"),
        (change(shape=[-7]), "shape is [-7] where whole numbers of at least 0 belong"),
        (change(shape=[7.0]), "shape is [7.0] where whole numbers"),
        (change(shape="7"), "shape is '7' where list belongs"),
        (change(name=None), "name is None where str belongs"),
        (change(dtype="float16", shape=[8], size=[8], stop=8), "rank-00000.safetensors is flipped: its header"),
        (lambda r: r.update(entries={}), "entries is {} where list belongs"),
        (lambda r: r.update(entries=[[]]), "entries holds something that is no object"),
        (lambda r: r["entries"].remove(bias(r)), "rank-00000.safetensors is flipped: its header does not fit"),
        (lambda r: r["entries"].append(bias(r)), "element 0 of bias is in rank-00000.safetensors and again"),
        (lambda r: r.update(step="5"), "step is '5' where int belongs"),
        (lambda r: r.update(leaves=None), "leaves is None where int belongs"),
        (lambda r: r["files"][0].update(bytes=True), "bytes is True where int belongs"),
        (lambda r: r["files"][0].update(header="0"), "its header does not fit its digest"),
    ],
)
def test_a_forged_manifest_is_damaged(saved: Path, forgery: Callable[[dict[str, Any]], None], told: str) -> None:
    forge(saved, forgery)
    refused(saved, told)


def test_a_forged_entry_that_differs_from_its_file(saved: Path) -> None:
    forge(saved, change(dtype="float16"))
    refused(saved, "bias is BF16 of shape (7,), not float16 of shape (7,)")
    forge(saved, change(dtype="bfloat16", key="param/elsewhere"))
    refused(saved, "rank-00000.safetensors cannot be read: ", "param/elsewhere")


def test_a_forged_shape_that_differs_from_its_file(saved: Path) -> None:
    def forgery(record: dict[str, Any]) -> None:
        entry = next(e for e in record["entries"] if e["name"] == "bn.num_batches_tracked")
        entry.update(shape=[1], offset=[0], size=[1])

    forge(saved, forgery)
    refused(saved, "bn.num_batches_tracked (buffer) is I64 of shape (), not int64 of shape (1,)")


def test_a_newer_format_is_named(saved: Path) -> None:
    forge(saved, lambda record: record.update(format=2, entries="of another kind", versions={"shoal": "9.1"}))
    with pytest.raises(ResumeError) as caught:
        inspect(saved)
    assert caught.value.what == f"{saved} has format 2 and this shoal reads format 1"
    assert "{'shoal': '9.1'}" in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize(("text", "version"), [('{"format": "tf", "x": 1}', "'tf'"), ("{}", "None"), ("[1]", "None")])
def test_another_programs_manifest_is_named(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ResumeError) as caught:
        inspect(tmp_path)
    told = f"{tmp_path} is not a checkpoint of shoal: its manifest has format {version} and no digest"
    assert caught.value.what == told
    assert "job.save()" in caught.value.remedy


@pytest.mark.parametrize("raw", [b"", b"\0" * 100, b"{", b'{"digest": "00"}', b"null", b"[" * 100_000])
def test_what_is_no_manifest(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(raw)
    refused(tmp_path, "manifest.json is truncated or flipped")


@pytest.mark.parametrize("body", [b"]", b"1}}", b""])
def test_a_digest_that_fits_what_is_not_json(tmp_path: Path, body: bytes) -> None:
    head = f'{{"digest": "{hashlib.sha256(body).hexdigest()}",\n'.encode()
    (tmp_path / "manifest.json").write_bytes(head + body)
    refused(tmp_path, "manifest.json is not JSON")


def test_rendering_is_strict_json(saved: Path) -> None:
    def no(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads((saved / "manifest.json").read_bytes(), parse_constant=no)
    assert list(record)[:3] == ["digest", "format", "step"]
    assert manifest_module.is_kind("state:a\nb")
    assert isinstance(Entry.decode(record["entries"][0]), Entry)


# Finding one


def test_the_latest_has_the_highest_number(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        save(tmp_path, step, [], META, rank=0, share=alone)
    assert latest(tmp_path) == tmp_path / "step-10"
    assert latest(tmp_path / "step-9") == tmp_path / "step-9"
    (tmp_path / "step-9").rename(tmp_path / "best")
    assert latest(tmp_path / "best") == tmp_path / "best"


def test_what_is_not_finished_is_never_the_latest(tmp_path: Path) -> None:
    save(tmp_path, 3, [], META, rank=0, share=alone)
    shutil.copytree(tmp_path / "step-3", tmp_path / ".step-8.0badf00d.tmp")
    shutil.copytree(tmp_path / "step-3", tmp_path / "step-08")
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-6").write_text("")
    assert latest(tmp_path) == tmp_path / "step-3"


def test_a_damaged_latest_is_not_passed_over(tmp_path: Path) -> None:
    for step in (3, 4):
        save(tmp_path, step, [Piece.whole("param", "w", torch.ones(2))], META, rank=0, share=alone)
    (tmp_path / "step-4" / "rank-00000.safetensors").unlink()
    refused(latest(tmp_path), "step-4/rank-00000.safetensors is missing")


def test_no_checkpoint_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it holds nothing"):
        latest(tmp_path)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "events.jsonl").write_text("")
    with pytest.raises(CheckpointError) as caught:
        latest(tmp_path)
    told = f"no checkpoint in {tmp_path}: looked for manifest.json and for step-<N>/manifest.json in it"
    assert told in caught.value.what
    assert caught.value.cause == "it holds events.jsonl, step-1"
    assert "job.save()" in caught.value.remedy
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*/gone: No such file or directory"):
        latest(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*/gone: it is no directory"):
        inspect(tmp_path / "gone")
    assert latest(tmp_path / "step-1") == tmp_path / "step-1"
    refused(tmp_path / "step-1", "step-1/manifest.json is missing")


# All ranks together


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_divide_the_reading(saved: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    read: list[list[Entry]] = []
    check = read_module.check_digests
    monkeypatch.setattr(
        read_module, "check_digests", lambda m, entries: (read.append(list(entries)), check(m, entries))
    )
    readers = on_ranks(world, lambda r, share: Reader.together(saved, rank=r, share=share))
    assert all(r.manifest == readers[0].manifest for r in readers)
    done = [(e.file, e.key) for entries in read for e in entries]
    assert len(read) == world
    assert sorted(done) == sorted((e.file, e.key) for e in readers[0].manifest.entries)
    total, widest = (f(e.bytes for e in readers[0].manifest.entries) for f in (sum, max))
    assert all(sum(e.bytes for e in entries) <= total / world + widest for entries in read)


def test_together_takes_the_latest_of_a_directory(saved: Path) -> None:
    other = save(saved.parent, 11, [], META, rank=0, share=alone)
    assert Reader.together(saved.parent, rank=0, share=alone).manifest.path == other


def all_raise(path: Path, sort: type[CheckpointError], told: str, world: int = 3) -> None:
    errors = on_ranks(world, lambda r, share: Reader.together(path, rank=r, share=share))
    assert {type(e) for e in errors} == {sort}
    assert len({str(e) for e in errors}) == 1
    assert told in errors[0].what


def test_a_flipped_tensor_stops_every_rank(saved: Path) -> None:
    flip(saved / "rank-00001.safetensors", -1)
    all_raise(saved, DamagedError, "rank-00001.safetensors is flipped: ")


def test_any_error_stops_every_rank_with_its_own_type(saved: Path) -> None:
    all_raise(saved.parent / "gone", CheckpointError, "gone: No such file or directory")
    all_raise(saved.parent / "step-4", CheckpointError, "step-4: it is no directory")
    flip(saved / "rank-00001.safetensors", 20)
    all_raise(saved, DamagedError, "its header does not fit")
    forge(saved, lambda record: record.update(format=2))
    all_raise(saved, ResumeError, "has format 2")


def test_an_error_on_one_rank_only_stops_every_rank(saved: Path) -> None:
    paths = [saved, saved.parent / "not-mounted", saved]
    errors = on_ranks(3, lambda r, share: Reader.together(paths[r], rank=r, share=share))
    assert all("not-mounted: No such file or directory" in e.what for e in errors)
    assert [e.__cause__ is None for e in errors] == [True, False, True]


def test_ranks_that_see_different_checkpoints(saved: Path) -> None:
    other = save(saved.parent, 6, [], META, rank=0, share=alone)
    errors = on_ranks(2, lambda r, share: Reader.together([saved, other][r], rank=r, share=share))
    for error in errors:
        assert type(error) is CheckpointError
        assert "is one checkpoint on rank 0 and another on rank 1" in error.what


# The newest whole one is offered


def half_written(path: Path) -> None:
    (path / "manifest.json").unlink()


def flipped(path: Path) -> None:
    flip(path / "rank-00000.safetensors", -1)


def newer(path: Path) -> None:
    forge(path, lambda record: record.update(format=2))


def foreign(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": "tf"}')


def truncated(path: Path) -> None:
    os.truncate(path / "rank-00000.safetensors", 50)


@pytest.mark.parametrize(
    ("damage", "sort", "told", "other"),
    [
        (half_written, DamagedError, "step-9/manifest.json is missing", "an older step, or this file from a copy"),
        (
            flipped,
            DamagedError,
            "step-9/rank-00000.safetensors is flipped: ",
            "an older step, or this file from a copy",
        ),
        (
            truncated,
            DamagedError,
            "step-9/rank-00000.safetensors is truncated: 50 of ",
            "an older step, or this file from a copy",
        ),
        (newer, ResumeError, "step-9 has format 2 and this shoal reads format 1", "that version of shoal"),
        (foreign, ResumeError, "step-9 is not a checkpoint of shoal", "the directory step-N that job.save() returned"),
    ],
)
def test_the_newest_whole_one_is_offered(
    tmp_path: Path, damage: Callable[[Path], None], sort: type[CheckpointError], told: str, other: str
) -> None:
    for step in (3, 4, 5, 9):
        save(tmp_path, step, [Piece.whole("param", "w", torch.ones(2))], META, rank=0, share=alone)
    flipped(tmp_path / "step-5")
    damage(tmp_path / "step-9")
    for path in (tmp_path, tmp_path / "step-9"):
        errors = on_ranks(2, lambda r, share, p=path: Reader.together(p, rank=r, share=share))
        assert {type(e) for e in errors} == {sort}
        assert len({str(e) for e in errors}) == 1
        assert told in errors[0].what
        assert errors[0].remedy == f"job.load('{tmp_path}/step-4'), the newest whole one; or {other}"
    assert Reader.together(tmp_path / "step-4", rank=0, share=alone).manifest.step == 4


def test_nothing_is_offered_where_nothing_is_whole(tmp_path: Path) -> None:
    for step in (3, 4):
        save(tmp_path, step, [Piece.whole("param", "w", torch.ones(2))], META, rank=0, share=alone)
        flipped(tmp_path / f"step-{step}")
    with pytest.raises(DamagedError) as e:
        Reader.together(tmp_path, rank=0, share=alone)
    assert e.value.remedy == "an older step, or this file from a copy"
