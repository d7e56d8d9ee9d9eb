"""What a training loop needs: loaders, and what is called between two batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from shoal.average import Average
from shoal.base import Base
from shoal.data.loader import Loader, steps_of_loader
from shoal.data.micro import check_count, end_leaf, micro_steps
from shoal.data.partition import Key, steps_of
from shoal.data.stream import StreamLoader
from shoal.engine import habits
from shoal.errors import OrderError
from shoal.random import mix

T = TypeVar("T")


class Looping(Base):
    """Loaders, weights of leaves, gradients, means."""

    def loader(
        self, dataset: Dataset[T], *, global_batch: int, shuffle: bool = True, drop_last: bool = False,
        workers: int = 0, collate_fn: Callable[[list[T]], object] | None = None,
        partition: str = "row", key: Key | None = None, pin_memory: bool = False, prefetch: int | None = None,
    ) -> Loader[T]:  # fmt: skip
        """A loader that hands out the same leaves whatever the world size.

        Args:
            dataset: map-style; it need not fit into memory (`shoal.data.TokenFile`, `shoal.data.FileShards`).
            global_batch: samples of one step; a multiple of the leaves.
            shuffle: a new order every epoch, from the job's seed.
            drop_last: leave out a last step that is not full.
            workers: processes that prepare batches; they change no numbers.
            collate_fn: makes a batch of samples; None: torch's.
            partition: "row": leaves are cut out of one order of all samples. "file", "key": all samples of a file, or
                with one key, belong to one leaf in every epoch, so that leaves may run out of data one after the other.
            key: for "key": a function of a sample's number, or one value for every sample.
            pin_memory: batches in pinned memory, for faster copies to an accelerator.
            prefetch: batches that each worker prepares ahead; None: 2.

        Raises:
            BatchError: the leaves do not divide the global batch, or partition and data set do not fit together.
        """
        steps = steps_of(
            cast(Dataset[object], dataset), self.seed, global_batch, self.leaves,
            shuffle=shuffle, drop_last=drop_last, partition=partition, key=key,
        )  # fmt: skip
        source = DataLoader(
            dataset, num_workers=workers, collate_fn=collate_fn, pin_memory=pin_memory, prefetch_factor=prefetch
        )
        loader = Loader(self._feed, source, steps)
        return self._keep(loader)

    def _wrap(self, source: DataLoader[object]) -> Loader[object]:
        if isinstance(source.dataset, IterableDataset):
            return self._keep(StreamLoader(self._feed, source, self._meeting))
        return self._keep(Loader(self._feed, source, steps_of_loader(source, self.seed, self._say)))

    def _keep(self, loader: Loader[T]) -> Loader[T]:
        self._loaders.append(cast(Loader[object], loader))
        if self._trace is not None:
            loader.made = self._trace.widened
        return loader

    @property
    def stepped(self) -> bool:
        """Did the latest `optimizer.step()` act? It acts on a step's last leaf."""
        self._all_bound()
        return self._latest is not None and self._latest.stepped

    def weight(self, samples: float, *, full: float) -> None:
        """Say how much this leaf weighs; call it before `backward`. Loaders do it by the number of samples.

        Args:
            samples: of this leaf (or tokens, or whatever the loss is a mean of).
            full: of a full leaf, which weighs exactly 1.
        """
        if full <= 0 or samples < 0:
            raise OrderError(f"job.weight({samples:g}, full={full:g})", remedy="samples >= 0 and full > 0")
        self._all_bound()
        self._feed.weigh(samples / full)

    def micro_steps(self, count: int) -> Iterator[int]:
        """This rank's part of a step's micro-steps, for loops that accumulate gradients by themselves.

        Use it instead of `range(count)` around forward and backward; one `optimizer.step()` follows. As in that loop
        gradients add up, so divide each loss by `count`. Every leaf is `count / leaves` neighbouring micro-steps, and
        the global generators are set from (seed, step, micro-step): batches that the loop draws differ.

        Args:
            count: of one step, over all ranks; a multiple of the leaves.

        Returns:
            The numbers of this rank's micro-steps.

        Raises:
            BatchError: the leaves do not divide the count.
        """
        optimizers = [o for b in self._all_bound() for o in b.optimizers]
        check_count(count, self.leaves)
        return micro_steps(self._feed, count, lambda: end_leaf(optimizers))

    def clip_grad_norm(self, max_norm: float, *, model: nn.Module | None = None) -> float | None:
        """Scale the step's gradients so that their global 2-norm is at most `max_norm`.

        Args:
            max_norm: the largest norm afterwards.
            model: whose gradients; None: the only one's.

        Returns:
            The norm before clipping, with the same bits on all ranks and under all strategies; None on a leaf that is
            not the step's last, where nothing happens.
        """
        return self._find(model).clip_grad_norm(max_norm)

    def clip_grad_value(self, limit: float, *, model: nn.Module | None = None) -> bool | None:
        """Clamp every element of the step's gradients to -limit..limit, as torch's `clip_grad_value_` does.

        Args:
            limit: the largest magnitude afterwards, at least 0.
            model: whose gradients; None: the only one's.

        Returns:
            True on a step's last leaf; None on the others, where nothing happens.
        """
        return habits.clip_values(self._find(model), limit)

    def gradients(self, model: nn.Module | None = None) -> AbstractContextManager[bool]:
        """Inside, every `p.grad` is the step's gradient, whole, to read. Between backward and step. Collective.

        The context gives True on a step's last leaf, and False on the others, where gradients are not known yet.
        What is written to them is dropped. Memory: one whole gradient.

        Args:
            model: whose; None: the only one's.
        """
        return habits.whole_gradients(self._find(model))

    def loss_scale(self, model: nn.Module | None = None) -> float:
        """What float16 losses are multiplied with for backward; 1 in other precisions."""
        scale = self._find(model).engine.scale
        return 1.0 if scale is None else scale.scale

    def mean(self, value: float | Tensor) -> float | None:
        """Average a number over the leaves of this step, by their weights. Call it after `optimizer.step()`.

        Args:
            value: of this leaf; a leaf that was handed out again only to keep ranks together is ignored.

        Returns:
            The mean on the step's last leaf of this rank, None on the others.
        """
        return self._feed.mean(value)

    def whole(self, model: nn.Module, *, write: bool = False) -> AbstractContextManager[None]:
        """Inside, every rank holds all parameters and may run alone (evaluation, generation). Collective.

        Args:
            model: the prepared one.
            write: cut changes back into shards afterwards; all ranks must make the same ones.
        """
        binding = self._find(model)
        if write:
            self._saved = None  # a checkpoint of this step, if there is one, has other weights
        return binding.whole(write=write)

    def ema(self, model: nn.Module, decay: float) -> Average:
        """Keep an exponential moving average of a model's weights, on shards, from now on.

        It is saved and loaded with the job; call it before `job.load`.

        Args:
            model: the prepared one.
            decay: of the old average at each update.

        Returns:
            An average: `with average.whole(): ...` evaluates with it, `job.state_dict(average)` is its state dict.
        """
        return Average(self._find(model), decay)

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
