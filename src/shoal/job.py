"""The public object: one training job on this rank. More of what it offers is in `loop`, `saving` and `verbs`."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TypeVar, cast, overload

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from shoal import __version__
from shoal.bench.record import record
from shoal.changing import Changing
from shoal.comm.group import Carrier, current, latest
from shoal.comm.meet import Want
from shoal.data.loader import Loader
from shoal.dropin.strays import Strays, ours
from shoal.engine import holding, setup, units
from shoal.engine.fill import Fill
from shoal.engine.ledger import Memory
from shoal.errors import OptimizerError, OrderError
from shoal.loop import Looping
from shoal.plain import PlainJob
from shoal.random import seed as set_seed
from shoal.rules import rules
from shoal.saving import Saving
from shoal.settings import Resolved, check_together
from shoal.start import Seat, find_carrier, settle_settings, strategy_of, tell_of_failure
from shoal.strategy import Strategy
from shoal.trace import By, Trace
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
    one_round: int | str | None = None,
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
        one_round: under ddp, gradients of up to so many bytes in all, such as "32KiB", travel in one round instead of
            two, which send less. Default: measured when a small model is prepared.
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
        "layerwise": layerwise, "carrier": carrier, "interface": interface, "one_round": one_round, "run_dir": run_dir,
    }  # fmt: skip
    resolved = settle_settings(strategy, given)
    check_together(resolved.settings)
    traced = Trace.asked(os.environ if current.get() is None else {})
    if traced is not None and traced.by is not By.SHOAL:
        return cast(Job, PlainJob(traced, resolved))
    base = strategy_of(resolved, strategy)
    s = resolved.settings
    carrying, place = find_carrier(s.timeout, s.carrier, s.device, s.interface, one_round=s.one_round)
    try:
        return Job(base.settled(carrying.size, place.local_world), carrying, resolved, place)
    except BaseException as error:
        carrying.fail(f"{type(error).__name__}: {error}")
        carrying.close()
        raise


class Job(Changing, Saving, Looping, Verbs):
    """One training job, seen from one rank. Made by `shoal.init`; a context manager that closes itself."""

    def __init__(self, strategy: Strategy, carrier: Carrier, resolved: Resolved, place: Seat) -> None:
        super().__init__(strategy, carrier, resolved, place)
        self._closed = False
        self._strays = Strays(self._mesh.world)
        self._feed.after_step = self._take_trace
        latest.set(carrier)
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self._restore_hook = tell_of_failure(carrier) if place.own_process else lambda: None
        record(
            os.environ if place.own_process else {}, self._feed, self._tracking, self._bindings,
            lambda: {name: self.state_dict(binding.model) for name, binding in self._bindings.items()},
        )  # fmt: skip
        set_seed(self.seed, 0)
        self.event("init", world=carrier.size, strategy=strategy.name)
        if place.own_process:  # the last thing here: what fails before closes nothing twice
            atexit.register(self.close)

    # ---------------------------------------------------------------- models

    @overload
    def prepare(self, model: M, optimizer: O, /, *, units: Sequence[str] | int | None = None, elementwise: bool | None = None, float32: Sequence[str] = (), fill: Fill | None = None, compile: bool | Mapping[str, object] = False, name: str = "") -> tuple[M, O]: ...  # fmt: skip  # noqa: E501
    @overload
    def prepare(self, model: M, optimizer: O, loader: DataLoader[T], /, *, units: Sequence[str] | int | None = None, elementwise: bool | None = None, float32: Sequence[str] = (), fill: Fill | None = None, compile: bool | Mapping[str, object] = False, name: str = "") -> tuple[M, O, Loader[T]]: ...  # fmt: skip  # noqa: E501
    @overload
    def prepare(self, model: M, optimizer: O, loader: DataLoader[T], scheduler: S, /, *, units: Sequence[str] | int | None = None, elementwise: bool | None = None, float32: Sequence[str] = (), fill: Fill | None = None, compile: bool | Mapping[str, object] = False, name: str = "") -> tuple[M, O, Loader[T], S]: ...  # fmt: skip  # noqa: E501
    @overload
    def prepare(self, model: M, optimizer: O, scheduler: S, /, *, units: Sequence[str] | int | None = None, elementwise: bool | None = None, float32: Sequence[str] = (), fill: Fill | None = None, compile: bool | Mapping[str, object] = False, name: str = "") -> tuple[M, O, S]: ...  # fmt: skip  # noqa: E501
    def prepare(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None, /,
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
        if optimizer is None:
            raise OptimizerError(
                "job.prepare was given a model and no optimizer",
                remedy="job.prepare(model, optimizer); to evaluate a checkpoint, the kind that it was trained with",
            )
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if self._trace is not None:
            self._trace.widen(model)
        facts = {
            "shoal": __version__, "torch": ".".join(torch.__version__.split(".")[:2]), "strategy": self.strategy.name,
            "seed": self.seed, "overlap": self.resolved.settings.overlap, "name": name,
            "pending": self.resolved.settings.pending, "layerwise": self.resolved.settings.layerwise,
            "one_round": self.resolved.settings.one_round,
            "memory": "none" if self._budget.limit is None else "a budget",
            "float32": list(float32), "compile": str(compile),
        }  # fmt: skip
        number = 1 + max((binding.engine.number for binding in self._bindings.values()), default=-1)
        mesh = self._mesh.again(number) if number else self._mesh
        wanted = setup.Wanted(
            strategy=self.strategy, rules=rules(self.strategy), mesh=mesh, meeting=self._meeting,
            overlap=self.resolved.settings.overlap, pending=self.resolved.settings.pending, units=units,
            elementwise=elementwise, float32=float32, fill=fill, compile=compile,
            device=self.device, facts=facts, say=self._say, ended=self._feed.ended,
            number=number, first=self._next_unit(),
            prefix=f"{name}/" if name else "", budget=self._budget, layerwise=self.resolved.settings.layerwise,
        )  # fmt: skip
        binding = self._bindings[name] = setup.build(model, optimizers, wanted)
        ours(*optimizers)
        self._wanted[name] = wanted
        self._bind(binding)
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

    # ---------------------------------------------------------------- looking at it

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
