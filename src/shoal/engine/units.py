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

MIB = 2**20

SMALLEST = 4096
"""Elements. A block with fewer stays with the block around it."""


SIZE = 2**20
"""Bytes from which on a block travels alone: with fewer, what a transfer costs by itself would count for more."""

ROOT_PIECE, ROOT_SPLIT = 1, 4
"""Times `SIZE`: the gradients of what belongs to no block come last, so they are cut where they are more than the
second number, into pieces of the first one at least."""
BLOCK_PIECE, BLOCK_SPLIT = 4, 32
"""The same for a block, whose neighbours are under way meanwhile."""


def wish(units: Sequence[str] | int | None) -> tuple[Sequence[str] | None, int]:
    """What `units=` of `prepare` means: names of blocks, if it gives them, and up to which size they are merged."""
    if units is None:
        return None, SIZE
    return (None, units) if isinstance(units, int) else (units, 0)


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
    *,
    size: int = 0,
) -> list[Part]:
    """Give every parameter to the smallest block that contains all its uses, and cut each unit for `owners` ranks.

    A block's parameters that differ in dtype, or in being trained or not, become units of their own. Those in `keep`
    compute in their own dtype.

    Args:
        size: bytes of a unit, about: neighbours with less become one, one with much more several; 0: each for itself.
    """
    loads = [0] * owners
    made: list[Part] = []
    claimed = _claim(model, blocks)
    for number, names in enumerate(neighbours({b: _bytes(params) for b, params in claimed.items()}, size)):
        params = {n: p for block in names for n, p in claimed[block].items()}
        for (kinds, trainable), alike in _alike(params, s, keep).items():
            homes = {b: found for b in names if (found := [n for n in claimed[b] if n in alike])}
            pieces = _pieces(alike, size, root=not names[0]) if len(names) == 1 else [alike]
            for piece in pieces:
                items = [Item(n, tuple(local(p).shape), granules.get(p, 64)) for n, p in piece.items()]
                layout = Layout.even(items, owners) if s.cut is Cut.EVEN else Layout.by_parameter(items, owners, loads)
                ends = _by_module(piece) if len(pieces) > 1 else homes
                made.append(
                    Part(
                        name=_name(homes, ends), group=number, modules={b: blocks[b] for b in homes},
                        ends=[(model.get_submodule(name), held) for name, held in ends.items()],
                        params=piece, dtypes=kinds, trainable=trainable, layout=layout,
                        orders=_orders(piece, granules),
                        why=_why(names, len(pieces), size, _bytes(alike)),
                    )
                )  # fmt: skip
    return made


def _orders(
    params: Mapping[str, nn.Parameter], granules: Mapping[nn.Parameter, int]
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    return {n: o for n, p in params.items() if granules.get(p, 64) and (o := memory_order(local(p)))}


def neighbours(sizes: Mapping[str, int], size: int) -> list[list[str]]:
    """Blocks that follow each other in one list, put together until they have `size` bytes. The rest of one joins in.

    Args:
        sizes: bytes of every block, in definition order.
    """
    groups: list[list[str]] = []
    before = ""  # the list that the last group may still grow in
    for block, nbytes in sizes.items():
        parent = block.rpartition(".")[0] or "(model)"
        if nbytes >= size or not block:
            groups.append([block])
            before = ""
            continue
        if parent == before:
            groups[-1].append(block)
        else:
            groups.append([block])
        before = "" if sum(sizes[b] for b in groups[-1]) >= size else parent
    return groups


def _pieces(params: Mapping[str, nn.Parameter], size: int, *, root: bool) -> list[Mapping[str, nn.Parameter]]:
    """The parameters of one block, cut between modules if they are very many bytes."""
    piece, split = (size * ROOT_PIECE, size * ROOT_SPLIT) if root else (size * BLOCK_PIECE, size * BLOCK_SPLIT)
    if not size or _bytes(params) <= split:
        return [params]
    found: list[dict[str, nn.Parameter]] = []
    small: dict[str, nn.Parameter] = {}
    for names in _by_module(params).values():
        own = {n: params[n] for n in names}
        if _bytes(own) >= piece:  # nothing else of its piece lets it wait
            found.append(own)
            continue
        small |= own
        if _bytes(small) >= piece:
            found.append(small)
            small = {}
    return [*found, small] if small else list(found)


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters by the module that holds them."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def _bytes(params: Mapping[str, nn.Parameter]) -> int:
    return sum(local(p).numel() * p.element_size() for p in params.values())


def _name(blocks: Iterable[str], ends: Iterable[str]) -> str:
    """What it is called in messages."""
    [first, *_], [*_, last], parts = blocks, blocks, list(ends)
    if parts == list(blocks):
        return first or ROOT if first == last else f"{first} to {last}"
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    return f"{parts[0] or ROOT}{more}"


def _why(blocks: Sequence[str], pieces: int, size: int, nbytes: int) -> str:
    if pieces > 1:
        return f"one of {pieces} pieces of {blocks[0] or ROOT}, {nbytes / MIB:.1f} MiB, cut between modules"
    if len(blocks) > 1:
        return f"{len(blocks)} neighbours, merged up to {size / MIB:.3g} MiB"
    return "" if blocks[0] else "what belongs to no block"


def explain(units: Sequence[Unit]) -> str:
    """A line for every unit: what is in it, how much, and why."""
    width = max(len(u.name) for u in units)
    lines = [f"{'unit':>6}  {'modules':{width}}  {'parameters':>12}  {'MiB':>8}"]
    for u in units:
        nbytes = u.layout.used * u.dtypes.compute.itemsize
        why = u.why if u.trainable else ", ".join(filter(None, [u.why, "frozen"]))
        lines.append(f"{u.index:6}  {u.name:{width}}  {u.layout.used:12,}  {nbytes / MIB:8.2f}  {why}".rstrip())
    return "\n".join(lines)


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
        inner, outer = next(iter(a.modules)), next(iter(b.modules))
        return not b.merged and inner != outer and (not outer or inner.startswith(f"{outer}."))

    return {a.index: {b.index for b in units if lies_in(a, b)} for a in units}


def beside(units: Sequence[Unit]) -> dict[int, set[int]]:
    """Per unit, those that are whole while it is: of its own blocks, and of all that these lie in."""
    holders: dict[str, set[int]] = {}
    for unit in units:
        for name in unit.modules:
            holders.setdefault(name, set()).add(unit.index)
    none = set[int]()
    return {
        u.index: set[int]().union(*(holders.get(n, none) for name in u.modules for n in _way_up(name))) - {u.index}
        for u in units
    }


def _way_up(name: str) -> Iterator[str]:
    """A module's name, and those of the modules that it lies in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def together(units: Sequence[Unit]) -> list[list[int]]:
    """The units of every block, in the order in which its hooks name them."""
    found: dict[tuple[str, ...], list[int]] = {}
    for unit in units:
        found.setdefault(tuple(unit.modules), []).append(unit.index)
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
