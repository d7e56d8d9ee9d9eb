"""Refusals on the user's own objects: to read, write or copy state where it is not whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import cast

from torch import nn
from torch.optim import Optimizer

from shoal.engine.engine import Engine
from shoal.engine.hooks import Handle
from shoal.errors import AwayError


def guard_optimizer(optimizer: Optimizer) -> list[Handle]:
    """For one that holds pieces."""

    def no_state(*_: object) -> None:
        raise AwayError(
            "optimizer.state_dict() would hold only this rank's pieces",
            remedy="on all ranks, job.state_dict(optimizer) or job.save(path)",
        )

    def no_load(*_: object) -> None:
        raise AwayError(
            "optimizer.load_state_dict() takes whole state, and this rank holds pieces",
            remedy="load it before prepare, which cuts it, or job.load(path)",
        )

    return [
        optimizer.register_state_dict_pre_hook(no_state),
        optimizer.register_load_state_dict_pre_hook(no_load),
    ]


def guard_model(engine: Engine) -> list[Handle]:
    """For a model whose parameters are away, or only copies of what is trained."""
    if any(not u.resident for u in engine.units):
        what = "placeholders: the model's parameters live in shards"
    elif any(u.dtypes.compute != u.dtypes.master for u in engine.units):
        what = "copies in a narrower dtype: what is trained lives apart from the model"
    else:
        return []

    def no_state(*_: object) -> None:
        if not engine.leased:
            raise AwayError(
                f"model.state_dict() would hold {what}",
                remedy="on all ranks, job.state_dict(model) or `with job.whole(model): ...`",
            )

    def no_load(*_: object) -> None:
        if not engine.leased:
            raise AwayError(
                f"model.load_state_dict() would write to {what}",
                remedy="with job.whole(model, write=True): model.load_state_dict(...)",
            )

    handles: list[Handle] = []
    for module in engine.model.modules():
        if next(module.parameters(), None) is None:  # nothing is away, and another model may hold it too
            continue
        handles.append(module.register_state_dict_pre_hook(no_state))
        handles.append(module.register_load_state_dict_pre_hook(no_load))
    return handles


def bring_up_to_date(engine: Engine, optimizers: Iterable[Optimizer]) -> list[Handle]:
    """Before state is read or written that a pending update will change."""

    def flush(*_: object) -> None:
        engine.updates.flush()

    handles: list[Handle] = []
    for optimizer in optimizers:
        handles.append(optimizer.register_state_dict_pre_hook(flush))
        handles.append(optimizer.register_load_state_dict_pre_hook(flush))
    for module in engine.model.modules():
        handles.append(module.register_state_dict_pre_hook(flush))
        handles.append(module.register_load_state_dict_pre_hook(flush))
    return handles


class Uncopied:
    """Lets `copy.deepcopy` make a plain copy of a prepared module, without shoal's hooks, where its values are whole.

    Args:
        engine: of the model.
        handles: shoal's hooks on it.
    """

    def __init__(self, engine: Engine, handles: Iterable[Handle]) -> None:
        self.engine = engine
        self.hooks = {getattr(h, "id", None) for h in handles}
        modules = [m for m in engine.model.modules() if not hasattr(type(m), "__deepcopy__")]
        self.copiers = {m: self._copier(m) for m in modules}
        for module, copier in self.copiers.items():
            module.__dict__["__deepcopy__"] = copier

    def _copier(self, module: nn.Module) -> Callable[[dict[int, object]], nn.Module]:
        def copier(memo: dict[int, object]) -> nn.Module:
            self.engine.updates.flush()
            away = not self.engine.leased and any(not u.resident for u in self.engine.units)
            if away and next(module.parameters(), None) is not None:
                raise AwayError(
                    f"a copy of this {type(module).__name__} would hold placeholders: its parameters live in shards",
                    remedy="with job.whole(model): twin = copy.deepcopy(model); for an average: job.ema(model, decay)",
                )
            twin = type(module).__new__(type(module))
            memo[id(module)] = twin
            for name, value in module.__dict__.items():
                if name.endswith(("_hooks", "_with_kwargs", "_always_called")) and isinstance(value, dict):
                    hooks = cast(dict[object, object], value)
                    value = type(hooks)({k: v for k, v in hooks.items() if k not in self.hooks})
                if name != "__deepcopy__" and value is not module and value is not nullcontext:  # see `Names`
                    twin.__dict__[name] = copy.deepcopy(value, memo)
            return twin

        return copier

    def remove(self) -> None:
        for module, copier in self.copiers.items():
            if module.__dict__.get("__deepcopy__") is copier:  # not that of another model, which holds it too
                del module.__dict__["__deepcopy__"]
