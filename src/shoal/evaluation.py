"""`job.evaluate`: every sample once, with the same bits at every world size.

Batches are counted out to ranks by their number. What is measured of a batch depends on the batch alone; it is joined
along the tree over batch numbers, whoever measured it. A rank that has run out of batches takes part in gathering
what others still need.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from shoal.collectives import agree
from shoal.comm.meet import Meeting, Want
from shoal.data.feed import LeafFeed
from shoal.data.loader import Loader, SeededBatch, remake, steps_of_loader
from shoal.data.stream import StreamLoader, read_through
from shoal.engine.precision import each_tensor
from shoal.errors import BatchError, DivergedError, SettingError
from shoal.leaves import Node, Tree
from shoal.metrics import Metric, State, metric_of
from shoal.predictions import samples_of
from shoal.random import everything, mix

Predict = Callable[[nn.Module, object], tuple[object, object]]
"""`predict(model, batch)` gives outputs and targets."""

Metrics = Sequence[str] | Mapping[str, object]
"""Names of shoal's own; or by name a name, a loss function, or an object that measures."""

_SAMPLES = ""  # the metric that counts them


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What was measured. `found["loss"]` is a number; `values` has everything as the metrics gave it.

    Attributes:
        values: by the names of the metrics.
        samples, batches: how many there were, each counted once.
    """

    values: Mapping[str, object]
    samples: int
    batches: int

    def __getitem__(self, name: str) -> float:
        value = self.values[name]
        if isinstance(value, Tensor) and value.numel() == 1:
            value = cast(float, value.item())
        if not isinstance(value, int | float):
            raise SettingError(
                f"{name!r} is no single number but a {type(value).__name__}", remedy=f"found.values[{name!r}]"
            )
        return float(value)

    def __str__(self) -> str:
        told = "  ".join(f"{name} {_brief(value)}" for name, value in self.values.items())
        return f"{told}  ({self.samples} samples)"


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        value = cast(object, value.tolist())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def evaluate(
    model: nn.Module, loader: Iterable[object], metrics: Metrics, predict: Predict | None, feed: LeafFeed,
    meeting: Meeting, device: torch.device,
) -> Evaluation:  # fmt: skip
    """See `Job.evaluate`."""
    measured = _Measured(metrics)
    dealt = _deal(loader, feed)
    count = "uncounted" if dealt.known is None else str(dealt.known)
    names = ", ".join(n for n in measured.metrics if n)
    agree(meeting, Want.EVALUATE, f"job.evaluate of {type(model).__name__}: {names}; {count} batches")
    loop = feed.begin()
    found: list[tuple[int, States]] = []
    tree = Tree(dealt.known, measured.join) if dealt.known else None
    try:
        with _evaluating(model):
            for number, batch in dealt.batches:
                meeting.world.carrier.note(f"evaluates batch {number}")
                everything(mix("evaluate", feed.seed, number))
                outputs, targets = (predict or by_position)(model, _moved(batch, device))
                states = measured.of_batch(outputs, targets)
                if tree is not None:
                    tree.put_leaf(number, states)
                else:
                    found.append((number, states))
    finally:
        feed.end(loop)
    nodes = [(Node(0, n), s) for n, s in found] if tree is None else list(tree.nodes.items())
    total = dealt.total()
    _same_count(meeting, total)
    mine = nodes if feed.mesh.tensor.rank == 0 else []  # ranks of one cell have measured the same
    result = measured.result(meeting.world.share_any("evaluate", _pack(mine)), total)
    feed.measured(result.values)
    return result


def by_position(model: nn.Module, batch: object) -> tuple[object, object]:
    """The default `predict`: the last of a batch is the target; of a dict, as in transformers, its "labels"."""
    if isinstance(batch, tuple | list) and len(cast("Sequence[object]", batch)) > 1:
        *inputs, targets = cast("Sequence[object]", batch)
        return cast(object, model(*inputs)), targets
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs = {k: v for k, v in cast("Mapping[str, object]", batch).items() if k != "labels"}
        outputs = cast(object, model(**inputs))
        return cast(object, getattr(outputs, "logits", outputs)), cast(object, batch["labels"])
    kind = type(cast(object, batch)).__name__
    raise BatchError(
        f"job.evaluate: it is not plain what is input and what is target in a batch that is a {kind}",
        cause='expected: (input, ..., target), or a dict with "labels"',
        remedy="predict=lambda model, batch: (outputs, targets)",
    )


# ---------------------------------------------------------------- what is measured

States = dict[str, State]


class _Measured:
    """All metrics of an evaluation as one.

    Raises:
        SettingError: one of them measures nothing.
    """

    def __init__(self, metrics: Metrics) -> None:
        given = metrics if isinstance(metrics, Mapping) else {name: name for name in metrics}
        if isinstance(metrics, str) or not given:
            raise SettingError(f"job.evaluate: metrics={metrics!r}", remedy='metrics=["accuracy"], a list or a dict')
        self.metrics: dict[str, Metric] = {name: metric_of(name, m) for name, m in given.items()}

    def of_batch(self, outputs: object, targets: object) -> States:
        states = {name: metric.of_batch(outputs, targets) for name, metric in self.metrics.items()}
        return states | {_SAMPLES: (torch.tensor(samples_of(targets)),)}

    def join(self, left: States, right: States) -> States:
        joined = {name: metric.join(left[name], right[name]) for name, metric in self.metrics.items()}
        return joined | {_SAMPLES: (left[_SAMPLES][0] + right[_SAMPLES][0],)}

    def result(self, packed: Sequence[bytes], count: int) -> Evaluation:
        tree = Tree(count, self.join)
        for data in packed:
            for node, states in _unpack(data, [*self.metrics, _SAMPLES]):
                tree.put(node, states)
        total = tree.take()
        values = {name: metric.result(total[name]) for name, metric in self.metrics.items()}
        return Evaluation(values=values, samples=int(total[_SAMPLES][0]), batches=count)


def _pack(nodes: Iterable[tuple[Node, States]]) -> bytes:
    """States as safetensors."""
    named = {
        json.dumps([*node, name, i]): tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for node, states in nodes
        for name, state in states.items()
        for i, tensor in enumerate(state)
    }
    return save(named)


def _unpack(data: bytes, names: Iterable[str]) -> Iterator[tuple[Node, States]]:
    found: dict[Node, dict[str, dict[int, Tensor]]] = {}
    for key, tensor in load(data).items():
        level, place, name, i = cast("tuple[int, int, str, int]", json.loads(key))
        found.setdefault(Node(level, place), {}).setdefault(name, {})[i] = tensor
    for node, states in found.items():
        yield node, {name: tuple(t for _, t in sorted(states.get(name, {}).items())) for name in names}


# ---------------------------------------------------------------- who measures which batch


class _Dealt(NamedTuple):
    """This rank's batches by number. `known`: how many all ranks have, if it is known before; `total()`: afterwards."""

    batches: Iterator[tuple[int, object]]
    known: int | None
    total: Callable[[], int]


def _deal(loader: Iterable[object], feed: LeafFeed) -> _Dealt:
    """Neighbouring batches to one rank where they can be counted; else each rank reads all and takes every n-th."""
    cell, cells = feed.cell, feed.mesh.cells
    if isinstance(loader, StreamLoader):
        loader = loader.source
    counted = _counted(loader, feed)
    if counted is not None:
        source, batches = counted
        first, last = len(batches) * cell // cells, len(batches) * (cell + 1) // cells
        mine = [SeededBatch(batches[n], mix("evaluate", feed.seed, n)) for n in range(first, last)]
        return _Dealt(zip(range(first, last), remake(source, mine), strict=True), len(batches), lambda: len(batches))
    if isinstance(loader, DataLoader) and isinstance(cast("DataLoader[object]", loader).dataset, IterableDataset):
        read: Iterable[object] = read_through(cast("DataLoader[object]", loader), mix("evaluate", feed.seed))
    else:
        read = cast("Iterable[object]", loader)
    seen = [0]

    def stream() -> Iterator[tuple[int, object]]:
        everything(mix("evaluate", feed.seed))  # an order that is drawn is drawn alike on all ranks
        for number, batch in enumerate(read):
            seen[0] = number + 1
            if number % cells == cell:
                yield number, batch

    return _Dealt(stream(), None, lambda: seen[0])


def _counted(loader: Iterable[object], feed: LeafFeed) -> tuple[DataLoader[object], list[Sequence[int]]] | None:
    """Which samples make which batch, in epoch 0."""
    if isinstance(loader, Loader):
        source, steps = loader.source, loader.steps
    elif isinstance(loader, DataLoader) and not _streams(cast("DataLoader[object]", loader)):
        source = cast("DataLoader[object]", loader)
        steps = steps_of_loader(source, feed.seed, lambda _text: None)
    else:
        return None
    return source, [batch.indices for leaves in steps(0, feed.leaves) for batch in leaves if batch.indices]


def _streams(loader: DataLoader[object]) -> bool:
    """Can its batches not be counted out before they are read?"""
    return loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset)


def _same_count(meeting: Meeting, total: int) -> None:
    counts = [int.from_bytes(d, "little") for d in meeting.meet(Want.EVALUATE, 1, total.to_bytes(8, "little"))]
    if len(set(counts)) > 1:
        raise DivergedError(
            "job.evaluate: " + ", ".join(f"rank {r} read {n} batches" for r, n in enumerate(counts)),
            cause="every rank has to read the same ones; it then takes its share",
            remedy="take what divides the data by ranks out of the data set, or pass a DataLoader of a map-style one",
        )
    if not total:
        raise BatchError("job.evaluate: the loader has no batches", remedy="data, or drop_last=False")


# ---------------------------------------------------------------- the model meanwhile


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """In eval mode, without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in cast("Iterable[nn.Module]", model.modules())]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _moved(batch: object, device: torch.device) -> object:
    return each_tensor(batch, lambda t: t.to(device))
