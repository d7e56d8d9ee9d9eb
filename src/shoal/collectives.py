"""What user code exchanges between ranks: `job.reduce`, `gather`, `broadcast` and `barrier`.

Every call begins with a meeting in which ranks compare what they pass. A rank that is elsewhere is a named error, and
one that needs parameters of a sharded model meanwhile gets them. The bytes may travel while the caller goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from shoal.comm.group import Done, Pending
from shoal.comm.meet import Meeting, Want
from shoal.errors import DivergedError, SettingError, nearest
from shoal.leaves import Tree

T = TypeVar("T")
Number = bool | int | float | complex

SMALL = 64 * 1024
"""Bytes up to which everybody sends all of a value to everybody; larger ones go to owners of slices and come back."""

_ADD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add, "mean": torch.add, "prod": torch.mul, "min": torch.minimum, "max": torch.maximum,
}  # fmt: skip
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def agree(meeting: Meeting, want: Want, text: str) -> None:
    """Return when all ranks are in the same call and pass the same kind of things.

    Args:
        text: what this rank calls, with what.

    Raises:
        DivergedError: they do not, with what each of them passes.
    """
    marks = meeting.meet(want, payload=hashlib.sha256(text.encode()).digest()[:16])
    if all(mark == marks[0] for mark in marks):
        return
    texts = [data.decode() for data in meeting.world.share_any("collective", text.encode())]
    raise DivergedError(
        "ranks pass different things: " + "; ".join(f"rank {r} {t}" for r, t in enumerate(texts)),
        remedy="call it with the same kind of value, and the same settings, on every rank",
    )


class Handle(Generic[T]):
    """A value under way. Others may be begun before this one is waited for; waiting finishes older ones first."""

    def __init__(self, owner: Collectives, first: Pending, then: Callable[[], Pending | None], end: Callable[[], T]):
        self._owner, self._pending, self._then, self._end = owner, first, then, end
        self._second = False
        self._result: T | None = None
        self.done = False

    def wait(self) -> T:
        """The value, when it is here.

        Raises:
            PeerLost, StalledError: it will not come.
        """
        if not self.done:
            self._owner.finish(self)
        return cast(T, self._result)

    def halfway(self) -> None:
        """Wait for the first transfer and begin the second, if there is one."""
        if not self._second:
            self._second = True
            self._pending.wait()
            self._pending = self._then() or self._pending

    def complete(self) -> None:
        """Wait for all of it."""
        self.halfway()
        self._pending.wait()
        self._result, self.done = self._end(), True


class Collectives:
    """Begins and finishes what ranks exchange for the user.

    Args:
        meeting: of all ranks.
        device: where tensors arrive on a rank that passes none.
    """

    def __init__(self, meeting: Meeting, device: torch.device) -> None:
        self.meeting, self.world, self.device = meeting, meeting.world, device
        self._open: list[Handle[object]] = []
        self._calls = 0

    # ---------------------------------------------------------------- the verbs

    def reduce(self, value: Tensor | Number, op: str) -> Handle[Tensor | Number]:
        """See `Job.reduce`."""
        tensor = value.detach() if isinstance(value, Tensor) else _tensor_of(value)
        _check_op(op, tensor.dtype)
        agree(self.meeting, Want.REDUCE_VALUES, f"job.reduce({_words(value, shape=True)}, op={op!r})")
        flat = tensor.reshape(-1).clone()
        total = _Total(op, self.world.size)
        n, me = self.world.size, self.world.rank
        whole = flat.nbytes <= SMALL or n == 1
        bounds = [flat.numel() * r // n for r in range(n + 1)]
        slices = [flat[a:b] for a, b in pairwise(bounds)]
        mine = flat if whole else slices[me]
        boxes = [torch.empty_like(mine) if r != me else mine for r in range(n)]
        sends = [[[_bytes(flat if whole else slices[r])]] for r in range(n)]
        first = self.world.swap("collective", sends, [[[_bytes(b)]] for b in boxes], self._key())
        again, result = self._key(), [flat]

        def then() -> Pending | None:
            added = total(boxes)
            if whole:
                result[0] = added
                return None
            slices[me].copy_(added)
            raw = _bytes(flat)
            return self.world.gather("collective", raw, [b * flat.element_size() for b in bounds], again)

        def end() -> Tensor | Number:
            found = result[0].view(tensor.shape)
            return found if isinstance(value, Tensor) else cast(Number, found.item())

        return self._begin(Handle(self, first, then, end))

    def gather(self, value: object) -> Handle[list[object]]:
        """See `Job.gather`."""
        if not isinstance(value, Tensor):
            data = _json("job.gather", value)
            agree(self.meeting, Want.GATHER_VALUES, f"job.gather({_words(value)})")
            found = [json.loads(d) for d in self.world.share_any("collective", data)]
            return self._begin(Handle(self, Done(), lambda: None, lambda: cast("list[object]", found)))
        agree(self.meeting, Want.GATHER_VALUES, f"job.gather({_words(value)})")
        told = self.world.share_any("collective", json.dumps(list(value.shape)).encode())
        flat = value.detach().reshape(-1).clone()
        shapes = [cast("list[int]", json.loads(d)) for d in told]
        boxes = [flat.new_empty(shape) if r != self.world.rank else flat.view(shape) for r, shape in enumerate(shapes)]
        raw = [_bytes(b.view(-1)) for b in boxes]
        mine = raw[self.world.rank]
        first = self.world.swap("collective", [[[mine]]] * len(raw), [[[b]] for b in raw], self._key())
        return self._begin(Handle(self, first, lambda: None, lambda: cast("list[object]", boxes)))

    def broadcast(self, value: object, root: int) -> Handle[object]:
        """See `Job.broadcast`."""
        if not 0 <= root < self.world.size:
            raise SettingError(f"job.broadcast(root={root})", remedy=f"a rank from 0 to {self.world.size - 1}")
        head = None if value is None else {"tensor": _words(value, shape=True)} if isinstance(value, Tensor) else {}
        told: dict[str, object] = {"head": head}
        if self.world.rank == root:
            plain = None if isinstance(value, Tensor) else json.loads(_json("job.broadcast", value))
            told |= {"value": plain} | (_like(value) if isinstance(value, Tensor) else {})
        agree(self.meeting, Want.BROADCAST, f"job.broadcast(..., root={root})")
        facts = [json.loads(d) for d in self.world.share_any("collective", json.dumps(told).encode())]
        _check_broadcast([f["head"] for f in facts], root)
        fact = facts[root]
        if "shape" not in fact:
            return self._begin(Handle(self, Done(), lambda: None, lambda: cast(object, fact["value"])))
        device = value.device if isinstance(value, Tensor) else self.device
        made = torch.empty(fact["shape"], dtype=getattr(torch, fact["dtype"]), device=device)
        if self.world.rank == root:
            assert isinstance(value, Tensor)
            made.copy_(value.detach())
        raw, others = _bytes(made.view(-1)), range(self.world.size)
        sends = [[[raw]] if self.world.rank == root else [] for _ in others]
        receives = [[[raw]] if r == root and self.world.rank != root else [] for r in others]
        first = self.world.swap("collective", sends, receives, self._key())
        return self._begin(Handle(self, first, lambda: None, lambda: cast(object, made)))

    def barrier(self) -> None:
        """See `Job.barrier`."""
        self.meeting.meet(Want.BARRIER)

    @contextmanager
    def leased(self, reason: str) -> Generator[None]:
        """While this rank works, the others' waits do not end."""
        self.world.carrier.hold(reason)
        try:
            yield
        finally:
            self.world.carrier.hold("")

    # ---------------------------------------------------------------- handles

    def finish(self, handle: Handle[T]) -> None:
        """Finish this one and all that were begun before it: ranks may wait for theirs in another order."""
        at = self._open.index(cast(Handle[object], handle))
        for each in self._open[: at + 1]:
            each.halfway()
        for each in self._open[: at + 1]:
            each.complete()
        del self._open[: at + 1]

    def _begin(self, handle: Handle[T]) -> Handle[T]:
        self._open.append(cast(Handle[object], handle))
        if self.world.carrier.ordered:  # what is posted has to be posted in one order on all ranks
            handle.halfway()
        return handle

    def _key(self) -> str:
        self._calls += 1
        return f"call {self._calls}"


class _Total:
    """Adds up what ranks passed, along a tree over ranks; half precision in float32."""

    def __init__(self, op: str, ranks: int) -> None:
        self.op, self.ranks = op, ranks

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        dtype = parts[0].dtype
        tree: Tree[Tensor] = Tree(self.ranks, _ADD[self.op])
        for rank, part in enumerate(parts):
            tree.put_leaf(rank, part.float() if dtype in (torch.float16, torch.bfloat16) else part)
        total = tree.take()
        return (total / self.ranks if self.op == "mean" else total).to(dtype)


def _tensor_of(value: object) -> Tensor:
    if type(value) not in _NUMBERS:
        raise SettingError(f"job.reduce of a {type(value).__name__}", remedy="a tensor or a number")
    return torch.tensor(value, dtype=_NUMBERS[cast("type[int]", type(value))])


def _check_op(op: str, dtype: torch.dtype) -> None:
    if op not in _ADD:
        raise SettingError(f"job.reduce(op={op!r})", remedy=nearest(op, _ADD))
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.bool and op not in ("min", "max"):
        raise SettingError(f"job.reduce: the {op} of bool", remedy='value.int(), or op="max" for any, "min" for all')
    if dtype.is_complex and op in ("min", "max"):
        raise SettingError(f"job.reduce: the {op} of {name}, which has no order", remedy="value.abs()")
    if op == "mean" and not (dtype.is_floating_point or dtype.is_complex):
        raise SettingError(f"job.reduce: the mean of {name} is no {name}", remedy="value.float()")


def _words(value: object, *, shape: bool = False) -> str:
    """What kind of thing ranks must all pass."""
    if not isinstance(value, Tensor):
        return type(value).__name__ if shape else "a value"
    size = f" {tuple(value.shape)}" if shape else ""
    return f"{str(value.dtype).removeprefix('torch.')}{size} on {value.device.type}"


def _like(value: Tensor) -> dict[str, object]:
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _check_broadcast(heads: Sequence[dict[str, str] | None], root: int) -> None:
    """Who passes a tensor elsewhere than on the root means the root's kind."""
    words = ["nothing" if h is None else h.get("tensor", "a value") for h in heads]
    if any(h is not None and w != words[root] for h, w in zip(heads, words, strict=True)):
        raise DivergedError(
            f"job.broadcast(root={root}): " + "; ".join(f"rank {r} passes {w}" for r, w in enumerate(words)),
            remedy=f"pass None on all ranks but {root}, or the same kind of tensor",
        )


def _json(what: str, value: object) -> bytes:
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"{what} of a {type(value).__name__}: {error}",
            cause="values travel as tensors or as JSON, never as pickles",
            remedy="a tensor, or numbers, strings, lists and dicts of them",
        ) from None


def _bytes(flat: Tensor) -> Tensor:
    """The same memory, in bytes: carriers need not know dtypes."""
    return flat.view(torch.uint8)
