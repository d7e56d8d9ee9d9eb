"""The public object: one training job on this rank."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from shoal import export, resume
from shoal.average import Average
from shoal.bench.record import record
from shoal.checkpoint import check_keep, keep_newest
from shoal.collectives import Collectives
from shoal.comm.group import Carrier, current, latest
from shoal.comm.meet import Meeting, Want
from shoal.comm.mesh import Mesh
from shoal.comm.meter import Meter
from shoal.data.feed import LeafFeed
from shoal.data.loader import Loader, check_batch, steps_of_dataset, steps_of_loader
from shoal.data.micro import check_count, end_leaf, micro_steps
from shoal.data.stream import StreamLoader
from shoal.dropin.strays import Strays, ours
from shoal.engine import habits, holding, setup, units
from shoal.engine.binding import Binding
from shoal.engine.budget import Budget
from shoal.engine.fill import Fill
from shoal.engine.ledger import Memory
from shoal.errors import OrderError
from shoal.launch.rundir import RunDir, open_run_dir
from shoal.logs import say, warn
from shoal.plain import PlainJob
from shoal.random import seed as set_seed
from shoal.rules import rules
from shoal.settings import Resolved, check_together
from shoal.start import Seat, find_carrier, settle_settings, strategy_of, tell_of_failure
from shoal.strategy import Strategy
from shoal.trace import By, Trace, Traced
from shoal.tracked import Tracked
from shoal.tracking import Tracking
from shoal.verbs import Verbs

M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=Optimizer | Sequence[Optimizer])  # noqa: E741
S = TypeVar("S", bound=LRScheduler)
T = TypeVar("T")


def init(
    strategy: str | Strategy | None = None,
    *,
    device: str | torch.device | None = None,
    seed: int | None = None,
    threads: int | None = None,
    leaves: int | None = None,
    ranks_per_copy: int | str | None = None,
    twig: int | None = None,
    precision: str | None = None,
    masters: bool | None = None,
    cut: str | None = None,
    numerics: str | None = None,
    timeout: float | None = None,
    overlap: bool | None = None,
    pending: bool | None = None,
    memory: int | str | None = None,
    layerwise: bool | None = None,
    carrier: str | None = None,
    interface: str | None = None,
    run_dir: str | None = None,
) -> Job:
    """Start or join a job. Finds its place from torchrun's or `shoal run`'s environment, or is a world of one.

    What is None comes from flags, `SHOAL_*` variables or `shoal.toml`, and these win over what is given here.

    Args:
        strategy: a name (ddp, zero1, zero2, zero3, hybrid) or a `Strategy`; default "ddp".
        device: where the model will be; default the accelerator in a world of one, else the CPU.
        seed: of the job: initial weights, order of data, random numbers of every leaf; default 0.
        threads: of torch on this rank; default 1. They are part of the numbers.
        leaves: micro-batches of a step, whoever computes them; default the world at first start.
        ranks_per_copy, twig, precision, masters, cut, numerics: see `Strategy`.
        timeout: seconds without a change anywhere after which a wait ends; default 60.
        overlap: transfer while computing; False allows any number of backward calls per leaf. Default True.
        pending: may updates and transfers be under way when `optimizer.step()` returns? Until the next forward needs
            them, parameters are placeholders then. Hides slow networks. Default False.
        memory: bytes that a rank may use, such as "2GB": units stay gathered while there is room. Default: they are
            freed after use.
        layerwise: update a unit as soon as its gradient is there, while backward runs, and free that. No clipping, no
            float16, no way back from a step that fails. Default False.
        carrier: what moves the bytes between ranks: "gloo" (TCP), "shared" (memory within hosts), "nccl", "mpi" (under
            mpirun), or "auto", the fastest there is.
        interface: names of network interfaces, "eth0" or "eth0,eth1": large messages are spread over all of them;
            default GLOO_SOCKET_IFNAME, else the one that leads to MASTER_ADDR.
        run_dir: for events, logs and resolved settings; "none" for none; default `runs/<time>-<pid>`.

    Raises:
        StrategyError: an unknown or impossible strategy.
        SettingError: an unknown setting or value.
        EnvironmentFault: the other ranks do not come.
    """
    given: dict[str, object] = {
        "device": str(device) if device is not None else None, "seed": seed, "threads": threads, "leaves": leaves,
        "ranks_per_copy": ranks_per_copy, "twig": twig, "precision": precision, "masters": masters, "cut": cut,
        "numerics": numerics, "timeout": timeout, "overlap": overlap, "pending": pending, "memory": memory,
        "layerwise": layerwise, "carrier": carrier, "interface": interface, "run_dir": run_dir,
    }  # fmt: skip
    resolved = settle_settings(strategy, given)
    check_together(resolved.settings)
    traced = Trace.asked(os.environ if current.get() is None else {})
    if traced is not None and traced.by is not By.SHOAL:
        return cast(Job, PlainJob(traced, resolved))
    base = strategy_of(resolved, strategy)
    s = resolved.settings
    carrying, place = find_carrier(s.timeout, s.carrier, s.device, s.interface)
    try:
        return Job(base.settled(carrying.size, place.local_world), carrying, resolved, place)
    except BaseException as error:
        carrying.fail(f"{type(error).__name__}: {error}")
        carrying.close()
        raise


class Job(Verbs):
    """One training job, seen from one rank. Made by `shoal.init`; a context manager that closes itself."""

    device: torch.device
    """Where this rank's model and batches belong."""

    def __init__(self, strategy: Strategy, carrier: Carrier, resolved: Resolved, place: Seat) -> None:
        s = resolved.settings
        self.resolved = resolved
        self._carrier = carrier
        copy = strategy.ranks_per_copy if isinstance(strategy.ranks_per_copy, int) else 1
        self._mesh = Mesh.of(carrier, copy, strategy.tensor)
        self._meeting = Meeting(self._mesh.world)
        self._meeting.make_room(32)
        self._bindings: dict[str, Binding] = {}
        self._budget = Budget(s.memory, self._bindings, pending=s.pending, world=self._mesh.world, say=self._say)
        self._wanted: dict[str, setup.Wanted] = {}
        self._latest: Binding | None = None
        self._loaders: list[Loader[object]] = []
        self._feed = LeafFeed(strategy, s.seed, self._mesh, self._meeting, self._say)
        self._closed = False
        self._resumed: Path | None = None
        self._strays = Strays(self._mesh.world)
        latest.set(carrier)
        self._trace = Trace.asked(os.environ if place.own_process else {})
        self._feed.after_step = self._take_trace
        self.device = torch.device(s.device or _default_device(carrier))
        self._together = Collectives(self._meeting, self.device)
        self.threads = s.threads
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(s.threads)
        self.run_dir: RunDir | None = open_run_dir(resolved) if carrier.rank == 0 and place.own_process else None
        self._restore_hook = tell_of_failure(carrier) if place.own_process else lambda: None
        if place.own_process:
            atexit.register(self.close)
        self._tracked = Tracked(self._say)
        self._tracking = Tracking(self.event, resolved.settings.model_dump())
        record(
            os.environ if place.own_process else {}, self._feed, self._tracking, self._bindings,
            lambda: {name: self.state_dict(binding.model) for name, binding in self._bindings.items()},
        )  # fmt: skip
        set_seed(self.seed, 0)
        self.event("init", world=carrier.size, strategy=strategy.name)

    # ---------------------------------------------------------------- place

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self._mesh.world.rank

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self._mesh.world.size

    @property
    def leaves(self) -> int:
        """Leaves of one step."""
        return self._feed.leaves

    @property
    def strategy(self) -> Strategy:
        """The strategy with nothing left open."""
        return self._feed.strategy

    @property
    def seed(self) -> int:
        """The job's seed."""
        return self._feed.seed

    @property
    def step(self) -> int:
        """Steps that have acted, those before a resumed checkpoint included."""
        return self._feed.step

    @property
    def stepped(self) -> bool:
        """Did the latest `optimizer.step()` act? It acts on a step's last leaf."""
        self._all_bound()
        return self._latest is not None and self._latest.stepped

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that this rank has sent so far, by verb: gather, reduce, agree, meet, ..."""
        return dict(self._carrier.sent)

    @property
    def crossed(self) -> dict[str, int]:
        """What of `traffic` has gone to other hosts, where their ranks share memory; fast numerics are left out."""
        return dict(self._carrier.levels.crossed)

    def memory(self) -> Memory:
        """Every buffer of this rank: bytes now, and as predicted at rest and at most.

        A mapping from kind ("parameters", "masters", "gradients", "optimizer", "staging", "other") to bytes in use now;
        a table when printed. `entries` has the single buffers, `measured` what the system says of this process.
        """
        return holding.memory(self._all_bound(), self._mesh.world)

    def explain(self) -> str:
        """What happens to a unit's parameters and gradients, and when; and which units were chosen, and why."""
        tables = [units.explain(binding.engine.units) for binding in self._all_bound()]
        return "\n\n".join([self.strategy.explain(), *tables])

    # ---------------------------------------------------------------- model and data

    @overload
    def prepare(self, model: M, optimizer: O, /, *, units: Sequence[str] | int | None = None, elementwise: bool | None = None, float32: Sequence[str] = (), fill: Fill | None = None, compile: bool | Mapping[str, object] = False, name: str = "") -> tuple[M, O]: ...  # fmt: skip  # noqa: E501
    @overload
    def prepare(self, model: M, optimizer: O, loader: DataLoader[T], /, *, units: Sequence[str] | int | None = None, elementwise: bool | None = None, float32: Sequence[str] = (), fill: Fill | None = None, compile: bool | Mapping[str, object] = False, name: str = "") -> tuple[M, O, Loader[T]]: ...  # fmt: skip  # noqa: E501
    @overload
    def prepare(self, model: M, optimizer: O, loader: DataLoader[T], scheduler: S, /, *, units: Sequence[str] | int | None = None, elementwise: bool | None = None, float32: Sequence[str] = (), fill: Fill | None = None, compile: bool | Mapping[str, object] = False, name: str = "") -> tuple[M, O, Loader[T], S]: ...  # fmt: skip  # noqa: E501
    @overload
    def prepare(self, model: M, optimizer: O, scheduler: S, /, *, units: Sequence[str] | int | None = None, elementwise: bool | None = None, float32: Sequence[str] = (), fill: Fill | None = None, compile: bool | Mapping[str, object] = False, name: str = "") -> tuple[M, O, S]: ...  # fmt: skip  # noqa: E501
    def prepare(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], /,
        *others: DataLoader[object] | LRScheduler,
        units: Sequence[str] | int | None = None, elementwise: bool | None = None,
        float32: Sequence[str] = (), fill: Fill | None = None,
        compile: bool | Mapping[str, object] = False, name: str = "",
    ) -> tuple[object, ...]:  # fmt: skip
        """Spread a model and its optimizers over the ranks, and count out the batches of loaders. Collective.

        Model and optimizers are the user's own objects, changed in place; loaders are new. Everybody starts from
        rank 0's values.

        Args:
            model: on `job.device`.
            optimizer: over parameters of this model; or a list of several, each over others of them.
            others: DataLoaders and learning-rate schedulers, in any order.
            units: names of modules whose parameters travel together; None: blocks of every ModuleList or Sequential,
                small neighbours merged and what is very large cut; a number: merged up to so many bytes, 0: not at all.
            elementwise: may the optimizer's parameters be cut anywhere? None: known for torch's, tried for others.
            float32: names of modules, or of their classes ("LayerNorm"), that compute in float32 whatever the
                precision. Batch norm always does.
            fill: for a model on the meta device, which gets its values block by block, so that no rank ever holds the
                whole: called with every module to give it its own values. None: its `reset_parameters()`.
            compile: torch.compile the forward of every block, in every strategy alike; a dict gives its options.
            name: of the model, where a job trains several. With several, every rank runs equally many leaves.

        Returns:
            The same objects in the same order, each loader replaced.

        Raises:
            ModelError, OptimizerError, BatchError: what cannot be trained as it is.
            DivergedError: ranks prepare different things.
        """
        self._check_name(name)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if self._trace is not None:
            self._trace.widen(model)
        facts = {
            "shoal": _version(), "torch": ".".join(torch.__version__.split(".")[:2]), "strategy": self.strategy.name,
            "seed": self.seed, "overlap": self.resolved.settings.overlap, "name": name,
            "pending": self.resolved.settings.pending, "layerwise": self.resolved.settings.layerwise,
            "memory": "none" if self._budget.limit is None else "a budget",
            "float32": list(float32), "compile": str(compile),
        }  # fmt: skip
        mesh = self._mesh if not self._bindings else self._mesh.again(len(self._bindings))
        wanted = setup.Wanted(
            strategy=self.strategy, rules=rules(self.strategy), mesh=mesh, meeting=self._meeting,
            overlap=self.resolved.settings.overlap, pending=self.resolved.settings.pending, units=units,
            elementwise=elementwise, float32=float32, fill=fill, compile=compile,
            device=self.device, facts=facts, say=self._say, ended=self._feed.ended,
            number=len(self._bindings), first=sum(len(b.engine.units) for b in self._bindings.values()),
            prefix=f"{name}/" if name else "", budget=self._budget, layerwise=self.resolved.settings.layerwise,
        )  # fmt: skip
        binding = self._bindings[name] = setup.build(model, optimizers, wanted)
        ours(*optimizers)
        self._wanted[name], binding.on_step = wanted, self._steps
        self._feed.bind(binding.engine)
        self._budget.check()
        results: list[object] = [model, optimizer]
        for other in others:
            if isinstance(other, LRScheduler):
                binding.add_scheduler(other)
                results.append(other)
            else:
                results.append(self._wrap(other))
        self._say(f"{name}: {setup.plan_line(binding, self.world_size)}" if name else
                  setup.plan_line(binding, self.world_size))  # fmt: skip
        set_seed(self.seed, 0)
        return tuple(results)

    def _check_name(self, name: str) -> None:
        if name in self._bindings or (self._bindings and ("" in self._bindings or not name)):
            raise OrderError(
                "job.prepare was called twice" + (f" with name={name!r}" if name else ""),
                cause="a job that trains several models knows them by their names",
                remedy='job.prepare(generator, ..., name="generator"), and another name for every other model',
            )
        if self._bindings and any(b.engine.turns_done for b in self._bindings.values()):
            raise OrderError("job.prepare after training has begun", remedy="prepare all models first")

    def _steps(self, binding: Binding) -> None:
        self._latest = binding

    def loader(
        self, dataset: Dataset[T], *, global_batch: int, shuffle: bool = True, drop_last: bool = False,
        workers: int = 0, collate_fn: Callable[[list[T]], object] | None = None,
    ) -> Loader[T]:  # fmt: skip
        """A loader that hands out the same leaves whatever the world size.

        Args:
            dataset: map-style.
            global_batch: samples of one step; a multiple of the leaves.
            shuffle: a new order every epoch, from the job's seed.
            drop_last: leave out a last step that is not full.
            workers: processes that prepare batches; they change no numbers.
            collate_fn: makes a batch of samples; None: torch's.

        Raises:
            BatchError: the leaves do not divide the global batch.
        """
        check_batch(global_batch, self.leaves)
        steps = steps_of_dataset(
            cast(Dataset[object], dataset), self.seed, global_batch, shuffle=shuffle, drop_last=drop_last
        )
        source = DataLoader(dataset, num_workers=workers, collate_fn=collate_fn)
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

    # ---------------------------------------------------------------- in the loop

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
        return self._find(model).whole(write=write)

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

    def state_dict(self, what: nn.Module | Optimizer | Average) -> dict[str, object]:
        """The whole state dict of a prepared model or optimizer, or of an average. Collective.

        Returns:
            On rank 0 what torch's `state_dict()` would give in one process, on the CPU; elsewhere nothing.
        """
        if isinstance(what, Average):
            binding = what.binding
        else:
            binding = self._find(what) if isinstance(what, nn.Module) else self._find_optimizer(what)
        self._between_steps("job.state_dict")
        self._meeting.meet(Want.STATE, 0, model=binding.engine.number)
        self._carrier.hold("job.state_dict")
        try:
            if isinstance(what, nn.Module):
                return cast(dict[str, object], export.model_state(binding))
            if isinstance(what, Average):
                return cast(dict[str, object], export.model_state(binding, what.pieces))
            return export.optimizer_state(binding, what)
        finally:
            self._carrier.hold("")

    # ---------------------------------------------------------------- checkpoints

    def save(self, path: str | Path, *, keep: int | None = None) -> Path:
        """Write `path/step-N`: all state, whatever the strategy; it loads under any other. Collective.

        Args:
            path: a directory that all ranks see.
            keep: so many of the newest whole checkpoints stay, this one included; older ones are deleted. None: all.

        Returns:
            The directory of this checkpoint.

        Raises:
            SaveError: it could not be written (or is there already); older ones are intact.
        """
        bindings = self._all_bound()
        if keep is not None:
            check_keep(keep)
        self._between_steps("job.save")
        self._meeting.meet(Want.SAVE, self.step)
        self._carrier.hold("job.save")
        try:
            root = Path(path) if self._trace is None else self._trace.saved(Path(path))
            target = resume.save(bindings, root, self._facts(), self._share)
            keep_newest(target, keep, self._resumed, rank=self.rank, share=self._share)
        finally:
            self._carrier.hold("")
        self.event("save", step=self.step, path=str(target))
        self._tracking.saved(self.step, target)
        return target

    def load(self, path: str | Path) -> int:
        """Go on from a checkpoint, saved under any strategy and world size, with the same bits. Collective.

        Call it after `prepare` and before the first step. The checkpoint's leaves and threads win over defaults.

        Args:
            path: `.../step-N`, or the directory that holds several: the newest is taken.

        Returns:
            The number of steps done.

        Raises:
            CheckpointError: there is none, it is damaged, or it does not fit.
        """
        bindings = self._all_bound()
        if any(b.engine.turns_done for b in bindings):
            raise OrderError("job.load after training has begun", remedy="load right after prepare")
        self._meeting.meet(Want.LOAD, 0)
        self._carrier.hold("job.load")
        try:
            found = resume.load(bindings, Path(path), self._facts(), self.resolved, self._share, self._rebuild)
        finally:
            self._carrier.hold("")
        self._feed.strategy, before = self._all_bound()[0].strategy, self.leaves
        if found.leaves != before:
            self._say(f"going on with the checkpoint's {found.leaves} leaves a step")
        self._resumed = found.path
        self._feed.set_seed(found.seed)
        self.threads = found.threads
        torch.set_num_threads(found.threads)
        for loader, at in zip(self._loaders, found.positions, strict=False):
            loader.go_to(at["epoch"], at["step"])
        self._feed.between_steps()
        self.event("load", step=self.step, path=str(found.path))
        return self.step

    def _rebuild(self, precision: str, masters: bool) -> Sequence[Binding]:
        """Prepare again for the precision of a checkpoint."""
        rounded = "" if masters else " without masters"
        self._say(f"going on with the checkpoint's precision {precision}{rounded}")
        change = {"precision": precision, "masters": masters}
        self._meeting.granters.clear()
        for name, old in self._bindings.items():
            wanted = self._wanted[name]
            old.undo()
            wanted = self._wanted[name] = replace(wanted, strategy=replace(wanted.strategy, **change))
            binding = self._bindings[name] = setup.build(old.model, old.optimizers, wanted)
            binding.on_step = self._steps
            self._feed.bind(binding.engine, instead_of=old.engine)
            for scheduler in old.schedulers:
                binding.add_scheduler(scheduler)
        return self._all_bound()

    def _facts(self) -> resume.Facts:
        return resume.Facts(
            leaves=self.leaves, seed=self.seed, threads=self.threads, precision=self.strategy.precision, path=Path(),
            twig=self.strategy.twig, masters=self.strategy.masters, positions=[x.position() for x in self._loaders],
            tracked=self._tracked,
        )  # fmt: skip

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """Leave the job together. Called by the context manager and at the interpreter's end."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._restore_hook()
        try:
            if not self._carrier.failed:
                for binding in self._bindings.values():
                    binding.engine.updates.flush()
                self._meeting.meet(Want.CLOSE)
                self._strays.tell(self._warn)
                self.event("close", step=self.step)
        except BaseException as error:
            self._carrier.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._end()

    def _end(self) -> None:
        self._tracking.end()
        self._carrier.close()
        for binding in self._bindings.values():
            binding.release()
        torch.set_num_threads(self._threads_before)
        if self.run_dir is not None:
            self.run_dir.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close()
        elif not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            self._carrier.fail(f"{type(error).__name__}: {error}")
            self._restore_hook()
            self._end()

    # ---------------------------------------------------------------- helpers

    def event(self, kind: str, **fields: object) -> None:
        """Append a line to the run directory's events.jsonl (rank 0)."""
        if self.run_dir is not None:
            self.run_dir.event(kind, **fields)

    def _take_trace(self) -> None:
        if self._trace is not None:
            facts = Traced(leaves=self.leaves, device=str(self.device))
            models = {name: self.state_dict(binding.model) for name, binding in self._bindings.items()}
            self._trace.take(self.rank, facts, cast(dict[str, dict[str, Tensor]], models))

    def _say(self, text: str) -> None:
        if self.rank == 0:
            say(text)

    def _warn(self, text: str) -> None:
        if self.rank == 0:
            warn(text)

    def _share(self, data: bytes) -> list[bytes]:
        return self._mesh.world.share_any("file", data)

    def _all_bound(self) -> Sequence[Binding]:
        if not self._bindings:
            raise OrderError("the job has no model yet", remedy="model, optimizer = job.prepare(model, optimizer)")
        return list(self._bindings.values())

    def _find(self, model: nn.Module | None) -> Binding:
        """The binding of a prepared model; None: of the only one."""
        bindings = self._all_bound()
        if model is None and len(bindings) > 1:
            raise OrderError(f"the job trains {len(bindings)} models", remedy="say which with model=")
        found = next((b for b in bindings if model is None or b.model is model), None)
        if found is None:
            raise OrderError(
                f"this {type(model).__name__} was not prepared by this job", remedy="pass the prepared model"
            )
        return found

    def _find_optimizer(self, optimizer: Optimizer) -> Binding:
        found = next((b for b in self._all_bound() if optimizer in b.optimizers), None)
        if found is None:
            raise OrderError(
                f"this {type(optimizer).__name__} was not prepared by this job", remedy="pass a prepared optimizer"
            )
        return found

    def _between_steps(self, what: str) -> None:
        if self.strategy.tensor > 1:
            raise OrderError(
                f"{what} with tensor={self.strategy.tensor}: it would write boxes of DTensors as if they were all",
                remedy="p.full_tensor() for every parameter of the model, or torch.distributed.checkpoint",
            )
        engines = [b.engine for b in self._all_bound()]
        for engine in engines:
            engine.updates.flush()
        if any(e.leaf is not None or e.turn or e.settled or e.resting for e in engines):
            raise OrderError(f"{what} in the middle of a step", remedy="call it when job.stepped is True")


def _version() -> str:
    from shoal import __version__

    return __version__


def _default_device(carrier: Carrier) -> str:
    if isinstance(carrier, Meter) and carrier.size > 1:
        return "meta"
    if carrier.size > 1:
        return "cpu"
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(found) if found is not None else "cpu"
