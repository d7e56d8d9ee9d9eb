"""What a job offers besides training. `Job` inherits it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TextIO, TypeVar, cast

import torch
from torch import Tensor, nn

from shoal.collectives import Collectives, Handle, Number
from shoal.comm.meet import Want
from shoal.data.feed import LeafFeed
from shoal.engine.binding import Binding
from shoal.evaluation import Evaluation, Metrics, Predict, evaluate
from shoal.once import Main, once
from shoal.pretrained.fill import Pretrained, load_pretrained
from shoal.random import mix
from shoal.tracked import Tracked
from shoal.trackers.protocol import Tracker
from shoal.tracking import Tracking, check_log, facts_of, numbers, share_of_peak

T = TypeVar("T")
V = TypeVar("V", bound=Tensor | Number)


class Verbs(ABC):
    """Words between ranks, evaluation, and what is told to people.

    Attributes:
        _together: what user code exchanges.
        _feed: seeds, and who is handed what.
        _tracking: what is told of the run.
        _tracked: what is in checkpoints besides models and optimizers.
        _latest: the model that stepped last.
    """

    device: torch.device
    _together: Collectives
    _feed: LeafFeed
    _tracking: Tracking
    _tracked: Tracked
    _latest: Binding | None

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

    # ---------------------------------------------------------------- data

    def generator(self, name: str = "") -> torch.Generator:
        """A generator of its own for the leaf that comes next, for loops that draw their own batches.

        Call it once per leaf, before forward. It is seeded from (job seed, step, leaf, name): whoever computes a leaf,
        at any world size, draws the same numbers, and ranks draw different ones.

        Args:
            name: of what is drawn, where a leaf draws several things: equal names draw equal numbers.
        """
        leaf = self._feed.leaf_now()
        drawn = torch.Generator()  # on the CPU: the same numbers whatever the device
        return drawn.manual_seed(mix("draw", self._feed.seed, self._feed.step, 0 if leaf is None else leaf, name))

    # ---------------------------------------------------------------- state

    def track(self, **objects: object) -> None:
        """Put more into checkpoints: whatever has `state_dict()` and `load_state_dict()`. Call it before `job.load`.

        Models, optimizers, schedulers and loaders given to `prepare`, loaders of `job.loader` and averages of `job.ema`
        (in shards, like their models) are there already. States are kept without pickle: tensors, arrays, numbers,
        strings, None, and lists, tuples and dicts of them. Rank 0's is saved, and all ranks get it back; a line says
        where ranks differ.

        Args:
            objects: by the names that they have in the checkpoint.

        Raises:
            SettingError: one has no such methods.
            OrderError: the name is taken, or `job.load` has passed its state by.
        """
        self._tracked.add(objects)

    def load_pretrained(
        self, path: str | Path, model: nn.Module | None = None, *, strict: bool = True, trust: bool = False,
        rename: Callable[[str], str] = str,
    ) -> Pretrained:  # fmt: skip
        """Fill a prepared model with weights that another program has written, tensor by tensor. Collective.

        No rank ever holds the whole of it: each reads the tensors of which it keeps a part. Values are converted to the
        model's dtype. Averages of `job.ema` begin anew.

        Args:
            path: a `.safetensors` file, a Hugging Face index or a directory with either; `.pt`, `.pth`, `.bin` with
                a state dict; a directory of torch's distributed checkpoint; of DeepSpeed's ZeRO, universal or as
                stages 1 to 3 write it.
            model: the prepared one; None: the only one.
            strict: missing or extra names are an error; else they are reported.
            trust: may pickles be read that run code? Needed for torch's distributed and DeepSpeed's sharded ones.
            rename: what a name of the file is called in the model.

        Returns:
            The names that were loaded, are missing in the file, and are extra in it.

        Raises:
            CheckpointError: there are no weights, or they may not be read.
            ResumeError: other names or shapes; nothing has been changed then.
        """
        binding = self._find(model)
        self._state_between_steps("job.load_pretrained")
        self._together.meeting.meet(Want.PRETRAINED, model=binding.engine.number)
        with self._together.leased("job.load_pretrained"):
            share = partial(self._together.world.share_any, "file")
            return load_pretrained(binding, Path(path), share, strict=strict, trust=trust, rename=rename)

    @abstractmethod
    def _find(self, model: nn.Module | None) -> Binding:
        """The binding of a prepared model; None: of the only one."""

    @abstractmethod
    def _between_steps(self, what: str) -> None:
        """Raises `OrderError` in the middle of a step."""

    @abstractmethod
    def _state_between_steps(self, what: str) -> None:
        """The same, for what reads or writes state: it needs whole parameters."""
