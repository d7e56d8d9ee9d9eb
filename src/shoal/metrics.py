"""What `job.evaluate` measures.

A metric makes a state of every batch alone; states are joined along a fixed tree over batches, whoever made them, and
the result comes of the last one. Counts are whole numbers and sums float64, so that results have the same bits at every
world size. Metrics with `update`, `compute` and `reset`, such as torchmetrics', are handed all batches in their order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from shoal.errors import SettingError
from shoal.predictions import Said, classes_last, predictions, samples_of, tensors

State = tuple[Tensor, ...]
"""Of some batches, on the CPU."""

IGNORED = -100
"""Targets of this value do not count, as in torch's cross entropy."""


@runtime_checkable
class Metric(Protocol):
    """States of batches, how two neighbours are joined, and what comes of all."""

    def of_batch(self, outputs: object, targets: object) -> State:
        """The state of one batch."""
        ...

    def join(self, left: State, right: State) -> State:
        """The state of some batches and of those that come after them."""
        ...

    def result(self, state: State) -> object:
        """What is measured."""
        ...


@runtime_checkable
class Updated(Protocol):
    """A metric that keeps its state to itself, as torchmetrics' do."""

    def update(self, outputs: Tensor, targets: Tensor, /) -> None: ...
    def compute(self) -> object: ...
    def reset(self) -> None: ...


Average = Callable[[Tensor, Tensor], Tensor]
"""`loss(outputs, targets)`: the mean over a batch."""


# ---------------------------------------------------------------- sums


class _Sums:
    """States that are added."""

    def join(self, left: State, right: State) -> State:
        return tuple(_add(a, b) for a, b in zip(left, right, strict=True))


def _add(a: Tensor, b: Tensor) -> Tensor:
    """A batch that knows of fewer classes has none of the others."""
    if a.dim() and len(a) != len(b):
        most = max(len(a), len(b))
        a, b = (nn.functional.pad(t, (0, most - len(t))) for t in (a, b))
    return a + b


def _ratio(total: Tensor, count: Tensor) -> float:
    return total.item() / count.item() if count else float("nan")


class Loss(_Sums):
    """The mean of a loss over samples.

    Args:
        function: `function(outputs, targets)` gives the mean over a batch.
        count: how many things that is a mean of; default: the samples, `len(targets)`.
    """

    def __init__(
        self, function: Callable[..., Tensor], *, count: Callable[[object, object], int] | None = None
    ) -> None:  # fmt: skip
        self.function, self.count = function, count

    def of_batch(self, outputs: object, targets: object) -> State:
        number = samples_of(targets) if self.count is None else self.count(outputs, targets)
        value = self.function(outputs, targets).detach().double().cpu()
        return value * number, torch.tensor(number)

    def result(self, state: State) -> float:
        return _ratio(*state)


class Perplexity(_Sums):
    """exp of the mean cross entropy over targets. Outputs are logits, with the classes last or in dimension 1.

    Args:
        ignore: targets of this value do not count.
    """

    def __init__(self, *, ignore: int = IGNORED) -> None:
        self.ignore = ignore

    def of_batch(self, outputs: object, targets: object) -> State:
        logits, wanted = classes_last("perplexity", outputs, targets)
        kept = wanted != self.ignore
        losses = nn.functional.cross_entropy(logits[kept].float(), wanted[kept], reduction="none")
        return losses.double().sum().cpu(), kept.sum().cpu()

    def result(self, state: State) -> float:
        return torch.tensor(_ratio(*state), dtype=torch.float64).exp().item()


class Accuracy(_Sums):
    """The share of targets that are predicted.

    Args:
        top: a target counts as predicted if it is among so many of the highest outputs.
        threshold: above it a single output says yes; 0 for logits, 0.5 for probabilities.
        ignore: targets of this value do not count.
    """

    def __init__(self, *, top: int = 1, threshold: float = 0.0, ignore: int = IGNORED) -> None:
        self.top, self.threshold, self.ignore = top, threshold, ignore

    def of_batch(self, outputs: object, targets: object) -> State:
        if self.top == 1:
            said = predictions("accuracy", outputs, targets, self.threshold, self.ignore)
            right = (said.predicted == said.wanted).sum()
        else:
            logits, wanted = classes_last("accuracy", outputs, targets)
            kept = wanted != self.ignore
            highest = logits[kept].topk(min(self.top, logits.shape[-1])).indices
            said = Said(highest, wanted[kept], logits.shape[-1])
            right = (highest == said.wanted[:, None]).sum()
        return right.cpu(), torch.tensor(said.wanted.numel())

    def result(self, state: State) -> float:
        return _ratio(*state)


# ---------------------------------------------------------------- by class

AVERAGES = ("auto", "binary", "macro", "micro", "none")


class _ByClass(_Sums, ABC):
    """Per class: how often it was rightly predicted, was predicted, and was wanted.

    Args:
        average: over classes. "binary": class 1 alone; "macro": the mean over classes that were predicted or wanted;
            "micro": of all counts together; "none": a list; "auto": binary with two classes, else macro.
        threshold, ignore: as in `Accuracy`.
    """

    def __init__(self, average: str = "auto", *, threshold: float = 0.0, ignore: int = IGNORED) -> None:
        if average not in AVERAGES:
            raise SettingError(f"{type(self).__name__}(average={average!r})", remedy=f"one of {', '.join(AVERAGES)}")
        self.average, self.threshold, self.ignore = average, threshold, ignore

    def of_batch(self, outputs: object, targets: object) -> State:
        said = predictions(type(self).__name__.lower(), outputs, targets, self.threshold, self.ignore)
        right = said.wanted[said.predicted == said.wanted]
        return tuple(torch.bincount(t, minlength=said.classes) for t in (right, said.predicted, said.wanted))

    @abstractmethod
    def score(self, right: Tensor, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Per class, in float64."""

    def result(self, state: State) -> float | list[float]:
        average = self.average
        if average == "auto":
            average = "binary" if len(state[0]) <= 2 else "macro"
        if average == "micro":
            return self.score(*(t.sum() for t in state)).item()
        scores = self.score(*state)
        if average == "none":
            return cast("list[float]", scores.tolist())
        if average == "binary":
            return scores[1].item() if len(scores) > 1 else 0.0
        _, predicted, wanted = state
        seen = scores[(predicted + wanted) > 0]
        return (seen.sum() / len(seen)).item()


class Precision(_ByClass):
    """Of what was predicted, the share that was right; 0 where nothing was predicted. Arguments as for `F1`."""

    def score(self, right: Tensor, predicted: Tensor, wanted: Tensor) -> Tensor:
        return right.double() / predicted.clamp(min=1)


class Recall(_ByClass):
    """Of what was wanted, the share that was predicted; 0 where nothing was wanted. Arguments as for `F1`."""

    def score(self, right: Tensor, predicted: Tensor, wanted: Tensor) -> Tensor:
        return right.double() / wanted.clamp(min=1)


class F1(_ByClass):
    """The harmonic mean of precision and recall; 0 where nothing was right.

    Args:
        average: over classes. "binary": class 1 alone; "macro": the mean over classes that were predicted or wanted;
            "micro": of all counts together; "none": a list; "auto": binary with two classes, else macro.
        threshold, ignore: as in `Accuracy`.
    """

    def score(self, right: Tensor, predicted: Tensor, wanted: Tensor) -> Tensor:
        return 2 * right.double() / (predicted + wanted).clamp(min=1)


class AUC:
    """The area under the ROC curve, exact: the chance that a sample of a class scores higher than one of another.

    Ties count half. One output per sample, or two classes; with more the mean over classes, each against the rest, of
    softmax scores. All scores travel to all ranks.
    """

    def of_batch(self, outputs: object, targets: object) -> State:
        scores, wanted = tensors("AUC", outputs, targets)
        if scores.dim() == wanted.dim() + 1:
            scores, wanted = classes_last("AUC", scores, wanted)
            if scores.shape[-1] > 2:
                scores = scores.double().softmax(-1)
            elif scores.shape[-1] == 2:
                scores = scores[:, 1:].double() - scores[:, :1].double()
        else:
            scores = scores.reshape(-1, 1)
        return scores.double().cpu(), wanted.reshape(-1).long().cpu()

    def join(self, left: State, right: State) -> State:
        return tuple(torch.cat([a, b]) for a, b in zip(left, right, strict=True))

    def result(self, state: State) -> float:
        scores, wanted = state
        if scores.shape[1] == 1:
            return _area(scores[:, 0], wanted == 1)
        areas = [_area(scores[:, c], wanted == c) for c in range(scores.shape[1]) if (wanted == c).any()]
        return sum(areas) / len(areas)


def _area(scores: Tensor, positive: Tensor) -> float:
    """Of all pairs of a positive and a negative, those in order. In whole numbers; NaN if there are no pairs."""
    if scores.isnan().any():
        return float("nan")
    values, place = cast("tuple[Tensor, Tensor]", scores.unique(return_inverse=True))
    ups = torch.bincount(place[positive], minlength=len(values))
    downs = torch.bincount(place[~positive], minlength=len(values))
    below = downs.cumsum(0) - downs
    pairs = int(ups.sum()) * int(downs.sum())
    return int((ups * (2 * below + downs)).sum()) / (2 * pairs) if pairs else float("nan")


# ---------------------------------------------------------------- of others


class Replayed:
    """Hands a metric that keeps its state to itself all batches in their order, on every rank.

    Args:
        metric: with `update(outputs, targets)`, `compute()` and `reset()`.
    """

    def __init__(self, metric: Updated) -> None:
        self.metric = metric

    def of_batch(self, outputs: object, targets: object) -> State:
        return tuple(t.detach().cpu() for t in tensors(type(self.metric).__name__, outputs, targets))

    def join(self, left: State, right: State) -> State:
        return left + right

    def result(self, state: State) -> object:
        self.metric.reset()
        for outputs, targets in zip(state[::2], state[1::2], strict=True):
            self.metric.update(outputs, targets)
        found = self.metric.compute()
        self.metric.reset()
        return found


# ---------------------------------------------------------------- by name

NAMED: dict[str, Callable[[], Metric]] = {
    "accuracy": Accuracy, "precision": Precision, "recall": Recall, "f1": F1, "auc": AUC, "perplexity": Perplexity,
}  # fmt: skip


def metric_of(name: str, given: object) -> Metric:
    """What the user means: one of shoal's by name, an object with either protocol, or a loss function.

    Raises:
        SettingError: none of these.
    """
    if isinstance(given, str):
        if given not in NAMED:
            raise SettingError(
                f"job.evaluate: no metric is called {given!r}",
                remedy=f'one of {", ".join(NAMED)}; or {{"{given}": a loss function, or your own metric}}',
            )
        return NAMED[given]()
    if isinstance(given, Metric) and not isinstance(given, type):
        return given
    if isinstance(given, Updated) and not isinstance(given, type):
        return Replayed(given)
    if callable(given) and not isinstance(given, type):
        return Loss(cast("Callable[..., Tensor]", given))
    raise SettingError(
        f"job.evaluate: {name!r} is a {type(given).__name__}, which measures nothing"
        + (f" (the class {given.__name__} itself)" if isinstance(given, type) else ""),
        remedy="a name, a loss function, or an object with update(outputs, targets), compute() and reset()",
    )
