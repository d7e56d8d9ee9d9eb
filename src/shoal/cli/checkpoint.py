"""`shoal checkpoint inspect`, `verify` and `export`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.telling import errors_told, tell_json

if TYPE_CHECKING:
    from shoal.checkpoint import Manifest

app = typer.Typer(help="Look at checkpoints.", no_args_is_help=True, rich_markup_mode=None)

Where = Annotated[Path, typer.Argument(help="A directory step-N, or the one above: its newest.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def inspect(path: Where, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds, without reading its tensors.

    \b
    Example:
      shoal checkpoint inspect run/checkpoint/step-100
    """
    from shoal.checkpoint import inspect  # imports torch

    with errors_told(as_json=as_json):
        manifest = inspect(_found(path))
    if as_json:
        tell_json(_plain(manifest))
    else:
        typer.echo("\n".join(_lines(manifest)))


@app.command()
def verify(path: Where, as_json: AsJson = False) -> None:
    """Read every byte of a checkpoint and compare digests.

    \b
    Example:
      shoal checkpoint verify run/checkpoint/step-100
    """
    from shoal.checkpoint import verify  # imports torch

    with errors_told(as_json=as_json):
        manifest = verify(_found(path))
    if as_json:
        tell_json({"whole": True, **_plain(manifest)})
    else:
        held = f"{len(manifest.params)} parameters in {len(manifest.files)} files, {_bytes(manifest):,} bytes"
        typer.echo(f"{manifest.path}: whole: step {manifest.step}, {held}")


@app.command()
def export(
    path: Where,
    out: Annotated[Path, typer.Argument(help="A directory; made if missing. It must hold no model.")],
    model: Annotated[str, typer.Option(help="Which one, if the job trained several.")] = "",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default as stored.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Of a file: 500MB, 2GiB; default 5GB.")] = None,
    format: Annotated[str, typer.Option(help="safetensors, pt or distributed (torch's).")] = "safetensors",
    as_json: AsJson = False,
) -> None:
    """Write the model for other programs: safetensors in its own names, as Hugging Face lays it out.

    One file model.safetensors, or shards and model.safetensors.index.json. Tied parameters are stored once.
    --format pt writes a state dict, model.pt; --format distributed a torch distributed checkpoint.

    \b
    Example:
      shoal checkpoint export run/checkpoint exported --dtype bfloat16
    """
    from shoal.checkpoint import export  # imports torch

    with errors_told(as_json=as_json):
        done = export(path, out, model=model, dtype=dtype, max_shard_size=max_shard_size, format=format)
    if as_json:
        tell_json(asdict(done))
    else:
        typer.echo(f"{out}: {done.tensors} tensors in {len(done.files)} files, {done.bytes:,} bytes")


def _found(path: Path) -> Path:
    from shoal.checkpoint import latest

    return path if path.name.startswith("step-") else latest(path)


def _plain(manifest: Manifest) -> dict[str, object]:
    return {
        "path": manifest.path,
        "format": manifest.format,
        "step": manifest.step,
        "strategy": dict(manifest.strategy),
        "leaves": manifest.leaves,
        "world": manifest.world,
        "versions": dict(manifest.versions),
        "params": [{"name": p.name, "shape": p.shape, "dtype": p.dtype, "aliases": p.aliases} for p in manifest.params],
        "files": [{"name": f.name, "bytes": f.bytes} for f in manifest.files],
    }


def _lines(manifest: Manifest) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    strategy = ", ".join(f"{name}={value}" for name, value in manifest.strategy.items())
    yield f"{manifest.path}: step {manifest.step}, format {manifest.format}, written by {versions or 'unknown'}"
    yield f"strategy: {strategy}"
    yield f"saved by {manifest.world} ranks, {manifest.leaves} leaves a step"
    yield f"{len(manifest.files)} files, {_bytes(manifest):,} bytes"
    for file in manifest.files:
        yield f"  {file.name}  {file.bytes:,}"
    yield f"{len(manifest.params)} parameters, {sum(prod(p.shape) for p in manifest.params):,} elements"
    wide = max((len(p.name) for p in manifest.params), default=0)
    for p in manifest.params:
        tied = f"  also called {', '.join(p.aliases)}" if p.aliases else ""
        yield f"  {p.name:{wide}}  {p.dtype}  {'x'.join(map(str, p.shape)) or 'scalar'}{tied}"


def _bytes(manifest: Manifest) -> int:
    return sum(file.bytes for file in manifest.files)
