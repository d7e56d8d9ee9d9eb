"""Exports in torch's own formats: torch reads them, and `job.load_pretrained` does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from typer.testing import CliRunner

import shoal
from shoal.checkpoint import export
from shoal.cli import app
from shoal.comm.threads import run
from shoal.errors import SaveError, SettingError
from tests.checkpoint.test_export import Tied, export_module, small, trained

FILES = {"pt": ["model.pt"], "distributed": [".metadata", "__0_0.distcp"]}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FILES)
def test_there_and_back(format: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved by three ranks, exported, read by two: all state, under all names."""
    monkeypatch.setattr(export_module, "CHUNK", 7)
    state = trained(tmp_path / "run", 3, strategy="zero3", precision=precision)
    done = export(tmp_path / "run", tmp_path / "out", format=format)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES[format]
    assert sorted(p.name for p in done.files) == FILES[format]
    assert done.aliases == {"head.weight": "embed.weight"}

    def rank_main(_rank: int) -> dict[str, object]:
        with shoal.init("zero2", run_dir="none", device="cpu") as job:
            model = Tied()
            model, _ = job.prepare(model, torch.optim.Adam(model.parameters()))
            where = tmp_path / "out" / ("model.pt" if format == "pt" else "")
            report = job.load_pretrained(where, trust=format == "distributed")
            assert not report.missing
            assert not report.extra
            return job.state_dict(model)

    got = run(2, rank_main)[0]
    assert {*got} == {*state}
    assert all(
        torch.equal(got[name], value.float() if value.is_floating_point() else value) for name, value in state.items()
    )


def test_plain_torch_loads_the_pt(tmp_path: Path) -> None:
    """Without trust, strictly, and tied names stay tied."""
    state = trained(tmp_path / "run", 2, strategy="zero3")
    (file,) = export(tmp_path / "run", tmp_path / "out", format="pt").files
    found: dict[str, Tensor] = torch.load(file, weights_only=True)
    model = Tied()
    model.load_state_dict(found)
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


def test_plain_torch_loads_the_distributed_one(tmp_path: Path) -> None:
    state = trained(tmp_path / "run", 2, strategy="zero3")
    export(tmp_path / "run", tmp_path / "out", format="distributed", dtype="bfloat16")
    found = {name: torch.zeros_like(value) for name, value in Tied().bfloat16().state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(found, checkpoint_id=tmp_path / "out", no_dist=True)
    for name, value in state.items():
        assert torch.equal(found[name], value.bfloat16() if value.is_floating_point() else value), name


def test_inside_a_job(tmp_path: Path) -> None:
    """Rank 0 alone writes; nobody else takes part."""

    def rank_main(_rank: int) -> None:
        with shoal.init("zero3", run_dir="none", device="cpu") as job:
            model = Tied()
            job.prepare(model, torch.optim.Adam(model.parameters()))
            job.save(tmp_path / "run")
            with job.main as here:
                if here:
                    export(tmp_path / "run", tmp_path / "out", format="distributed")

    run(2, rank_main)
    assert (tmp_path / "out/.metadata").exists()


@pytest.mark.parametrize("format", FILES)
def test_nothing_is_written_over_and_nothing_is_left(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        m.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        with pytest.raises(SaveError, match="No space left on device"):
            export(tmp_path, tmp_path / "out", format=format)
    assert list((tmp_path / "out").iterdir()) == []
    export(tmp_path, tmp_path / "out", format=format)
    for again in ("safetensors", *FILES):
        with pytest.raises(SaveError, match="holds a model"):
            export(tmp_path, tmp_path / "out", format=again)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES[format]


def test_mistakes_are_named(tmp_path: Path) -> None:
    small(tmp_path)
    with pytest.raises(SettingError, match=r"format='dcp' is not known[\s\S]*known: safetensors, pt, distributed"):
        export(tmp_path, tmp_path / "out", format="dcp")
    with pytest.raises(SettingError, match=r"max_shard_size= with format='pt', which is never cut"):
        export(tmp_path, tmp_path / "out", format="pt", max_shard_size="1GB")


def test_the_verb(tmp_path: Path) -> None:
    small(tmp_path)
    for format in FILES:
        out = tmp_path / format
        done = CliRunner().invoke(app, ["checkpoint", "export", str(tmp_path), str(out), "--format", format, "--json"])
        assert done.exit_code == 0
        assert sorted(Path(f).name for f in json.loads(done.stdout)["files"]) == FILES[format]
