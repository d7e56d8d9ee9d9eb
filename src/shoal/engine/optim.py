"""Optimizers over pieces: which may be cut where, and how the user's own object comes to update them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.engine.cells import spread
from shoal.engine.unit import Unit
from shoal.errors import OptimizerError, SettingError
from shoal.layout import ALIGN, Interval
from shoal.optim import NeedsNorms


def in_blocks(value: object, piece: Tensor, optimizer: Optimizer) -> int:
    """If this state holds one number for every so many elements of its piece: how many; else 0."""
    granule = cast(object, getattr(optimizer, "granule", 0))
    if isinstance(granule, int) and granule and isinstance(value, Tensor) and value.dim() == 1:
        return granule if value.numel() == -(-piece.numel() // granule) and value.shape != piece.shape else 0
    return 0


_ELEMENTWISE = frozenset(
    ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop")
)
"""torch's own whose update of an element reads nothing of its neighbours."""


_LEAVE_GRADIENTS = frozenset(
    (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop)
)


def writes_gradients(optimizer: Optimizer) -> bool:
    """Might its `step()` write to gradients? torch's own may where they take many tensors at once."""
    hooks = (getattr(optimizer, f"_optimizer_step_{when}_hooks") for when in ("pre", "post"))
    several = any(group.get("foreach") for group in optimizer.param_groups)
    return type(optimizer) not in _LEAVE_GRADIENTS or several or any(hooks)


def by_units(optimizer: Optimizer) -> bool:
    """May its `step()` be taken unit by unit? Nobody must see that it is called several times."""
    hooks = (getattr(optimizer, f"_optimizer_step_{when}_hooks") for when in ("pre", "post"))
    torch_own = f"{type(optimizer).__module__}.".startswith("torch.optim.")
    return torch_own and type(optimizer).__name__ in _ELEMENTWISE and not any(hooks)


def check_layerwise(optimizers: Sequence[Optimizer], precision: str) -> None:
    """Raises where units cannot be updated one by one while others' gradients are not there yet."""
    if precision == "float16":
        raise SettingError(
            'layerwise=True with precision="float16"',
            cause="whether a step overflowed is known when all its gradients are there",
            remedy='precision="bfloat16", or layerwise=False',
        )
    names = [type(optimizer).__name__ for optimizer in optimizers]
    cause = "a unit is updated while gradients of other units are not there yet"
    if len(optimizers) > 1:
        raise OptimizerError(
            f"layerwise=True with {len(names)} optimizers over one model: {', '.join(names)}",
            cause=cause, remedy="one optimizer with groups, or layerwise=False",
        )  # fmt: skip
    if not by_units(optimizers[0]):
        raise OptimizerError(
            f"layerwise=True with {names[0]}, whose step may need all gradients at once",
            cause=cause,
            remedy="an element-wise optimizer of torch's, such as torch.optim.AdamW, without step hooks, or "
            "layerwise=False",
        )


def granule(optimizer: Optimizer, elementwise: bool | None) -> int:
    """At which multiples of elements the optimizer's parameters may be cut; 0: nowhere.

    Args:
        optimizer: the user's.
        elementwise: the user's own word; None: look torch's classes up and try others.

    Raises:
        OptimizerError: an optimizer that calls a closure several times a step.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            "LBFGS evaluates its closure several times a step, which leaves cannot follow",
            remedy="an optimizer without closures, such as torch.optim.AdamW",
        )
    own = cast(object, getattr(optimizer, "granule", None))
    if isinstance(own, int) and elementwise is None:
        if own % ALIGN:
            what = f"{type(optimizer).__name__}.granule is {own}"
            raise OptimizerError(what, remedy=f"a multiple of {ALIGN}, or 0 for whole parameters")
        return own
    if elementwise is None and isinstance(optimizer, NeedsNorms):
        return ALIGN
    torch_own = f"{type(optimizer).__module__}.".startswith("torch.optim.")
    if elementwise and torch_own and type(optimizer).__name__ not in _ELEMENTWISE:
        raise OptimizerError(
            f"elementwise=True with {type(optimizer).__name__}, whose update of an element reads its neighbours",
            remedy="leave elementwise= out: its parameters stay whole, each on one rank",
        )
    if elementwise is None:
        elementwise = type(optimizer).__name__ in _ELEMENTWISE if torch_own else probe(optimizer)
    return ALIGN if elementwise else 0


def probe(optimizer: Optimizer) -> bool:
    """Does it give the same bits when parameters are cut? Two steps on 192 elements, whole against cut at 64."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(192, generator=generator)
    grads = [torch.randn(192, generator=generator) for _ in range(2)]

    def train(cuts: Sequence[int], group: Mapping[str, object]) -> Tensor | None:
        parts = [nn.Parameter(p.clone()) for p in torch.split(start, list(cuts))]
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        twin.param_groups = [{**group, "params": parts}]
        try:
            for grad in grads:
                for part, g in zip(parts, torch.split(grad, list(cuts)), strict=True):
                    part.grad = g.clone()
                type(optimizer).step(twin)
        except Exception:  # the user's own code: whatever it cannot do with a flat tensor, it needs whole parameters
            return None
        return torch.cat([p.detach() for p in parts])

    for group in optimizer.param_groups:
        whole, cut = train([192], group), train([64, 64, 64], group)
        if whole is None or cut is None or not torch.equal(whole, cut):
            return False
    return True


def check(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Raises `OptimizerError` when they update something that the model does not have, or the same thing twice."""
    known = {p: n for n, p in model.named_parameters()}
    taken: dict[nn.Parameter, int] = {}
    for number, optimizer in enumerate(optimizers):
        held = [p for group in optimizer.param_groups for p in cast(list[nn.Parameter], group["params"])]
        strange = [p for p in held if p not in known]
        if strange:
            raise OptimizerError(
                f"the optimizer holds {len(strange)} parameters that the model does not have; the first has shape "
                f"{tuple(strange[0].shape)}",
                cause="it was made for another model, or before the model's parameters were replaced",
                remedy="make the optimizer from model.parameters()",
            )
        for param in held:
            if taken.setdefault(param, number) != number:
                first, second = (type(optimizers[n]).__name__ for n in (taken[param], number))
                raise OptimizerError(
                    f"'{known[param]}' is updated by two optimizers, {first} and {second}",
                    remedy="give every parameter to one of them",
                )


def granules(
    optimizers: Sequence[Optimizer], model: nn.Module, elementwise: bool | None
) -> dict[nn.Parameter, int]:  # fmt: skip
    """At which multiples of elements every parameter may be cut."""
    found = dict.fromkeys(model.parameters(), ALIGN)
    names = {p: n for n, p in model.named_parameters()}
    for optimizer in optimizers:
        cut = granule(optimizer, elementwise)
        apart = [p for group in optimizer.param_groups for p in group["params"] if spread(p)]
        if apart and (cut != ALIGN or isinstance(optimizer, NeedsNorms)):
            raise OptimizerError(
                f"{type(optimizer).__name__} reads whole parameters, and '{names[apart[0]]}' is spread over a cell",
                remedy="an element-wise optimizer, such as torch.optim.AdamW, for what tensor parallelism spreads",
            )
        found.update((p, cut) for group in optimizer.param_groups for p in group["params"])
    return found


def group_names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Per group, the names of its parameters."""
    names = {p: n for n, p in model.named_parameters()}
    return [[names[p] for p in cast(list[nn.Parameter], group["params"])] for group in optimizer.param_groups]


def point_to_pieces(optimizer: Optimizer, units: Iterable[Unit]) -> dict[nn.Parameter, str]:
    """Let the optimizer's groups hold this rank's pieces; groups keep their order and settings.

    State that is already there is cut with them. Returns each piece's parameter name.

    Raises:
        OptimizerError: state of another shape than its parameter's, for a parameter that is cut.
    """
    pieces: dict[nn.Parameter, tuple[Unit, Interval]] = {}
    names: dict[nn.Parameter, str] = {}
    for unit in units:
        for p in unit.layout.pieces(unit.shard.rank):
            piece = unit.pieces[p.name]
            pieces[unit.params[p.name]] = (unit, p)
            names[piece] = p.name
    old = dict(optimizer.state)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        params = cast(list[nn.Parameter], group["params"])
        held = [(p, *pieces[p]) for p in params if p in pieces]
        group["params"] = [unit.pieces[place.name] for _, unit, place in held]
        for param, unit, place in held:
            if param in old:
                state = cast(dict[str, object], old[param])
                cut = {key: _cut(value, key, param, unit, place, optimizer) for key, value in state.items()}
                optimizer.state[unit.pieces[place.name]] = cut
    return names


def _cut(
    value: object, key: str, param: nn.Parameter, unit: Unit, place: Interval, optimizer: Optimizer
) -> object:  # fmt: skip
    """The part of one state of a parameter that belongs to the piece at `place`."""
    if not isinstance(value, Tensor) or (value.dim() == 0 and value.shape != param.shape):
        return value
    if value.shape == param.shape:
        return unit.cut(place, value.detach()).clone()
    if granule := in_blocks(value, param, optimizer):
        return value[place.start // granule : -(-place.stop // granule)].clone()
    if place.complete:
        return value
    raise OptimizerError(
        f"state '{key}' of '{place.name}' has shape {tuple(value.shape)} and cannot be cut as its parameter of shape "
        f"{tuple(param.shape)}",
        remedy="prepare(..., elementwise=False), which keeps every parameter on one rank",
    )
