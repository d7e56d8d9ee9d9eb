"""Exported models: the same bits under the model's own names, in one file or in shards."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from typer.testing import CliRunner

import shoal
from shoal.checkpoint import Exported, Piece, export, save
from shoal.cli import app
from shoal.comm.threads import run
from shoal.errors import DamagedError, SaveError, SettingError
from tests.checkpoint.ranks import META, alone

export_module: Any = sys.modules["shoal.checkpoint.export"]


class Tied(nn.Module):
    """A little of everything: tied parameters, buffers of both sorts, an integer one, ten blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(11))
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("scale", torch.full((3,), 0.3))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.positions[1]
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def trained(root: Path, world: int, **settings: Any) -> dict[str, Tensor]:
    """Two steps, saved; rank 0's state dict."""

    def rank_main(_rank: int) -> dict[str, object]:
        with shoal.init(run_dir="none", device="cpu", leaves=6, **settings) as job:
            model = Tied()
            model, optimizer = job.prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))
            while job.step < 2:
                model(torch.arange(11)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            job.save(root)
            return job.state_dict(model)

    return run(world, rank_main)[0]  # type: ignore[return-value]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_is_the_models_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, precision: str
) -> None:  # fmt: skip
    monkeypatch.setattr(export_module, "CHUNK", 7)  # no piece, row or shard ends where a chunk does
    state = trained(tmp_path / "run", world, strategy="zero3", precision=precision)
    done = export(tmp_path / "run", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "out/model.safetensors")
    assert done == Exported(
        files=(tmp_path / "out/model.safetensors",), index=None, tensors=len(found),
        bytes=sum(t.nbytes for t in found.values()), aliases={"head.weight": "embed.weight"},
    )  # fmt: skip
    assert {*found, "head.weight"} == {*state}
    for name, tensor in found.items():
        assert tensor.dtype == state[name].dtype
        assert tensor.equal(state[name]), name


def test_other_programs_load_it(tmp_path: Path) -> None:
    state = trained(tmp_path / "run", 2, strategy="zero2")
    export(tmp_path / "run" / "step-2", tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    one, other = Tied(), Tied()
    missing = one.load_state_dict(load_file(file), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["head.weight"], [])
    assert load_model(other, file) == (set(), [])
    for model in (one, other):
        assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())


def test_shards_with_an_index(tmp_path: Path) -> None:
    state = trained(tmp_path / "run", 2, strategy="zero3")
    done = export(tmp_path / "run", tmp_path / "out", max_shard_size=900)
    count = len(done.files)
    assert count > 3
    assert [p.name for p in done.files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert done.index == tmp_path / "out/model.safetensors.index.json"
    assert index["metadata"] == {"total_size": done.bytes}
    held = {name: file.name for file in done.files for name in load_file(file)}
    assert held == index["weight_map"]
    for file in done.files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 900 or len(tensors) == 1
        assert all(t.equal(state[name]) for name, t in tensors.items())
    assert held["blocks.9.weight"] <= held["blocks.10.weight"]  # in the model's order, or near it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_what_torch_makes_of_it(tmp_path: Path, dtype: str) -> None:
    state = trained(tmp_path / "run", 1)
    done = export(tmp_path / "run", tmp_path / "out", dtype=dtype)
    for name, tensor in load_file(done.files[0]).items():
        wanted = state[name].to(getattr(torch, dtype)) if state[name].is_floating_point() else state[name]
        assert tensor.dtype == wanted.dtype
        assert tensor.equal(wanted)


def two_models(root: Path) -> None:
    with shoal.init(run_dir="none", device="cpu") as job:
        for name, width in (("generator", 2), ("critic", 3)):
            model = nn.Linear(width, 1)
            job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), name=name)
        job.save(root)


def test_one_of_several_models(tmp_path: Path) -> None:
    two_models(tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "out", model="critic")
    assert {n: tuple(t.shape) for n, t in load_file(done.files[0]).items()} == {"weight": (1, 3), "bias": (1,)}


def small(root: Path, numel: int = 4) -> Path:
    return save(root, 1, [Piece.whole("param", "w", torch.arange(float(numel)))], META, rank=0, share=alone)


def test_mistakes_are_named(tmp_path: Path) -> None:
    two_models(tmp_path / "two")
    small(tmp_path / "one")
    table: list[tuple[Callable[[], object], str, str]] = [
        (lambda: export(tmp_path / "two", "out"), "holds several models", "--model generator or --model critic"),
        (lambda: export(tmp_path / "two", "out", model="critc"), "no model 'critc'", "did you mean 'critic'?"),
        (lambda: export(tmp_path / "one", "out", model="x"), "one model, which has no name", "leave --model out"),
        (lambda: export(tmp_path / "one", "out", dtype="int8"), "dtype='int8' is not known", "float32, bfloat16"),
        (lambda: export(tmp_path / "one", "out", max_shard_size="5 apples"), "'5 apples' is no size", "5GB, 500MB"),
        (lambda: export(tmp_path / "one", "out", max_shard_size=0), "0 is no size", "5GB, 500MB"),
    ]
    for call, what, remedy in table:
        with pytest.raises(SettingError) as e:
            call()
        assert what in e.value.what
        assert remedy in e.value.remedy


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "1.5 kb": 1500, "2GiB": 2**31, "77": 77, 10: 10}
    assert {given: export_module._size(given) for given in sizes} == sizes


def test_what_lies_beside_stays_and_a_model_is_not_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    export(small(tmp_path), out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(SaveError, match=r"holds a model: model\.safetensors"):
        export(tmp_path / "step-1", out, max_shard_size=1)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == before


def test_a_flipped_one_is_not_exported(tmp_path: Path) -> None:
    (file,) = small(tmp_path).glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DamagedError, match="is flipped: w does not fit"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_fault_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    state = trained(tmp_path / "run", 1)
    real, calls = getattr(os, call), []

    def fault(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, fault)
    with pytest.raises(SaveError, match="No space left on device"):
        export(tmp_path / "run", tmp_path / "out", max_shard_size=500)
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    assert export(tmp_path / "run", tmp_path / "out").tensors == len(state) - 1


def test_a_large_tensor_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that is made is a chunk; Python itself allocates next to nothing."""
    monkeypatch.setattr(export_module, "CHUNK", 1 << 10)
    path = small(tmp_path, 1 << 20)
    made: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (made.append(a[0]), empty(*a, **k))[1])
    tracemalloc.start()
    export(path, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(made) == 1 << 10
    assert peak < 1 << 20
    assert load_file(tmp_path / "out/model.safetensors")["w"].equal(torch.arange(float(1 << 20)))


def test_the_verb(tmp_path: Path) -> None:
    small(tmp_path)
    out = tmp_path / "out"
    words = ["checkpoint", "export", str(tmp_path), str(out), "--dtype", "bfloat16"]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stdout) == (0, f"{out}: 1 tensors in 1 files, 8 bytes\n")
    again = CliRunner().invoke(app, words)
    assert (again.exit_code, again.stdout) == (4, "")
    told = CliRunner().invoke(app, [*words[:3], str(tmp_path / "other"), "--max-shard-size", "1MB", "--json"])
    assert json.loads(told.stdout) == {
        "files": [str(tmp_path / "other/model.safetensors")], "index": None, "tensors": 1, "bytes": 16, "aliases": {},
    }  # fmt: skip
    wrong = CliRunner().invoke(app, [*words, "--max-shard-size", "much"])
    assert (wrong.exit_code, wrong.stderr.startswith("shoal[E02] max_shard_size='much' is no size")) == (2, True)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_transformers_loads_it(tmp_path: Path, size: str) -> None:
    """A GPT-2 with tied embeddings, saved on two ranks: `from_pretrained` gives its logits."""
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    words = torch.arange(12).reshape(2, 6)

    def rank_main(_rank: int) -> Tensor:
        with shoal.init("zero3", run_dir="none") as job:
            model = transformers.GPT2LMHeadModel(config)
            model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
            model(input_ids=words, labels=words).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            job.save(tmp_path / "run")
            model.eval()
            with torch.no_grad():
                return model(input_ids=words).logits

    want = run(2, rank_main)[0]
    export(tmp_path / "run", tmp_path / "out", max_shard_size=size)
    config.save_pretrained(tmp_path / "out")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=words).logits, want)
