"""Checkpoints of DeepSpeed's ZeRO: universal ones, and the folders that stages 1 to 3 write.

The latter hold float32 masters in flat partitions, one file per rank, and objects of DeepSpeed beside them: they are
pickles and have to be trusted. Layout as in DeepSpeed's own `zero_to_fp32.py`.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.pretrained.sources import TRUST, load_pickle

OPTIMIZER = "*_optim_states.pt"


class Universal:
    """A universal checkpoint: a directory per parameter.

    Args:
        path: the directory `zero`.
    """

    def __init__(self, path: Path, trust: bool) -> None:
        self.files = {file.parent.name: file for file in sorted(path.glob("*/fp32.pt"))}
        self.trust = trust

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(self.tensor(name).shape) for name in self.files}

    def tensor(self, name: str) -> Tensor:
        held = load_pickle(self.files[name], self.trust)
        found = cast("Mapping[str, object]", held).get("param") if isinstance(held, Mapping) else held
        if not isinstance(found, Tensor):
            raise CheckpointError(f"{self.files[name]} holds no parameter")
        return found


class Sharded:
    """The folder of one step, from stages 1 to 3.

    Args:
        path: the folder with `*_optim_states.pt`.

    Raises:
        CheckpointError: it was not trusted, or files are missing.
    """

    def __init__(self, path: Path, trust: bool) -> None:
        if not trust:
            raise CheckpointError(
                f"{path} is a ZeRO checkpoint of DeepSpeed, whose files are pickles",
                cause="reading them would run code that the files name",
                remedy=TRUST + " (DeepSpeed's ds_to_universal.py)",
            )
        ranks = [_dict(_load(file)["optimizer_state_dict"]) for file in _in_order(path, OPTIMIZER)]
        models = [_load(file) for file in _in_order(path, "*_model_states.pt")]
        count = cast("int | list[int]", ranks[0]["partition_count"])
        world = max(count) if isinstance(count, list) else count
        if world != len(ranks) or not models:
            raise CheckpointError(
                f"{path} holds {len(ranks)} of {world} files {OPTIMIZER} and {len(models)} of the model's",
                cause="an unfinished copy, or a save over an older one of more ranks",
            )
        self.made: dict[str, tuple[tuple[int, ...], list[Tensor]]] = {}
        groups = [cast("Mapping[str, Sequence[int]]", g) for g in cast("Sequence[object]", models[0]["param_shapes"])]
        cut = "fp32_flat_groups" in ranks[0]
        if cut:  # "zero_stage" says it too, by an enum of DeepSpeed's
            self._by_parameter(groups, [cast("Sequence[Tensor]", r["fp32_flat_groups"]) for r in ranks])
        else:
            self._by_group(groups, ranks)
        self._others(models, cut)

    def _by_group(self, groups: Sequence[Mapping[str, Sequence[int]]], ranks: Sequence[Mapping[str, object]]) -> None:
        """Stages 1 and 2: a group is one flat vector, cut into equal parts."""
        paddings = cast("Sequence[Sequence[int]] | None", ranks[0].get("param_alignment_paddings"))
        for number, shapes in enumerate(groups):
            parts = [cast("Sequence[Tensor]", r["single_partition_of_fp32_groups"])[number] for r in ranks]
            at = 0
            for index, (name, shape) in enumerate(shapes.items()):
                numel = math.prod(shape)
                self.made[name] = (tuple(shape), _span(parts, at, at + numel))
                at += numel + (paddings[number][index] if paddings is not None else 0)

    def _by_parameter(
        self, groups: Sequence[Mapping[str, Sequence[int]]], ranks: Sequence[Sequence[Tensor]]
    ) -> None:  # fmt: skip
        """Stage 3: every parameter is cut into equal parts, the last ones padded."""
        at = 0
        for name, shape in (item for shapes in groups for item in shapes.items()):
            each = -(-math.prod(shape) // len(ranks))
            self.made[name] = (tuple(shape), [p for rank in ranks for p in _span(rank, at, at + each)])
            at += each

    def _others(self, models: Sequence[Mapping[str, object]], cut: bool) -> None:
        """Buffers, frozen parameters, and tied ones under their other names."""
        first = models[0]
        module = cast("Mapping[str, Tensor]", first["module"])
        for name in cast("Sequence[str]", first.get("buffer_names", ())):
            if name in module:
                self.made[name] = (tuple(module[name].shape), [module[name].reshape(-1)])
        frozen = cast("Mapping[str, Sequence[int]]", first.get("frozen_param_shapes") or {})
        for name, shape in frozen.items():
            parts = [cast("Mapping[str, Tensor]", m["frozen_param_fragments"])[name].reshape(-1) for m in models]
            whole = parts[0].numel() >= math.prod(shape)  # stages 1 and 2 do not cut them
            self.made[name] = (tuple(shape), parts[:1] if whole else parts)
        for name, kept in cast("Mapping[str, str]", first.get("shared_params") or {}).items():
            if kept in self.made:
                self.made[name] = self.made[kept]
        if not cut and not frozen:  # stage 1 says nothing of frozen parameters: they lie among the whole ones
            rest = {name: value for name, value in module.items() if name not in self.made}
            self.made |= {name: (tuple(value.shape), [value.reshape(-1)]) for name, value in rest.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self.made.items()}

    def tensor(self, name: str) -> Tensor:
        shape, parts = self.made[name]
        return torch.cat([part.reshape(-1) for part in parts])[: math.prod(shape)].view(shape)


def _span(parts: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Elements of a vector that lies in parts."""
    found: list[Tensor] = []
    at = 0
    for part in parts:
        first, last = max(start, at), min(stop, at + part.numel())
        if first < last:
            found.append(part[first - at : last - at])
        at += part.numel()
    return found or [torch.empty(0)]


def _in_order(path: Path, pattern: str) -> list[Path]:
    """By the numbers in their names: rank 10 comes after rank 9."""
    return sorted(path.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def _load(path: Path) -> Mapping[str, object]:
    return _dict(load_pickle(path, True, _Pickle))


def _dict(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


class _Absent:
    """Stands for an object of a package that is not here."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> object:
        if module_name.partition(".")[0] == "deepspeed":
            return _Absent
        return super().find_class(module_name, global_name)


class _Pickle:
    """What torch.load wants of a pickle module."""

    Unpickler = _Unpickler
    load, loads = staticmethod(pickle.load), staticmethod(pickle.loads)
    UnpicklingError = pickle.UnpicklingError
