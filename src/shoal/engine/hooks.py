"""Hooks on the user's model. They only tell the engine that a moment has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from shoal.engine.autograd import in_backward
from shoal.engine.engine import Engine
from shoal.engine.precision import cast_floats, each_tensor, tensors
from shoal.engine.scale import entering, leaving
from shoal.engine.unit import Unit


class Handle(Protocol):
    def remove(self) -> None: ...


Args = tuple[object, ...]
Kwargs = dict[str, object]


def install(engine: Engine, compute: torch.dtype, keep: Sequence[nn.Module] = ()) -> list[Handle]:
    """Put the hooks on.

    Args:
        compute: the dtype that floating inputs are cast to (float32: left alone).
        keep: modules that compute in float32 all the same.
    """
    handles: list[Handle] = _root(engine, compute)
    handles += _watched(engine) if engine.gathers else []
    if compute != torch.float32:
        for module in outermost(keep):
            handles += _kept(module, compute)
    blocks, ends = _blocks(engine.units)
    for block, units in blocks.items():
        if engine.gathers or engine.overlap or engine.gradients.journeys.gated or compute != torch.float32:
            handles += _block(engine, block, units, ends.pop(block, []), compute)
    for block, finished in ends.items() if engine.overlap else ():
        handles.append(_inner(engine, block, finished))
    for unit in engine.units:
        for name, param in unit.params.items() if unit.trainable else ():
            after = partial(engine.moments.after_gradient, unit, name)
            handles += [cast(Handle, param.register_post_accumulate_grad_hook(after))]
    handles.append(engine.model.register_forward_hook(_after_root(engine, compute), always_call=False))
    return handles


End = tuple[Unit, int]


def _blocks(units: Sequence[Unit]) -> tuple[dict[nn.Module, list[Unit]], dict[nn.Module, list[End]]]:
    """By module: the units that it needs, and the ends of units that its backward is."""
    blocks: dict[nn.Module, list[Unit]] = {}
    ends: dict[nn.Module, list[End]] = {}
    for unit in units:
        for module in unit.modules.values():
            blocks.setdefault(module, []).append(unit)
        for number, module in unit.ends.items() if unit.trainable else ():
            ends.setdefault(module, []).append((unit, number))
    return blocks, ends


def _root(engine: Engine, compute: torch.dtype) -> list[Handle]:
    def before(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if torch.is_grad_enabled() and module.training:
            engine.open()
        scale = engine.scale
        if scale is not None and engine.leaf is not None:
            args, kwargs = each_tensor((args, kwargs), lambda t: entering(t, scale))
        if compute == torch.float32:
            return args, kwargs
        return cast_floats(args, compute), cast_floats(kwargs, compute)

    return [engine.model.register_forward_pre_hook(before, with_kwargs=True)]


def outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that lie in no other of them."""
    inner = {m for module in modules for m in module.modules() if m is not module}
    return [m for m in modules if m not in inner]


def _kept(module: nn.Module, compute: torch.dtype) -> list[Handle]:
    """Float32 inside, the others' dtype outside."""

    def before(_module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return cast_floats(args, torch.float32), cast_floats(kwargs, torch.float32)

    def after(_module: nn.Module, _args: Args, output: object) -> object:
        return cast_floats(output, compute, only=torch.float32)

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]


def _watched(engine: Engine) -> list[Handle]:
    """In leaves without a plan, watch what autograd saves: a view of freed parameters must not be read (see `Unit`)."""
    watches: list[saved_tensors_hooks] = []

    def pack(tensor: Tensor) -> Tensor | tuple[Tensor, Unit]:
        unit = engine.presence.owner(tensor)
        return tensor if unit is None else (tensor, unit)

    def unpack(saved: Tensor | tuple[Tensor, Unit]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        engine.presence.check_here(saved[1])
        return saved[0]

    def before(_module: nn.Module, _args: Args) -> None:
        if engine.recording and torch.is_grad_enabled():
            watches.append(saved_tensors_hooks(pack, unpack))
            watches[-1].__enter__()

    def after(_module: nn.Module, _args: Args, _output: object) -> None:
        if watches:
            watches.pop().__exit__()

    model = engine.model
    return [model.register_forward_pre_hook(before), model.register_forward_hook(after, always_call=True)]


def _after_root(engine: Engine, compute: torch.dtype) -> Callable[[nn.Module, Args, object], object]:
    def after(_module: nn.Module, _args: Args, output: object) -> object:
        if compute != torch.float32:
            output = cast_floats(output, torch.float32, only=compute)
        scale = engine.scale
        if scale is not None and engine.leaf is not None:
            output = each_tensor(output, lambda t: leaving(t, scale))
        for tensor in tensors(output):
            _at_node(tensor, engine.moments.backward_begins)
        engine.moments.forward_ends()
        return output

    return after


def _at_node(tensor: Tensor, call: Callable[[], None]) -> None:
    """Call when the gradient of a tensor reaches what made it: after the tensor's own hooks, of whatever came next."""

    def hook(_grads: tuple[Tensor | None, ...]) -> None:
        call()

    if tensor.grad_fn is not None:
        tensor.grad_fn.register_prehook(hook)  # pyright: ignore[reportArgumentType]


def _inner(engine: Engine, module: nn.Module, ends: list[End]) -> Handle:
    """A module inside a block, with a unit of its own: it only says when its gradients are there."""

    def input_done(_grad: Tensor) -> None:
        engine.moments.after_backward((), module, ends)

    def before(_module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if torch.is_grad_enabled() and not in_backward():
            for tensor in tensors((args, kwargs)):
                if tensor.grad_fn is not None:
                    tensor.register_hook(input_done)

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _block(
    engine: Engine, block: nn.Module, units: list[Unit], ends: list[End], compute: torch.dtype
) -> list[Handle]:  # fmt: skip
    def input_done(_grad: Tensor) -> None:
        engine.moments.after_backward(units, block, ends)

    def before(_module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        engine.moments.before_forward(units, block)
        if torch.is_grad_enabled() and not in_backward():
            for tensor in tensors((args, kwargs)):
                if tensor.grad_fn is not None:
                    tensor.register_hook(input_done)
        if compute == torch.float32:
            return args, kwargs
        return cast_floats(args, compute), cast_floats(kwargs, compute)

    def after(_module: nn.Module, _args: Args, output: object) -> None:
        found = tensors(output)
        if torch.is_grad_enabled():
            for tensor in found:
                _at_node(tensor, lambda: engine.moments.before_backward(units, block))
        engine.moments.after_forward(units, block, found, recomputing=in_backward())

    return [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ]
