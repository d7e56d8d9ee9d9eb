"""What a model's outputs say of targets: classes, or scores of classes, in whatever shapes are usual."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shoal.errors import SettingError


class Said(NamedTuple):
    """Classes, as whole numbers below `classes`, without those to ignore."""

    predicted: Tensor
    wanted: Tensor
    classes: int


def predictions(what: str, outputs: object, targets: object, threshold: float, ignore: int) -> Said:
    """The highest class; of a single output, whether it is above the threshold.

    Raises:
        SettingError: no tensors, or shapes that do not fit; it names `what` was to be measured.
    """
    logits, wanted = tensors(what, outputs, targets)
    if logits.dim() == wanted.dim() + 1 and logits.shape[-1] == 1:
        logits = logits.squeeze(-1)
    if logits.shape == wanted.shape:
        said, classes = (logits > threshold if logits.is_floating_point() else logits).long(), 2
    else:
        logits, wanted = classes_last(what, logits, wanted)
        said, classes = logits.argmax(-1), logits.shape[-1]
    said, wanted = said.reshape(-1).cpu(), wanted.reshape(-1).long().cpu()
    kept = wanted != ignore
    return Said(said[kept], wanted[kept], classes)


def classes_last(what: str, outputs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Outputs as (targets, classes), targets as one row."""
    logits, wanted = tensors(what, outputs, targets)
    if logits.dim() == wanted.dim() + 1:
        if logits.shape[:-1] == wanted.shape:
            return logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1)
        if logits.shape[:1] + logits.shape[2:] == wanted.shape:
            return logits.movedim(1, -1).reshape(-1, logits.shape[1]), wanted.reshape(-1)
    raise SettingError(
        f"{what}: outputs of shape {tuple(logits.shape)} do not fit targets of shape {tuple(wanted.shape)}",
        cause="a class for every target is expected last, or in dimension 1",
        remedy="predict=lambda model, batch: (outputs, targets), with shapes that fit",
    )


def tensors(what: str, outputs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Both, without their graph."""
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        return outputs.detach(), targets.detach()
    raise SettingError(
        f"{what}: needs tensors, and was given outputs of {type(outputs).__name__} and targets of "
        f"{type(targets).__name__}",
        remedy="predict=lambda model, batch: (outputs, targets)",
    )


def samples_of(targets: object) -> int:
    """How many samples these are the targets of."""
    return len(targets) if isinstance(targets, Tensor) and targets.dim() else 1
