"""What scripts do to a wrapped model out of habit: `model.module`, `model.no_sync()`, a look at gradients, clipping."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from shoal.comm.meet import Want
from shoal.engine.binding import Binding
from shoal.errors import OrderError


class Names:
    """`model.module` and `model.no_sync()`, as torch's wrapper has them, on the user's own model.

    `module` is the model itself. `no_sync` does nothing, and is right: gradients travel when the leaf is over, however
    many backward calls it has. A model that has such a name already keeps its own.

    Args:
        model: the prepared one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        wanted: dict[str, object] = {"module": model, "no_sync": nullcontext}
        self.given = {name: value for name, value in wanted.items() if not hasattr(model, name)}
        model.__dict__.update(self.given)  # past nn.Module, which would make a submodule of it

    def remove(self) -> None:
        for name, value in self.given.items():
            if self.model.__dict__.get(name) is value:
                del self.model.__dict__[name]


@contextmanager
def whole_gradients(binding: Binding) -> Generator[bool]:
    """See `Job.gradients`."""
    engine = binding.engine
    if binding.strategy.tensor > 1:
        raise OrderError(
            f"job.gradients with tensor={binding.strategy.tensor}: gradients are boxes of DTensors",
            remedy="job.clip_grad_norm(math.inf), which returns the true global norm",
        )
    if engine.turn < engine.own_turns - 1:
        yield False
        return
    engine.settle()
    engine.meeting.meet(Want.GRADIENTS, engine.steps, model=engine.number)
    gradients = engine.gradients
    for unit in gradients.units:
        flat = torch.zeros(unit.numel, dtype=unit.dtypes.master, device=unit.device)
        for p in unit.owned:
            grad = unit.pieces[p.name].grad
            if grad is not None:
                start = unit.mine.start + p.at
                flat[start : start + p.numel].copy_(grad.reshape(-1))
        unit.shard.gather("gradients", flat, unit.layout.bounds).wait()
        touched = engine.decided.touched if engine.decided is not None else frozenset[str]()
        for name, grad in unit.views_of(flat).items():
            unit.params[name].grad = grad.to(unit.dtypes.compute) if name in touched else None
    try:
        yield True
    finally:
        for unit in gradients.units:
            for name, param in unit.params.items():
                param.grad = gradients.guards[name]


def clip_values(binding: Binding, limit: float) -> bool | None:
    """See `Job.clip_grad_value`."""
    if not 0 <= limit < math.inf:
        raise OrderError(f"job.clip_grad_value({limit:g})", remedy="a limit of at least 0, such as 1.0")
    engine = binding.engine
    if engine.turn < engine.own_turns - 1:
        return None
    engine.settle()
    engine.meeting.meet(Want.CLIP, engine.steps, model=engine.number)

    def clamp(part: Tensor) -> None:
        part.clamp_(-limit, limit)

    if engine.overflow is None:
        engine.gradients.change(clamp)
    return True
