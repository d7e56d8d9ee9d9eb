"""What a job offers besides training: words between ranks, evaluation, and what is told to people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TextIO, TypeVar, cast

from torch import Tensor, nn

from shoal.base import Base
from shoal.collectives import Handle, Number
from shoal.evaluation import Evaluation, Metrics, Predict, evaluate
from shoal.once import Main, once
from shoal.trackers.protocol import Tracker
from shoal.tracking import check_log, facts_of, numbers, share_of_peak

T = TypeVar("T")
V = TypeVar("V", bound=Tensor | Number)


class Verbs(Base):
    """Exchanges, measures and tells."""

    # ---------------------------------------------------------------- between ranks

    def reduce(self, value: V, op: str = "sum") -> V:
        """Combine a tensor or number of every rank; all get the result. Collective.

        Ranks are added along a fixed tree: a world of one size always gives the same bits. Half precision is added in
        float32 and rounded once.

        Args:
            value: of equal shape and dtype on all ranks; it is not changed.
            op: "sum", "mean", "min", "max" or "prod". Of bools "max" says whether any is true and "min" whether all.

        Returns:
            A new tensor like `value`, or a number if it is one.

        Raises:
            DivergedError: ranks pass different things.
            SettingError: an unknown op, or one that the dtype does not have.
        """
        return self.reduce_async(value, op).wait()

    def reduce_async(self, value: V, op: str = "sum") -> Handle[V]:
        """The same, begun: `handle.wait()` gives the result. Every rank has to wait for it in the end."""
        return cast("Handle[V]", self._together.reduce(value, op))

    def gather(self, value: T) -> list[T]:
        """What every rank passes, in the order of ranks, on all ranks. Collective.

        Args:
            value: a tensor of one dtype on all ranks and of any shape on each; or whatever JSON can say.

        Raises:
            DivergedError: ranks pass different dtypes, or tensors on some and other values on others.
            SettingError: neither a tensor nor JSON.
        """
        return self.gather_async(value).wait()

    def gather_async(self, value: T) -> Handle[list[T]]:
        """The same, begun: `handle.wait()` gives the list. Every rank has to wait for it in the end."""
        return cast("Handle[list[T]]", self._together.gather(value))

    def broadcast(self, value: T, root: int = 0) -> T:
        """What rank `root` passes, on all ranks. Collective.

        Args:
            value: on `root` a tensor, or whatever JSON can say; on the others None, or a tensor of the same kind,
                which is not changed.
            root: whose value counts.

        Raises:
            DivergedError: ranks name different roots, or pass a tensor unlike the root's.
            SettingError: no such rank, or neither a tensor nor JSON.
        """
        return self.broadcast_async(value, root).wait()

    def broadcast_async(self, value: T, root: int = 0) -> Handle[T]:
        """The same, begun: `handle.wait()` gives the value. Every rank has to wait for it in the end."""
        return cast("Handle[T]", self._together.broadcast(value, root))

    def barrier(self) -> None:
        """Return when all ranks have come here. Collective."""
        self._together.barrier()

    def print(self, *values: object, all: bool = False, file: TextIO | None = None) -> None:
        """Print on rank 0.

        Args:
            values: as for Python's `print`.
            all: print what every rank passes, a line each, in the order of ranks. Collective.
            file: default `sys.stdout`.
        """
        text = " ".join(str(v) for v in values)
        lines = [f"[rank {r}] {t}" for r, t in enumerate(self.gather(text))] if all else [text]
        if self.main:
            print("\n".join(lines), file=file or sys.stdout, flush=True)

    # ---------------------------------------------------------------- by one for all

    @property
    def main(self) -> Main:
        """True on rank 0, for what one rank does alone (prints, files) in `if job.main`.

        Calls of the job do not belong there. For work that takes longer than `timeout` enter it, as the others' waits
        end otherwise; `with job.main as here` gives the same bool and stops their clock.
        """
        return Main(self._together.world.carrier)

    def once(self, work: Callable[[], T], *, per: str = "host") -> T:
        """Have one rank of every host do something (download, unpack, tokenize) that all of its ranks need. Collective.

        The others wait as long as it takes, as the one that works is seen to live.

        Args:
            work: called without arguments. It must not call the job.
            per: "host", or "job": on rank 0 alone, for a file system that all hosts share.

        Returns:
            What `work` has returned on this host, which JSON must be able to say.

        Raises:
            PeerFailed: it raised on another rank. That rank raises its own error.
            SettingError: it returned what others cannot be told.
        """
        return once(self._together.meeting, work, per)

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self, model: nn.Module, loader: Iterable[object], metrics: Metrics, *, predict: Predict | None = None
    ) -> Evaluation:  # fmt: skip
        """Measure a model on all samples of a loader, each counted once, with the same bits at every world size.

        Collective, between steps. The model is in eval mode meanwhile, without gradients. Ranks may have unequally many
        batches, or none; under ZeRO-3 a rank that has run out serves the others. Bits do not depend on the number of
        ranks, but on the loader's batch size.

        Args:
            model: the prepared one, or any other that is equal on all ranks.
            loader: a DataLoader or a prepared loader, whose batches are counted out to ranks by their numbers; or any
                iterable of batches, which every rank reads in full and takes its share of.
            metrics: names ("accuracy", "precision", "recall", "f1", "auc", "perplexity"), or a dict of such names, loss
                functions `f(outputs, targets)`, metrics of `shoal.metrics`, and the user's own with
                `update(outputs, targets)`, `compute()` and `reset()`, such as torchmetrics'. These are handed all
                batches in their order on every rank, so all outputs travel.
            predict: `predict(model, batch)` gives outputs and targets. Default: the last part of a batch is the
                target, or "labels" of a dict.

        Raises:
            OrderError: in the middle of a step.
            BatchError: no batches, or ones that need `predict`.
            SettingError: an unknown metric, or outputs that do not fit it.
            DivergedError: ranks measure different things, or read unequally many batches.
        """
        self._between_steps("job.evaluate")
        return evaluate(model, loader, metrics, predict, self._feed, self._together.meeting, self.device)

    # ---------------------------------------------------------------- telling

    def report_to(self, *trackers: Tracker) -> None:
        """Tell these of all that `job.log` says from now on, and of checkpoints. Rank 0 does.

        Args:
            trackers: of `shoal.trackers` (TensorBoard, WandB, MLflow), or with the same four methods. One that raises
                is said so once and gets nothing more; training goes on.
        """
        if self.main:
            self._tracking.add(trackers)

    def log(
        self, *, every: int = 1, tokens: int = 0, peak_flops: float = 0.0, flops_per_token: float | None = None,
        **values: float | Tensor | None,
    ) -> None:  # fmt: skip
        """Say how training goes, in one line, to `events.jsonl`, to standard error and to trackers.

        Call it after every `optimizer.step()`, on rank 0 or on all ranks; nothing travels. Learning rate, loss scale,
        the norm of the latest `clip_grad_norm`, rank 0's memory and rates over the interval come by themselves.

        Args:
            every: so many steps make an interval; the others are only counted.
            tokens: of a whole step, over all ranks; for tokens/s.
            peak_flops: floating-point operations a second of one rank's device at its best; with it MFU is said.
            flops_per_token: of forward and backward; default 6 for every parameter of the model.
            values: numbers by their names, `loss=job.mean(loss)`; None is left out.

        Raises:
            SettingError: a value that is no number.
        """
        check_log(every, tokens, values)
        latest = self._latest
        if self.main and latest is not None and latest.stepped:
            share = share_of_peak(latest, peak_flops, flops_per_token)
            said = numbers(values) | facts_of(latest, self.device)
            self._tracking.log(self._feed.step, every, tokens, share, said)
