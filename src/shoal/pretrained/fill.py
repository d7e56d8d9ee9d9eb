"""From a source to a model in shards: names compared first, then each rank reads what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from shoal.checkpoint import Share
from shoal.checkpoint.read import some
from shoal.checkpoint.together import Report, together
from shoal.engine.binding import Binding
from shoal.engine.units import aliases
from shoal.errors import CheckpointError, ResumeError
from shoal.pretrained.find import find
from shoal.pretrained.sources import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """What was filled in.

    Attributes:
        loaded: names of the model that got values.
        missing: names of the model that the file does not have; they keep their values.
        extra: names of the file that the model does not have.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    def __str__(self) -> str:
        told = f"{len(self.loaded)} tensors loaded"
        told += f"; missing: {some(self.missing)}" if self.missing else ""
        return told + (f"; extra: {some(self.extra)}" if self.extra else "")


def load_pretrained(
    binding: Binding, path: Path, share: Share, *, strict: bool, trust: bool, rename: Callable[[str], str]
) -> Pretrained:
    """See `Job.load_pretrained`."""
    opened: list[tuple[Source, Mapping[str, str], Pretrained]] = []

    def open_and_compare() -> str:
        source = find(path, trust)
        opened.append((source, *_compare(binding.model, path, source.shapes(), strict, rename)))
        return hashlib.sha256(json.dumps(sorted(opened[0][1].items())).encode()).hexdigest()

    seen = together(open_and_compare, share, _error)
    if len(set(seen)) > 1:
        raise CheckpointError(f"{path} holds other names on rank 0 than on other ranks", remedy="the same files on all")
    source, places, report = opened[0]
    together(lambda: _read(binding, source, places), share, _error)
    for unit in binding.engine.units:
        unit.after_load()
    for average in binding.averages:
        average.restart()
    return report


def _error(report: Report) -> CheckpointError:
    kind = ResumeError if report.code == ResumeError.code else CheckpointError
    return kind(report.what, cause=report.cause, remedy=report.remedy)


def _compare(
    model: nn.Module, path: Path, there: Mapping[str, tuple[int, ...]], strict: bool, rename: Callable[[str], str]
) -> tuple[Mapping[str, str], Pretrained]:
    """Where each of the model's names lies. Nothing has been changed when this raises."""
    here = _wanted(model)
    tied = aliases(model)
    named = {rename(name): name for name in there}
    others = {name: [name, *(a for a, n in tied.items() if n == name)] for name in here}
    found = {name: next((a for a in others[name] if a in named), None) for name in here}
    places = {name: named[at] for name, at in found.items() if at is not None}
    missing = tuple(n for n in here if n not in places)
    extra = tuple(old for new, old in named.items() if new not in here and new not in tied)
    shapes = [f"{n} ({there[at]} there, {here[n]} here)" for n, at in places.items() if there[at] != here[n]]
    report = Pretrained(loaded=tuple(places), missing=missing, extra=extra)
    if shapes or (strict and (missing or extra)) or not places:
        told = {"missing": missing, "extra": extra, "of another shape": tuple(shapes)}
        raise ResumeError(
            f"the weights in {path} are not those of this {type(model).__name__}: "
            + "; ".join(f"{word}: {some(names)}" for word, names in told.items() if names),
            cause="another model, or names with a prefix",
            remedy="strict=False takes what fits by name; rename=lambda name: ... changes the file's names",
        )
    return places, report


def _wanted(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters and persistent buffers, tied ones under their first name."""
    tied = aliases(model)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for prefix, module in cast("Iterable[tuple[str, nn.Module]]", model.named_modules()):
        skipped = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if name not in skipped and full not in tied:
                wanted[full] = tuple(buffer.shape)
    return wanted


@torch.no_grad()
def _read(binding: Binding, source: Source, places: Mapping[str, str]) -> None:
    """One tensor at a time, and only those of which this rank holds a part."""
    for unit in binding.engine.units:
        for part in unit.layout.pieces(unit.shard.rank):
            if part.name in places:
                lying = unit.as_it_lies(part.name, source.tensor(places[part.name]))
                unit.pieces[part.name].view(-1).copy_(_elements(lying, part.start, part.stop))
    for name, buffer in binding.model.named_buffers():
        if name in places:
            buffer.copy_(source.tensor(places[name]))


def _elements(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor.reshape(-1)[start:stop]
