"""The mean of tensors over ranks: one leaf a rank, summed along the tree over ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise, zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn

from shoal.comm.crossover import one_round_for
from shoal.comm.group import Done, Group, Pending
from shoal.comm.pool import Pool
from shoal.engine.exchange import agree
from shoal.engine.sums import Sum, even_bounds, mean, new_tree
from shoal.leaves import Node, Weighed

T = TypeVar("T", bound=Tensor)
CAP = 25.0
"""MiB of a bucket, as torch's."""


class Bucket:
    """Gradients that travel together, as torch's `GradBucket` shows them to a communication hook.

    Args:
        number: of the bucket, from 0; `last`: is it the last one?
        params: in the order in which they lie in the buffer.
        flat: their gradients side by side, of one dtype.
    """

    def __init__(self, number: int, params: Sequence[nn.Parameter], flat: Tensor, *, last: bool) -> None:
        self._number, self._params, self._flat, self._last = number, list(params), flat, last

    def index(self) -> int:
        return self._number

    def buffer(self) -> Tensor:
        """All gradients of the bucket in one flat tensor."""
        return self._flat

    def set_buffer(self, buffer: Tensor) -> None:
        self._flat = buffer

    def gradients(self) -> list[Tensor]:
        """Views of the buffer in the parameters' shapes."""
        parts = torch.split(self._flat, [p.numel() for p in self._params])
        return [part.view(p.shape) for part, p in zip(parts, self._params, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        return self._params

    def is_last(self) -> bool:
        return self._last


Hook = Callable[[object, Bucket], torch.futures.Future[Tensor]]
"""What `register_comm_hook` takes: of (state, bucket), a future of the bucket's new buffer."""


def cut_into_buckets(params: Sequence[Tensor], cap: float) -> list[list[int]]:
    """Places of parameters by bucket, the last parameters first; a bucket has one dtype and device, and a size.

    Args:
        params: of the model, in its order.
        cap: MiB of a bucket; a larger parameter has one of its own.
    """
    buckets: list[list[int]] = []
    kinds: dict[tuple[torch.dtype, torch.device], tuple[int, float]] = {}
    for place in reversed(range(len(params))):
        p = params[place]
        size = p.numel() * p.element_size() / 2**20
        number, filled = kinds.get((p.dtype, p.device), (-1, 0.0))
        if number < 0 or filled + size > cap:
            buckets.append([])
            number, filled = len(buckets) - 1, 0.0
        buckets[number].append(place)
        kinds[p.dtype, p.device] = number, filled + size
    return buckets


class Averager:
    """Averages gradients over the ranks of a group, bucket by bucket.

    Args:
        group: the ranks.
        params: those that are trained, the same ones on all ranks.
        cap: MiB of a bucket.
        wire: the dtype in which floating gradients travel and are summed; None: their own.
    """

    def __init__(
        self, group: Group, params: Sequence[nn.Parameter], cap: float = CAP, wire: torch.dtype | None = None
    ) -> None:  # fmt: skip
        self.group, self.params, self.pool, self.wire = group, list(params), Pool(), wire
        self.buckets = cut_into_buckets(self.params, cap)

    @cached_property
    def at_once(self) -> bool:
        """In one round instead of two? Collective when first asked: when ranks know that they average the same."""
        return one_round_for(self.group, sum(p.nbytes for p in self.params))

    def touched(self) -> int:
        """Which parameters have a gradient on this rank: a bit for each."""
        return sum(1 << i for i, p in enumerate(self.params) if p.grad is not None)

    def average(
        self, touched: int, active: Sequence[bool], divisor: float, hook: tuple[Hook, object] | None = None
    ) -> None:  # fmt: skip
        """Replace every `p.grad` by the mean over ranks. Collective.

        Args:
            touched: parameters that have a gradient on any rank, a bit for each. Others stay as they are.
            active: per rank, does it bring gradients? Others take part with nothing, and keep theirs.
            divisor: of the sum.
            hook: takes a bucket's place in the exchange, with its state.
        """
        wanted = [[i for i in bucket if touched >> i & 1] for bucket in self.buckets]
        wanted = [places for places in wanted if places]
        present = active[self.group.rank]
        flats = [self.flatten(places, present=present) for places in wanted]
        if hook is not None:
            for number, (places, flat) in enumerate(zip(wanted, flats, strict=True)):
                last = number == len(wanted) - 1
                bucket = Bucket(number, [self.params[i] for i in places], flat, last=last)
                call, state = hook
                future = call(state, bucket)
                future.wait()
                value = future.value()
                if present:
                    self.hand_out(places, value[0] if isinstance(value, (list, tuple)) else value, touched)
            return
        flows = [Flow(self.steps(flat, active, divisor)) for flat in flats]  # all begin
        for places, flow in zip(wanted, flows, strict=True):
            result = flow.wait()
            if present:
                self.hand_out(places, result, touched)
            self.pool.give(result)
        self.group.carrier.rest()

    def steps(
        self, flat: Tensor, active: Sequence[bool], divisor: float, key: str = ""
    ) -> Generator[Pending, None, Tensor]:  # fmt: skip
        """`mean_steps` of a bucket."""
        return mean_steps(self.group, flat, active, divisor, self.pool, key, at_once=self.at_once)

    def flatten(self, places: Sequence[int], *, present: bool) -> Tensor:
        """Gradients of the parameters at these places side by side; zeros for what has none, or is not `present`."""
        parts = [self.params[i] for i in places]
        dtype = self.wire if self.wire is not None and parts[0].is_floating_point() else parts[0].dtype
        flat = torch.zeros(sum(p.numel() for p in parts), dtype=dtype, device=parts[0].device)
        if present:
            for p, view in zip(parts, torch.split(flat, [p.numel() for p in parts]), strict=True):
                if p.grad is not None:
                    view.copy_(p.grad.detach().reshape(-1))
        return flat

    @torch.no_grad()
    def hand_out(self, places: Sequence[int], flat: Tensor, touched: int) -> None:
        """Make of `flat` the gradients of the parameters at these places that some rank has touched."""
        parts = [self.params[i] for i in places]
        for i, p, view in zip(places, parts, torch.split(flat, [p.numel() for p in parts]), strict=True):
            if not touched >> i & 1:
                continue
            if p.grad is None:
                p.grad = view.view(p.shape).to(p.dtype, copy=True)
            else:
                p.grad.detach().copy_(view.view(p.shape))


def together(each: Iterable[int]) -> int:
    """The bits that any of these has."""
    bits = 0
    for one in each:
        bits |= one
    return bits


class Flow:
    """A collective under way: transfers to wait for, one after the other, and its result.

    Args:
        steps: yields the transfers; the first one begins here.
    """

    def __init__(self, steps: Generator[Pending, None, Tensor]) -> None:
        self._steps = steps
        self._pending: Pending = Done()
        self._result: Tensor | None = None
        self._go_on()

    def _go_on(self) -> None:
        try:
            self._pending = next(self._steps)
        except StopIteration as done:
            self._result = done.value

    def ready(self) -> bool:
        """Go on as far as possible without waiting. Is it over?"""
        while self._result is None and self._pending.ready():
            self._pending.wait()
            self._go_on()
        return self._result is not None

    def wait(self) -> Tensor:
        """Go on to the end. Returns the result."""
        while self._result is None:
            self._pending.wait()
            self._go_on()
        return self._result


def mean_of(group: Group, flat: Tensor, active: Sequence[bool], divisor: float, pool: Pool) -> Flow:
    """The sum of everybody's `flat` over `divisor`, in a buffer of the pool. Collective.

    Args:
        flat: this rank's, which is used up.
        active: per rank, whether its tensor counts.
    """
    return Flow(mean_steps(group, flat, active, divisor, pool))


def mean_steps(
    group: Group, flat: Tensor, active: Sequence[bool], divisor: float, pool: Pool, key: str = "", *,
    at_once: bool = False,
) -> Generator[Pending, None, Tensor]:  # fmt: skip
    """The same, transfer by transfer.

    Args:
        key: what all ranks know it by; "": by the order in which they begin.
        at_once: in one round, which sends more.
    """
    size = group.size
    if size == 1:
        return flat if divisor == 1 else flat.div_(divisor)
    if at_once:
        whole = yield from _all_to_all(group, flat, active, divisor, pool, key)
    else:
        none: Weighed[bool] = Weighed(None)
        held = [[(Node(0, r), Weighed(True, 1.0) if counts else none)] for r, counts in enumerate(active)]
        mine: Weighed[Sum] = Weighed(Sum([flat]), 1.0) if active[group.rank] else Weighed(None)
        result = yield from agree(
            group, even_bounds(0, flat.numel(), size), [(0, flat.numel())], [(Node(0, group.rank), mine)], held,
            divisor, size, pool, flat[:0], key=key,
        )  # fmt: skip
        assert result.strips is not None
        assert result.flat is not None
        whole = result.flat
    if sum(active) == 1 and divisor != 1:  # a leaf alone is not divided
        whole.div_(divisor)
    return whole


def _all_to_all(
    group: Group, flat: Tensor, active: Sequence[bool], divisor: float, pool: Pool, key: str
) -> Generator[Pending, None, Tensor]:  # fmt: skip
    boxes = [flat if r == group.rank else torch.empty_like(flat) for r in range(group.size)]
    pending = group.swap("agree", [[[flat]]] * group.size, [[[box]] for box in boxes], key)
    yield pending
    pending.wait()
    tree = new_tree(group.size)
    for r, counts in enumerate(active):
        tree.put_leaf(r, Weighed(Sum([boxes[r]]), 1.0) if counts else Weighed(None))
    found = mean(tree.take(), divisor)
    assert found is not None
    return pool.take(flat.numel(), flat.dtype, flat.device).copy_(found[0])


def spread(group: Group, flat: Tensor, owner: int) -> None:
    """Everybody gets the owner's values, in place. Collective."""
    bounds = [0] * (owner + 1) + [flat.numel()] * (group.size - owner)
    assert [b - a for a, b in pairwise(bounds)][owner] == flat.numel()
    group.gather("broadcast", flat, bounds).wait()


def alike(tensors: Iterable[T]) -> list[list[T]]:
    """Those of one dtype and device, which can lie side by side."""
    kinds: dict[tuple[torch.dtype, torch.device], list[T]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def spread_all(group: Group, tensors: Iterable[Tensor], owner: int) -> None:
    """The same for tensors of any shapes."""
    every = list(tensors)
    to_all(group, [every if rank == owner else [] for rank in range(group.size)])


@torch.no_grad()
def to_all(group: Group, owned: Sequence[Sequence[Tensor]]) -> None:
    """Everybody gets every rank's values, in place, a bucket of each at a time; two rounds are under way. Collective.

    Args:
        owned: by rank, the tensors whose values it gives. All ranks have all of them.
    """
    before: Iterator[None] = iter(())
    for like, *_ in alike(t for part in owned for t in part):
        kind = [[t for t in part if t.dtype == like.dtype and t.device == like.device] for part in owned]
        buckets = [[[part[i] for i in places] for places in cut_into_buckets(part, CAP)] for part in kind]
        for parts in zip_longest(*buckets, fillvalue=list[Tensor]()):
            under_way = _round(group, parts)
            next(under_way)
            next(before, None)
            before = under_way
    next(before, None)
    group.carrier.rest()


def _round(group: Group, parts: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """First they set out, then they arrive."""
    sizes = [sum(t.numel() for t in part) for part in parts]
    ordered = [(rank, t) for rank, part in enumerate(parts) for t in part]
    like = ordered[0][1]
    flat = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
    views = torch.split(flat, [t.numel() for _, t in ordered])
    for (rank, tensor), view in zip(ordered, views, strict=True):
        if rank == group.rank:
            view.copy_(tensor.detach().reshape(-1))
    pending = group.gather("values", flat, [0, *accumulate(sizes)])
    yield
    pending.wait()
    for (rank, tensor), view in zip(ordered, views, strict=True):
        if rank != group.rank:
            tensor.detach().copy_(view.view(tensor.shape))
