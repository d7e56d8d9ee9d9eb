"""The parity oracle: a few steps under a strategy, and the same steps in one process, compared bit by bit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from shoal.comm.threads import run
from shoal.errors import OrderError, SettingError, nearest
from shoal.job import init
from shoal.launch.run import Outcome, launch
from shoal.strategy import Shard, Strategy
from shoal.trace import Trace, Traced

MakeModel = Callable[[], nn.Module]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Loss = Callable[[nn.Module, int, int], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `verify` found. `step` (from 0) and `name` of the first difference, and its distance in `ulps`.

    `why` says in words what differs if it is no number: a name, a shape, the count of steps.
    """

    equal: bool
    steps: int
    step: int | None = None
    name: str | None = None
    ulps: int | None = None
    differing: int = 0
    why: str = ""

    def __str__(self) -> str:
        if self.equal:
            return f"the same bits after each of {self.steps} steps"
        if self.why:
            return f"different after step {self.step}: {self.why}"
        return f"different after step {self.step}: '{self.name}' by up to {self.ulps} ulps in {self.differing} elements"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What is trained to compare; the function that returns it is called once per rank, with equal generators.

    Args:
        model: on the CPU.
        optimizer: over its parameters.
        loss: `loss(model, step, leaf)` runs the forward of one leaf.
        clip: maximal gradient norm; None: no clipping.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Loss
    clip: float | None = None


def verify(
    make_model: MakeModel, make_optimizer: MakeOptimizer, loss: Loss, strategy: str | Strategy = "zero3", *,
    workers: int = 2, leaves: int | None = None, steps: int = 3, seed: int = 0, clip: float | None = None,
) -> Report:  # fmt: skip
    """Train under `strategy` with ranks that are threads, and in a world of one; compare all parameters and buffers.

    Args:
        make_model: builds the model; called once per rank with equal generators.
        make_optimizer: from parameters.
        loss: `loss(model, step, leaf)` runs the forward of one leaf.
        strategy: a name or a `Strategy`.
        workers: ranks of the run under test.
        leaves: of one step; default the workers.
        steps: how many to compare.
        seed: of the job.
        clip: maximal gradient norm; None: no clipping.
    """

    def make() -> Trial:
        model = make_model()
        return Trial(model=model, optimizer=make_optimizer(model.parameters()), loss=loss, clip=clip)

    return verify_trial(make, strategy, workers=workers, leaves=leaves, steps=steps, seed=seed)


def verify_trial(
    make: Callable[[], Trial], strategy: str | Strategy = "zero3", *,
    workers: int = 2, leaves: int | None = None, steps: int = 3, seed: int = 0,
) -> Report:  # fmt: skip
    """`verify` for what one function makes."""
    tested = strategy if isinstance(strategy, Strategy) else Strategy.named(strategy)
    tested = replace(tested, leaves=leaves or tested.leaves or workers)
    # Only what is no number may differ: precision, reduce, twig and masters stay.
    alone = replace(tested, shard=Shard.NOTHING, ranks_per_copy=None)
    states = [_train(make, s, world, steps, seed) for s, world in ((tested, workers), (alone, 1))]
    return compare(*states)


def _train(
    make: Callable[[], Trial], strategy: Strategy, world: int, steps: int, seed: int
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Rank 0's state dict after each step."""
    leaves = strategy.leaves or world

    def rank_main(_rank: int) -> list[dict[str, Tensor]]:
        with init(strategy, seed=seed, run_dir="none", device="cpu") as job:
            trial = make()
            model, optimizer = job.prepare(trial.model, trial.optimizer)
            loader = job.loader(cast("Dataset[int]", range(leaves * steps)), global_batch=leaves, shuffle=False)
            states: list[dict[str, Tensor]] = []
            for number in loader:
                trial.loss(model, *divmod(int(number), leaves)).backward()
                if trial.clip is not None:
                    job.clip_grad_norm(trial.clip)
                optimizer.step()
                optimizer.zero_grad()
                if job.stepped:
                    states.append(cast(dict[str, Tensor], job.state_dict(model)))
            return states

    return run(world, rank_main)[0]


def verify_script(
    argv: Sequence[str], strategy: str = "zero3", *, workers: int = 2, steps: int = 3
) -> Report | Outcome:
    """Run a training script twice, with `workers` processes under `strategy` and with one; compare its models.

    Each run ends after `steps` steps that act, or with the script. Its checkpoints go to a directory of the moment. Its
    standard output goes to standard error.

    Args:
        argv: the script and its arguments.
        strategy: a name.
        workers: processes of the run under test.
        steps: how many to compare.

    Returns:
        What was found, or how a run ended that failed.

    Raises:
        ConfigError: there is no such script or strategy.
        OrderError: the script took no step that acts.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-verify-") as directory:
        tested, alone = (Trace(Path(directory, name), steps) for name in ("tested", "alone"))
        failed = run_traced(argv, tested, workers, {"strategy": strategy})
        if failed is not None:
            return failed
        facts = facts_of(tested, argv[0])
        same = {"leaves": facts.leaves, "device": facts.device}
        failed = run_traced(argv, alone, 1, {"strategy": "ddp", "ranks_per_copy": 1, **same})
        return failed or compare(tested.states(), alone.states())


def run_traced(argv: Sequence[str], trace: Trace, workers: int, flags: Mapping[str, object]) -> Outcome | None:
    """Run a script, leaving a trace. Returns how it ended, if it failed."""
    trace.path.mkdir()
    environ = {**os.environ, **trace.variable()}
    outcome = launch(argv, workers=workers, flags=flags, run_dir="none", environ=environ, keep_stdout=True)
    return outcome if outcome.exit_code else None


def facts_of(trace: Trace, script: str) -> Traced:
    """What the script's job said of itself.

    Raises:
        OrderError: the script took no step that acts.
    """
    facts = trace.facts()
    if facts is None:
        raise OrderError(
            f"{script} took no step that acts: there is nothing to compare",
            remedy="a script that trains: shoal.init, job.prepare, optimizer.step()",
        )
    return facts


def find_trial(name: str) -> Callable[[], Trial]:
    """The function `module:function`. It returns a `Trial` or (model, optimizer, loss).

    Raises:
        SettingError: there is no such module or function, or it returns something else.
    """
    module_name, _, function = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise  # the module is there, and what it imports is not
        raise SettingError(
            f"there is no module {module_name!r}", remedy="module:function, found from this directory; or a script"
        ) from None
    factory: object = getattr(module, function, None)
    if not callable(factory):
        known = [n for n, v in cast(dict[str, object], vars(module)).items() if callable(v) and not n.startswith("_")]
        raise SettingError(f"{module_name} has no function {function!r}", remedy=nearest(function, known))
    return lambda: _as_trial(factory(), name)


def _as_trial(made: object, name: str) -> Trial:
    if isinstance(made, Trial):
        return made
    parts = cast(tuple[object, ...], made) if isinstance(made, tuple) else (made,)
    if len(parts) == 3:
        model, optimizer, loss = parts
        if isinstance(model, nn.Module) and isinstance(optimizer, Optimizer) and callable(loss):
            return Trial(model=model, optimizer=optimizer, loss=cast(Loss, loss))
    raise SettingError(
        f"{name} returned {', '.join(type(part).__name__ for part in parts)}",
        remedy="return model, optimizer, loss with loss(model, step, leaf), or a shoal.Trial",
    )


def compare(tested: Sequence[Mapping[str, Tensor]], expected: Sequence[Mapping[str, Tensor]]) -> Report:
    """The first difference between two runs' states, step by step, in the model's order."""
    steps = min(len(tested), len(expected))
    for step, (a, b) in enumerate(zip(tested, expected, strict=False)):
        for name in [*b, *(n for n in a if n not in b)]:
            why = _unlike(name, a.get(name), b.get(name))
            if why:
                return Report(equal=False, steps=len(tested), step=step, name=name, why=why)
            apart = ulps(a[name], b[name])
            if apart.any():
                return Report(
                    equal=False, steps=len(tested), step=step, name=name, ulps=int(apart.max()),
                    differing=int(apart.count_nonzero()),
                )  # fmt: skip
    if len(tested) != len(expected):
        why = f"{len(tested)} steps in the run under test, {len(expected)} in one process"
        return Report(equal=False, steps=steps, step=steps, why=why)
    return Report(equal=True, steps=steps)


def _unlike(name: str, a: Tensor | None, b: Tensor | None) -> str:
    """What makes two tensors impossible to compare; nothing if they can be."""
    if a is None or b is None:
        return f"'{name}' is only in the run {'under test' if b is None else 'in one process'}"
    kinds = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (a, b)]
    return "" if kinds[0] == kinds[1] else f"'{name}' is {kinds[0]} in the run under test, {kinds[1]} in one process"


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between `a` and `b`, per element; 0 and -0 are one apart."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    kind = sizes[a.element_size()]
    x, y = a.contiguous().view(kind).long(), b.contiguous().view(kind).long()
    if a.dtype.is_floating_point:
        magnitude = torch.iinfo(kind).max
        x, y = (torch.where(v < 0, -1 - (v & magnitude), v) for v in (x, y))
    return (x - y).abs()
