"""Files of weights, whoever wrote them, as names and tensors that are read one at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from shoal.checkpoint.tensors import TensorFile
from shoal.errors import CheckpointError

NESTED = ("state_dict", "model", "model_state_dict", "module")
"""Where programs put the weights among other things."""

TRUST = "trust=True, if you know who wrote it; or convert it to safetensors there"


class Source(Protocol):
    """Weights to read from."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of everything, by name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One of them, whole, on the CPU."""
        ...


class Safetensors:
    """One or several safetensors files.

    Args:
        files: in which each name lies.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files, self.opened = files, dict[Path, TensorFile]()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self._file(name).about(name)[0] for name in self.files}

    def tensor(self, name: str) -> Tensor:
        return self._file(name).whole(name)

    def _file(self, name: str) -> TensorFile:
        path = self.files[name]
        if path not in self.opened:
            self.opened[path] = TensorFile(path)
        return self.opened[path]


class Loaded:
    """Tensors that lie in mapped files.

    Args:
        tensors: by name, each made when it is asked for.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


# ---------------------------------------------------------------- files


def safetensors(path: Path) -> Safetensors:
    """One file of them."""
    return Safetensors(dict.fromkeys(TensorFile(path).keys(), path))


def indexed(index: Path, trust: bool) -> Source:
    """The files that a Hugging Face index names."""
    try:
        found = cast("dict[str, str]", json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{index} is no index of weights: {type(error).__name__}: {error}") from error
    files = {name: index.parent / file for name, file in found.items()}
    outside = [file for file in found.values() if Path(file).name != file]
    if outside:
        raise CheckpointError(f"{index} names a file outside of its directory: {outside[0]}")
    if all(path.suffix == ".safetensors" for path in files.values()):
        return Safetensors(files)
    parts = {path: pickled(path, trust).tensors for path in set(files.values())}
    return Loaded({name: parts[path][name] for name, path in files.items()})


def pickled(path: Path, trust: bool) -> Loaded:
    """A file of `torch.save` that holds a state dict, perhaps among other things."""
    held = load_pickle(path, trust)
    known = _entries(held)
    for state in (known, *(known.get(place) for place in NESTED)):
        inside = _entries(state)
        tensors = {str(k): v for k, v in inside.items() if isinstance(v, Tensor)}
        if tensors and (state is not known or len(tensors) == len(known)):
            return Loaded(tensors)
    raise CheckpointError(
        f"{path} holds no state dict: it is a {type(held).__name__}"
        + (f" of {', '.join(map(str, list(known)[:6]))}" if known else ""),
        remedy=f"save model.state_dict(), or a dict that has it under one of {', '.join(NESTED)}",
    )


def _entries(value: object) -> Mapping[object, object]:
    return cast("Mapping[object, object]", value) if isinstance(value, Mapping) else {}


def load_pickle(path: Path, trust: bool, module: object = pickle) -> object:
    """What `torch.save` has written; only tensors and plain values unless it is trusted.

    Raises:
        CheckpointError: it is not there, or more than weights.
    """
    read: Callable[..., object] = torch.load
    try:
        if trust:
            return read(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=module)
        return read(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds pickled objects besides weights",
            cause="reading those would run code that the file names",
            remedy=TRUST,
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
