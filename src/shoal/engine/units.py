"""Which parameters travel together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import cast

from torch import nn

from shoal.engine.cells import local
from shoal.engine.precision import Dtypes, dtypes
from shoal.engine.unit import Part, Unit, memory_order
from shoal.errors import ModelError, nearest
from shoal.layout import Item, Layout
from shoal.strategy import Cut, Strategy

ROOT = "(root)"
"""The unit of what belongs to no block."""

SMALLEST = 4096
"""Elements. A block with fewer stays with the block around it."""


def choose(model: nn.Module, named: Sequence[str] | None = None, *, smallest: int = SMALLEST) -> dict[str, nn.Module]:
    """The blocks whose parameters travel together, by module name; the model itself ("") comes last, for the rest.

    Args:
        model: the whole model.
        named: module names to use; None: the blocks of every ModuleList or Sequential, if not very small.
        smallest: elements of a block, so that it is not very small.

    Raises:
        ModelError: a name that is no module of this model.
    """
    modules = dict(cast(Iterable[tuple[str, nn.Module]], model.named_modules()))
    if named is not None:
        for name in named:
            if name not in modules:
                raise ModelError(f"units= names {name!r}, which is no module", remedy=nearest(name, modules))
            if not _has_forward(modules[name]):
                children = ", ".join(f"{name}.{n}" for n, _ in modules[name].named_children())
                raise ModelError(
                    f"units= names {name!r}, a {type(modules[name]).__name__}, which has no forward to enter",
                    remedy=f"name {children}",
                )
        return {name: modules[name] for name in modules if name in named and name} | {"": model}
    return {name: m for name, m in _blocks(model, "", smallest) if name} | {"": model}


def _blocks(module: nn.Module, prefix: str, smallest: int) -> Iterator[tuple[str, nn.Module]]:
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if is_list and _has_forward(child) and not isinstance(child, nn.Sequential):
            if sum(p.numel() for p in child.parameters()) >= smallest:
                yield name, child
        else:
            yield from _blocks(child, f"{name}.", smallest)


def _has_forward(module: nn.Module) -> bool:
    """Containers, and modules that only hold others, are never entered: no hook of theirs would run."""
    return type(module).forward is not nn.Module.forward


def parts(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    s: Strategy,
    owners: int,
    granules: Mapping[nn.Parameter, int],
    keep: Collection[nn.Parameter] = (),
) -> list[Part]:
    """Give every parameter to the smallest block that contains all its uses, and cut each unit for `owners` ranks.

    A block's parameters that differ in dtype, or in being trained or not, become units of their own. Those in `keep`
    compute in their own dtype.
    """
    loads = [0] * owners
    made: list[Part] = []
    for block, params in _claim(model, blocks).items():
        for (kinds, trainable), group in _alike(params, s, keep).items():
            items = [Item(n, tuple(local(p).shape), granules.get(p, 64)) for n, p in group.items()]
            layout = Layout.even(items, owners) if s.cut is Cut.EVEN else Layout.by_parameter(items, owners, loads)
            made.append(
                Part(
                    name=block or ROOT, module=blocks[block], params=group, dtypes=kinds, trainable=trainable,
                    layout=layout,
                    orders={n: o for n, p in group.items() if granules.get(p, 64) and (o := memory_order(local(p)))},
                )
            )  # fmt: skip
    return made


def _claim(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Parameter]]:
    users: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        users.setdefault(param, []).append(name)
    claimed: dict[str, dict[str, nn.Parameter]] = {block: {} for block in blocks}
    for param, names in users.items():
        around = [b for b in blocks if all(n.startswith(f"{b}.") for n in names) or not b]
        claimed[max(around, key=len)][names[0]] = param
    return claimed


def _alike(
    params: Mapping[str, nn.Parameter], s: Strategy, keep: Collection[nn.Parameter]
) -> dict[tuple[Dtypes, bool], dict[str, nn.Parameter]]:
    groups: dict[tuple[Dtypes, bool], dict[str, nn.Parameter]] = {}
    for name, param in params.items():
        groups.setdefault((dtypes(param, s, keep=param in keep), param.requires_grad), {})[name] = param
    return groups


def around(units: Sequence[Unit]) -> dict[int, set[int]]:
    """Per unit, the units of the blocks that its own lies in."""

    def lies_in(a: Unit, b: Unit) -> bool:
        return b.module is not a.module and (b.name == ROOT or a.name.startswith(f"{b.name}."))

    return {a.index: {b.index for b in units if lies_in(a, b)} for a in units}


def together(units: Sequence[Unit]) -> list[list[int]]:
    """The units of every block, in the order in which its hooks name them."""
    found: dict[nn.Module, list[int]] = {}
    for unit in units:
        found.setdefault(unit.module, []).append(unit.index)
    return list(found.values())


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters and buffers, each with the name under which it is kept."""
    found: dict[str, str] = {}
    for every in (model.named_parameters, model.named_buffers):
        first: dict[int, str] = {}
        for name, tensor in _all(every(remove_duplicate=False)):
            if first.setdefault(id(tensor), name) != name:
                found[name] = first[id(tensor)]
    return found


def _all(pairs: Iterable[tuple[str, object]]) -> list[tuple[str, object]]:
    return list(pairs)
