"""A unit and where its numbers are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.comm.group import Common, Group, Pending
from shoal.engine.away import hole, untouched
from shoal.engine.cells import local, spread
from shoal.engine.precision import Dtypes
from shoal.engine.rounding import round_into
from shoal.errors import AwayError
from shoal.layout import Interval, Layout, Span


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a unit is made of, before it has any storage."""

    name: str
    modules: Mapping[str, nn.Module]  # by their names: to enter one of them is to need the unit
    ends: Sequence[tuple[nn.Module, Collection[str]]]  # whose backward brings gradients, and of which parameters
    params: Mapping[str, nn.Parameter]
    dtypes: Dtypes
    trainable: bool
    layout: Layout
    orders: Mapping[str, tuple[int, ...]]  # of parameters that do not lie row by row: their dimensions as they lie
    group: int = 0  # of parts that were chosen together
    why: str = ""  # it is what it is
    flat: Tensor | None = None  # the parameters' values, if they lie in one buffer already


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions from the farthest strides to the nearest; None: row by row, or with gaps."""
    order = tuple(sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d)))
    if tensor.is_contiguous() or not tensor.permute(order).is_contiguous():
        return None
    return order


def view_of(flat: Tensor, shape: Sequence[int], order: Sequence[int] | None) -> Tensor:
    """A parameter that lies in `flat` with its dimensions in `order` (None: row by row)."""
    if order is None:
        return flat.view(shape)
    back = sorted(range(len(order)), key=lambda d: order[d])
    return flat.view([shape[d] for d in order]).permute(back)


LARGE = 2**16
"""Elements of a parameter whose gradient is taken as it is, not copied beside others."""


MOST_ENDS = 2**20
"""Numbers of ends are unique among all units."""


def _runs(spans: Sequence[Span], large: int) -> list[list[Span]]:
    """Large parameters apart, small ones that lie side by side together."""
    runs: list[list[Span]] = []
    for span in spans:
        if runs and span.numel < large and runs[-1][-1].numel < large:
            runs[-1].append(span)
        elif span.numel:
            runs.append([span])
    return runs


class Unit:
    """Parameters that travel together: one flat buffer to compute with, one shard to update.

    Note: who owns the gathered buffer. `whole` is one tensor for the unit's whole life; freeing resizes its storage to
    nothing and gathering resizes it back, so that views that autograd saved stay valid. The user's parameters point
    into it while it is there, and to one NaN expanded to their shape while it is not.
    """

    def __init__(self, index: int, part: Part, shard: Group, *, resident: bool, alone: bool = False) -> None:
        """`resident`: the whole stays on every rank between steps; `alone`: gradients never travel."""
        self.index, self.name, self.modules, self.layout = index, part.name, part.modules, part.layout
        self.merged, self.why = len(part.modules) > 1, part.why
        self.ends = {index * MOST_ENDS + i: module for i, (module, _) in enumerate(part.ends)}
        self.end_of = {n: index * MOST_ENDS + i for i, (_, names) in enumerate(part.ends) for n in names}
        self.params, self.dtypes, self.trainable = part.params, part.dtypes, part.trainable
        self.orders = part.orders
        same = part.dtypes.compute == part.dtypes.master
        self.shard, self.resident = shard, resident or (shard.size == 1 and same)
        self.mine = self.layout.shard(shard.rank)
        self.owned = tuple(self.layout.pieces(shard.rank))
        self.places = [(self.mine.start + p.at, self.mine.start + p.at + p.numel) for p in self.owned]
        self.alone = alone
        self.run_spans = _runs(self.layout.spans, 0 if alone else LARGE)
        self.runs = [(spans[0].start, spans[-1].stop) for spans in self.run_spans]
        self.device = next(iter(self.params.values())).device
        self.spread = frozenset(n for n, p in self.params.items() if spread(p))
        masters = self._flatten() if part.flat is None else part.flat.to(self.dtypes.master)
        self.common: Common | None = None
        if not self.resident:
            self.common = shard.common(self.numel, self.dtypes.compute, self.device)
        self.whole = self._place(masters, same=same, given=part.flat is not None)
        keeps = (self.whole if same else masters)[self.mine]
        self.master = keeps if same and (self.resident or self.common) else keeps.clone()
        self.views = self.views_of(self.whole)
        self.lent = self.whole
        self.wide: Tensor | None = None
        self.pieces = {p.name: self._piece(p) for p in self.owned}
        self.holes = hole(self.dtypes.compute, len(self.params), self.device)
        self.here = True
        self.coming: Pending | None = None
        self._show(self.views)
        if not self.resident:
            self.free()
            if part.flat is not None:
                part.flat.untyped_storage().resize_(0)  # whoever made it may keep it while the next one is made

    def _place(self, masters: Tensor, *, same: bool, given: bool) -> Tensor:
        """The whole, where it will stay. `given`: the masters are nobody else's."""
        if self.common is not None:
            self.common.data[self.mine].copy_(masters[self.mine])
            self.common.publish()
            return self.common.data
        if self.shard.size == 1:
            return masters if same else masters.to(self.dtypes.compute)
        if not self.resident:  # its storage is resized, which memory of a carrier's may not be
            return masters.to(self.dtypes.compute, copy=not given)
        return self.shard.carrier.empty(self.numel, self.dtypes.compute, self.device).copy_(masters)

    def __repr__(self) -> str:
        return f"unit {self.index} '{self.name}'"

    @property
    def numel(self) -> int:
        return self.layout.numel

    def _flatten(self) -> Tensor:
        flat = torch.zeros(self.layout.numel, dtype=self.dtypes.master, device=self.device)
        with torch.no_grad():
            for s in self.layout.spans:
                flat[s.start : s.stop].copy_(self.as_it_lies(s.name, local(self.params[s.name]).detach()).reshape(-1))
        return flat

    def as_it_lies(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a parameter's shape, with its dimensions in the order in which the parameter lies in memory."""
        return tensor.permute(self.orders[name]) if name in self.orders else tensor

    def cut(self, place: Interval, whole: Tensor) -> Tensor:
        """Of a tensor of a parameter's shape, the part that belongs to the piece at `place`, shaped like it."""
        flat = self.as_it_lies(place.name, whole).reshape(-1)
        return flat[place.start : place.stop].view(self.pieces[place.name].shape)

    def views_of(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters in a flat buffer, in their own shapes."""
        return {s.name: view_of(flat[s.start : s.stop], s.shape, self.orders.get(s.name)) for s in self.layout.spans}

    def _piece(self, p: Interval) -> nn.Parameter:
        data = self.master[p.at : p.at + p.numel]
        shape = [p.shape[d] for d in self.orders.get(p.name, range(len(p.shape)))]
        return nn.Parameter(data.view(shape) if p.complete else data, requires_grad=self.trainable)

    def widen(self) -> None:
        """Before an update that is rounded by chance: pieces are float32."""
        if self.dtypes.stochastic and self.trainable:
            self.wide = self.master.float()
            self._set_pieces(self.wide)

    def narrow(self, seeds: Callable[[str], int]) -> None:
        """After it: round. `seeds` gives one per parameter."""
        if self.wide is not None:
            for p in self.owned:
                part = slice(p.at, p.at + p.numel)
                round_into(self.master[part], self.wide[part], seeds(p.name), p.start)
            self._set_pieces(self.master)
            self.wide = None

    def _set_pieces(self, flat: Tensor) -> None:
        for p in self.owned:
            piece = self.pieces[p.name]
            piece.grad = None
            piece.data = flat[p.at : p.at + p.numel].view(piece.shape)

    def _show(self, values: Mapping[str, Tensor]) -> None:
        for name, param in self.params.items():
            local(param).data = values[name]
        self.shown = {n: local(p).data_ptr() for n, p in self.params.items()}
        self.versions = {n: p._version for n, p in self.params.items()}

    def _show_holes(self) -> None:
        self._show({n: h.expand(self.params[n].shape) for n, h in zip(self.params, self.holes.unbind(), strict=True)})

    def check_shown(self) -> None:
        """Raises `AwayError` when somebody has put other tensors in place of what is shown: they would not count."""
        replaced = [n for n, p in self.params.items() if local(p).data_ptr() != self.shown[n]]
        if replaced:
            raise AwayError(
                f"the values of {', '.join(map(repr, replaced))} were replaced by another tensor after prepare",
                cause="p.data = ..., model.to(), .half() or .double()",
                remedy="dtypes and devices before job.prepare, values inside `with job.whole(model, write=True)`",
            )

    def check_written(self) -> None:
        """Raises `AwayError` for writes into copies of what is trained."""
        written = [n for n, p in self.params.items() if p._version != self.versions[n]]
        if written and self.dtypes.compute != self.dtypes.master:
            raise AwayError(
                f"{', '.join(map(repr, written))} were changed in place, in copies of what is trained",
                cause=f"they compute in {str(self.dtypes.compute).removeprefix('torch.')}; masters lie apart",
                remedy="with job.whole(model, write=True): ...",
            )

    def hide(self) -> None:
        """The whole is outdated until the next gather."""
        if self.here:
            self.here = False
            self._show_holes()

    def gather(self, key: str = "") -> None:
        """Start to bring the whole together. `wait` makes it usable. `key`: see `Group.swap`."""
        if self.coming is not None:
            self.wait()
        if self.common is not None:
            self.coming = self.common.current()
            return
        storage = self.whole.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(self.whole.numel() * self.whole.element_size())
        self._fill()
        self.coming = self.shard.gather("gather", self.whole.detach(), self.layout.bounds, key)

    def _fill(self) -> None:
        """This rank's part of the whole, from the masters."""
        mine = self.whole[self.mine]
        if mine.data_ptr() != self.master.data_ptr() or mine.is_meta:
            with torch.no_grad():
                mine.copy_(self.master)

    def updated(self) -> None:
        """The masters have new values, on all ranks."""
        if self.common is not None:
            self._fill()
            self.common.publish()

    def wait(self) -> None:
        """Finish a gather: the user's parameters have their values."""
        if self.coming is not None:
            pending, self.coming = self.coming, None
            pending.wait()
            if not self.here:
                self._check_holes()
                self.here = True
                self._show(self.views)

    def free(self) -> None:
        """Drop the whole where it does not rest."""
        if self.resident:
            return
        if self.coming is not None:
            self.wait()
        self.here = False
        self._show_holes()
        if self.common is None:
            self.whole.untyped_storage().resize_(0)

    def lend(self) -> None:
        """Show the whole to the user, in memory that stays valid for whoever keeps a reference to it. Collective."""
        if not self.resident:
            flat = torch.empty(self.numel, dtype=self.dtypes.compute, device=self.device)
            with torch.no_grad():
                flat[self.mine].copy_(self.master)
            if self.common is not None:
                self.common.current().wait()
                flat.copy_(self.whole)
            else:
                self.shard.gather("gather", flat, self.layout.bounds).wait()
            self._check_holes()
            self._show(self.views_of(flat))
            self.lent = flat

    def take_back(self) -> None:
        """The user has had the whole for long enough."""
        self.lent = self.whole
        if self.resident:
            self._show(self.views)
        else:
            self.free()

    def _check_holes(self) -> None:
        """Find writes that raised nothing: they changed the value that stands for "not here"."""
        self.check_shown()
        if self.holes.is_meta or self.dtypes.compute == torch.bool:
            return
        kept = untouched(self.holes)
        if not bool(kept.all()):
            names = [n for n, ok in zip(self.params, kept.unbind(), strict=True) if not bool(ok)]
            raise AwayError(
                f"something wrote to {', '.join(map(repr, names))} while it was not on this rank",
                cause="in-place writes such as p.data.fill_() or a weight initialisation after prepare",
                remedy="with job.whole(model, write=True): ...",
            )

    def keep_written(self) -> None:
        """Take over what the user wrote into what was lent, or put in its place."""
        with torch.no_grad():
            for name, view in self.views_of(self.lent).items():
                if local(self.params[name]).data_ptr() != self.shown[name]:
                    view.copy_(local(self.params[name]))
            written = self.lent[self.mine]
            changed = written != self.master.to(written.dtype)  # the rest keeps bits that a narrower dtype has not
            self.master.copy_(torch.where(changed, written.to(self.master.dtype), self.master))
        self.updated()

    def masters(self) -> Tensor:
        """All masters of the unit in one flat tensor. Collective."""
        flat = torch.zeros(self.numel, dtype=self.dtypes.master, device=self.device)
        flat[self.mine].copy_(self.master)
        self.shard.gather("state", flat, self.layout.bounds).wait()
        return flat

    def after_load(self) -> None:
        """The masters have new values, from a checkpoint."""
        self.updated()
        if self.resident:
            self.gather()
            self.wait()
