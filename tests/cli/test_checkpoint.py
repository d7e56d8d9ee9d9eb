"""`shoal checkpoint inspect` and `shoal checkpoint verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from shoal.checkpoint import Meta, Piece, save
from shoal.cli import app

META = Meta(
    strategy={"shard": "PARAMETERS", "cut": "even"},
    leaves=4,
    seed=0,
    world=1,
    versions={"torch": "2.13.0", "shoal": "0.1.0"},
    aliases={"head": "embedding"},
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    pieces = [
        Piece.whole("param", "embedding", torch.arange(6.0).reshape(3, 2)),
        Piece.whole("param", "scale", torch.tensor(1.0)),
        Piece.whole("state:exp_avg", "embedding", torch.zeros(3, 2)),
    ]
    return save(tmp_path, 7, pieces, META, rank=0, share=lambda data: [data])


def shoal(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, words)])


def test_inspect(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    size = f"{file.stat().st_size:,}"
    for where in (checkpoint, checkpoint.parent):
        done = shoal("inspect", where)
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [
            f"{checkpoint}: step 7, format 1, written by torch 2.13.0, shoal 0.1.0",
            "strategy: shard=PARAMETERS, cut=even",
            "saved by 1 ranks, 4 leaves a step",
            f"1 files, {size} bytes",
            f"  {file.name}  {size}",
            "2 parameters, 7 elements",
            "  embedding  float32  3x2  also called head",
            "  scale      float32  scalar",
        ]


def test_verify(checkpoint: Path) -> None:
    done = shoal("verify", checkpoint)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{checkpoint}: whole: step 7, 2 parameters in 1 files, {size:,} bytes\n"


def test_json(checkpoint: Path) -> None:
    inspected, verified = (json.loads(shoal(verb, "--json", checkpoint).stdout) for verb in ("inspect", "verify"))
    assert verified == {"whole": True} | inspected
    assert inspected.pop("files")[0].keys() == {"name", "bytes"}
    assert inspected == {
        "path": str(checkpoint),
        "format": 1,
        "step": 7,
        "strategy": {"shard": "PARAMETERS", "cut": "even"},
        "leaves": 4,
        "world": 1,
        "versions": {"torch": "2.13.0", "shoal": "0.1.0"},
        "params": [
            {"name": "embedding", "shape": [3, 2], "dtype": "float32", "aliases": ["head"]},
            {"name": "scale", "shape": [], "dtype": "float32", "aliases": []},
        ],
    }


def flip(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def remove(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("verb", "damage", "code", "text"),
    [
        ("verify", flip, "E40", " is flipped: "),
        ("verify", remove, "E40", "manifest.json is missing"),
        ("inspect", remove, "E40", "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint(verb: str, damage: object, code: str, text: str, checkpoint: Path) -> None:
    assert callable(damage)
    damage(checkpoint)
    said, told = shoal(verb, checkpoint), shoal(verb, "--json", checkpoint)
    assert said.exit_code == told.exit_code == 4
    assert (said.stdout, told.stderr) == ("", "")
    assert said.stderr.startswith(f"shoal[{code}] {checkpoint}")
    assert text in said.stderr
    record = json.loads(told.stdout)
    assert record["code"] == code
    assert text in record["what"]


def test_a_flipped_tensor_is_not_seen_by_inspect(checkpoint: Path) -> None:
    flip(checkpoint)
    assert shoal("inspect", checkpoint).exit_code == 0


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_no_checkpoint(verb: str, tmp_path: Path) -> None:
    done = shoal(verb, tmp_path)
    assert done.exit_code == 4
    assert f"there is no checkpoint in {tmp_path}" in done.stderr
