"""A model as a checkpoint of `torch.distributed.checkpoint`, as FSDP's programs read it. It takes long to import."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save  # pyright: ignore[reportUnknownVariableType]


def write(state: Mapping[str, Tensor], folder: Path) -> None:
    """By this process alone, also inside a job.

    Raises:
        OSError: it could not be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # "not initialized": that is meant
            save(dict(state), storage_writer=FileSystemWriter(folder, overwrite=False), no_dist=True)
    except CheckpointException as error:
        raise next(cause for cause, _ in error.failures.values()) from error
