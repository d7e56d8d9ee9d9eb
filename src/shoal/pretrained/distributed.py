"""Checkpoints of `torch.distributed.checkpoint`. Their `.metadata` is a pickle, so they have to be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load  # pyright: ignore[reportUnknownVariableType]

from shoal.errors import CheckpointError
from shoal.pretrained.sources import TRUST


class Distributed:
    """One such directory.

    Args:
        path: the directory.

    Raises:
        CheckpointError: it was not trusted.
    """

    def __init__(self, path: Path, trust: bool) -> None:
        if not trust:
            raise CheckpointError(
                f"{path} is a torch distributed checkpoint, whose .metadata is a pickle",
                cause="reading it would run code that the file names",
                remedy=TRUST,
            )
        self.path = path
        found = FileSystemReader(path).read_metadata().state_dict_metadata
        every = {n: m for n, m in found.items() if isinstance(m, TensorStorageMetadata)}
        inner = {n.removeprefix("model."): m for n, m in every.items() if n.startswith("model.")}
        self.prefix = "model." if inner else ""  # beside an optimizer, as in torch's tutorials
        self.known = inner or every

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(m.size) for name, m in self.known.items()}

    def tensor(self, name: str) -> Tensor:
        about = self.known[name]
        made = torch.empty(about.size, dtype=about.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # "not initialized": that is meant
            load({self.prefix + name: made}, checkpoint_id=self.path, no_dist=True)
        return made
