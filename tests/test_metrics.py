"""What `job.evaluate` measures, against scikit-learn and torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sklearn import metrics as sklearn
from torch import Tensor, nn

from shoal.errors import SettingError
from shoal.metrics import AUC, F1, Accuracy, Loss, Metric, Perplexity, Precision, Recall, metric_of


def data(classes: int, count: int = 60) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(classes)
    outputs = torch.randn(count, classes, generator=g).mul(2).round()  # with ties
    return outputs, torch.randint(classes, (count,), generator=g)


def in_batches(metric: Metric, outputs: Tensor, targets: Tensor, size: int = 7) -> object:
    state = None
    for o, t in zip(outputs.split(size), targets.split(size), strict=True):
        new = metric.of_batch(o, t)
        state = new if state is None else metric.join(state, new)
    assert state is not None
    return metric.result(state)


SCORES: dict[type, Callable[..., float]] = {
    Precision: sklearn.precision_score, Recall: sklearn.recall_score, F1: sklearn.f1_score,
}  # fmt: skip


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("average", ["binary", "macro", "micro", "none"])
@pytest.mark.parametrize("kind", SCORES)
def test_scores_by_class(kind: type, average: str, classes: int) -> None:
    outputs, targets = data(classes)
    if average == "binary" and classes > 2:
        average = "auto"
    theirs = {"none": None, "auto": "macro"}.get(average, average)
    want = SCORES[kind](targets, outputs.argmax(-1), average=theirs, zero_division=0)
    assert in_batches(kind(average), outputs, targets) == pytest.approx(want if average != "none" else list(want))


def test_auto_is_binary_with_two_classes() -> None:
    outputs, targets = data(2)
    assert in_batches(F1(), outputs, targets) == in_batches(F1("binary"), outputs, targets)
    single = outputs[:, 1] - outputs[:, 0]
    assert in_batches(F1(), single, targets) == in_batches(F1(), single[:, None], targets)
    assert in_batches(F1(), single, targets) == pytest.approx(sklearn.f1_score(targets, single > 0))
    assert in_batches(F1(threshold=1.0), single, targets) == pytest.approx(sklearn.f1_score(targets, single > 1))


def test_classes_that_never_occur() -> None:
    """They do not count in macro averages, and one that is never predicted has no precision."""
    outputs = torch.eye(4)[[0, 0, 1]]
    assert in_batches(Precision(), outputs, torch.tensor([0, 1, 2])) == pytest.approx((0.5 + 0 + 0) / 3)
    assert in_batches(Precision("binary"), torch.eye(1)[[0]], torch.tensor([0])) == 0.0


def test_accuracy() -> None:
    outputs, targets = data(5)
    assert in_batches(Accuracy(), outputs, targets) == (outputs.argmax(-1) == targets).double().mean()
    distinct = outputs + torch.arange(5) * 1e-3
    want = sklearn.top_k_accuracy_score(targets, distinct, k=2)
    assert in_batches(Accuracy(top=2), distinct, targets) == pytest.approx(want)
    assert in_batches(Accuracy(top=9), distinct, targets) == 1.0


def test_ignored_targets() -> None:
    outputs, targets = data(5)
    kept = targets != 3
    ignoring = torch.where(kept, targets, -100)
    for make in (Accuracy, F1, Perplexity, lambda: Accuracy(top=2)):
        want = in_batches(make(), outputs[kept], targets[kept])
        assert in_batches(make(), outputs, ignoring) == pytest.approx(want, rel=1e-6)
    assert in_batches(F1(ignore=3), outputs, targets) == in_batches(F1(), outputs, ignoring)


@pytest.mark.parametrize("classes_at", [1, 2])
def test_tokens(classes_at: int) -> None:
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 4, 5, generator=g), torch.randint(5, (6, 4), generator=g)
    want = nn.functional.cross_entropy(logits.movedim(-1, 1).double(), targets).exp().item()
    given = logits if classes_at == 2 else logits.movedim(-1, 1)
    assert in_batches(Perplexity(), given, targets) == pytest.approx(want, rel=1e-6)
    assert in_batches(Accuracy(), given, targets) == (logits.argmax(-1) == targets).double().mean()


def test_auc() -> None:
    for classes in (2, 4):
        outputs, targets = data(classes)
        scores = outputs.double().softmax(-1)
        theirs = scores[:, 1] if classes == 2 else scores
        want = sklearn.roc_auc_score(targets, theirs, multi_class="ovr")
        assert in_batches(AUC(), outputs, targets) == pytest.approx(want, rel=1e-12)
    single = data(2)[0][:, 0]
    targets = data(2)[1]
    assert in_batches(AUC(), single, targets) == pytest.approx(sklearn.roc_auc_score(targets, single), rel=1e-15)
    assert math.isnan(in_batches(AUC(), single, torch.zeros(60, dtype=torch.long)))
    assert math.isnan(in_batches(AUC(), single * math.nan, targets))


def test_loss_is_the_mean_over_samples() -> None:
    """Also with a last batch that is short."""
    outputs, targets = data(5)
    want = nn.functional.cross_entropy(outputs.double(), targets).item()
    assert in_batches(Loss(nn.CrossEntropyLoss()), outputs, targets) == pytest.approx(want, rel=1e-6)
    by_count = Loss(nn.functional.cross_entropy, count=lambda _o, t: int((t > 0).sum()))
    assert in_batches(by_count, outputs[:3], torch.tensor([0, 1, 2])) == pytest.approx(
        nn.functional.cross_entropy(outputs[:3], torch.tensor([0, 1, 2])).item()
    )


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("acuracy", "acuracy", r"no metric is called 'acuracy'[\s\S]*accuracy, precision"),
        ("mine", 3, r"'mine' is a int, which measures nothing[\s\S]*update\(outputs, targets\)"),
        ("f1", F1, r"'f1' is a \w+, which measures nothing \(the class F1 itself\)"),
    ],
)
def test_what_measures_nothing(name: str, given: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        metric_of(name, given)


def test_what_does_not_fit() -> None:
    with pytest.raises(SettingError, match=r"F1\(average='weighted'\)[\s\S]*one of auto, binary"):
        F1("weighted")
    with pytest.raises(SettingError, match=r"accuracy: outputs of shape \(3, 4\) do not fit targets of shape \(2,\)"):
        Accuracy().of_batch(torch.zeros(3, 4), torch.zeros(2))
    with pytest.raises(SettingError, match=r"AUC: needs tensors, and was given outputs of list and targets of Tensor"):
        AUC().of_batch([1], torch.zeros(1))
