"""What kind of weights lies at a path."""

from __future__ import annotations

from pathlib import Path

from shoal.checkpoint.read import some
from shoal.errors import CheckpointError
from shoal.pretrained.deepspeed import OPTIMIZER, Sharded, Universal
from shoal.pretrained.sources import Source, indexed, pickled, safetensors

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def find(path: Path, trust: bool) -> Source:
    """Open it.

    Raises:
        CheckpointError: there is nothing that shoal knows, or it is a pickle and not trusted.
    """
    if path.is_dir():
        return _in_directory(path, trust)
    if not path.exists():
        raise CheckpointError(f"there are no weights at {path}", remedy="a file or directory that all ranks see")
    if path.suffix == ".safetensors":
        return safetensors(path)
    if path.name.endswith(".index.json"):
        return indexed(path, trust)
    if path.suffix in PICKLES:
        return pickled(path, trust)
    raise CheckpointError(f"{path} is of no known kind", remedy=f".safetensors, .index.json, {', '.join(PICKLES)}")


def _in_directory(path: Path, trust: bool) -> Source:
    for name in (*INDEXES, *SINGLE):
        if (path / name).exists():
            return find(path / name, trust)
    if (path / ".metadata").exists():
        from shoal.pretrained.distributed import Distributed  # torch takes long to import it

        return Distributed(path, trust)
    if (path / "zero").is_dir():
        return Universal(path / "zero", trust)
    if any(path.glob(OPTIMIZER)):
        return Sharded(path, trust)
    for pointer in ("latest_universal", "latest"):  # DeepSpeed's: the name of the newest folder
        if (path / pointer).is_file():
            inner = path / Path((path / pointer).read_text().strip()).name
            if inner.is_dir():
                return _in_directory(inner, trust)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return safetensors(files[0])
    seen = some(sorted(p.name for p in path.iterdir())) or "nothing"
    raise CheckpointError(
        f"there are no weights in {path}",
        cause=f"it holds {seen}",
        remedy=f"{', '.join(SINGLE)}, an index of them, a torch distributed or a DeepSpeed ZeRO checkpoint; "
        "job.load for checkpoints of shoal",
    )
