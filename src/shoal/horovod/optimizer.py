"""Horovod's `DistributedOptimizer`, and sending parameters and optimizer state from one rank to all."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.dropin.mean import CAP, Averager, spread, spread_all
from shoal.dropin.states import packed, unpacked
from shoal.errors import OptimizerError, OrderError, SettingError
from shoal.horovod.compression import Compression, Compressor
from shoal.horovod.ops import Average, Sum, average
from shoal.horovod.session import Session, Words, session


class _Distributed:
    """What `DistributedOptimizer` adds to the caller's class of optimizers."""

    _session: Session
    _number: int
    _by: str
    _averaged: bool
    _skips: bool
    param_groups: list[dict[str, object]]

    def synchronize(self) -> None:
        """Average gradients now, for instance to clip them; `step()` goes into `skip_synchronize`. Collective."""
        touched = self._session.optimizers[self._number].touched()
        words: Words = {"op": "step", "optimizer": self._number, "by": self._by, "touched": hex(touched)}
        average(self._session, self._number, self._session.tell(words, differs="touched"), self._by)
        self._averaged = True

    @contextmanager
    def skip_synchronize(self) -> Generator[None]:
        """`step()` inside does not average: `synchronize()` has."""
        if not self._averaged:
            raise OrderError("skip_synchronize() before synchronize()", remedy="optimizer.synchronize() first")
        self._skips = True
        try:
            yield
        finally:
            self._skips = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Average gradients over ranks, then update. Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._skips:
            self.synchronize()
        self._averaged = False
        super().step()  # type: ignore[misc]
        return loss


def DistributedOptimizer(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: type[Compressor] = Compression.none, backward_passes_per_step: int = 1, op: str = Average,
    gradient_predivide_factor: float = 1.0, num_groups: int = 0, groups: object = None,
    sparse_as_dense: bool = False, process_set: object = None,
) -> Optimizer:  # fmt: skip
    """An optimizer of the same class and state whose `step()` first averages gradients over all ranks.

    Several backwards before a step are added up, as ever; `backward_passes_per_step` needs not be right. The sum has a
    fixed order: the same bits again at the same number of ranks.

    Args:
        optimizer: the caller's; the new one shares its groups and state.
        named_parameters: of the model; None: parameters are known by their places.
        compression: `hvd.Compression.fp16` sends half-precision numbers.
        op: hvd.Average or hvd.Sum.
        gradient_predivide_factor, num_groups, groups, sparse_as_dense: accepted, and needless.
        process_set: None.

    Raises:
        SettingError: Adasum, or a process set.
        OptimizerError: names that are given twice, or parameters without a name.
    """
    here = session()
    if op not in (Average, Sum) or process_set is not None:
        what = f"op={op!r}" if process_set is None else "process_set="
        raise SettingError(f"DistributedOptimizer({what}) is not among shoal's", remedy="op=hvd.Average, or hvd.Sum")
    params = [p for g in optimizer.param_groups for p in cast(list[nn.Parameter], g["params"])]
    _check_names(params, named_parameters)
    kind = type(optimizer)
    made = cast(Optimizer, object.__new__(type(kind.__name__, (_Distributed, kind), {})))
    made.__dict__.update(optimizer.__dict__)
    ours = cast(_Distributed, made)
    ours._session, ours._number, ours._by = here, len(here.optimizers), op  # pyright: ignore[reportPrivateUsage]
    ours._averaged, ours._skips = False, False  # pyright: ignore[reportPrivateUsage]
    here.optimizers.append(Averager(here.group, [p for p in params if p.requires_grad], CAP, compression.wire))
    return made


def _check_names(params: list[nn.Parameter], named: Iterable[tuple[str, Tensor]] | None) -> None:
    if named is None:
        return
    pairs = list(named)
    names = [name for name, _ in pairs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise OptimizerError(
            f"named_parameters has {', '.join(map(repr, twice))} twice", remedy="model.named_parameters()"
        )
    known = {id(p) for _, p in pairs}
    missing = sum(id(p) not in known for p in params)
    if missing:
        raise OptimizerError(
            f"named_parameters lacks {missing} of the optimizer's {len(params)} parameters",
            remedy="named_parameters=model.named_parameters(), of the model that the optimizer was made for",
        )


def broadcast_parameters(
    params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], root_rank: int, process_set: object = None
) -> None:  # fmt: skip
    """Give all ranks one rank's values, in place. Collective.

    Args:
        params: `model.state_dict()` or `model.named_parameters()`; the same names and shapes on all ranks.
        root_rank: whose values.
    """
    here = session()
    given = cast("Mapping[str, Tensor]", params).items() if isinstance(params, Mapping) else params
    pairs: list[tuple[str, Tensor]] = list(given)
    shapes = {n: f"{tuple(t.shape)} {t.dtype}" for n, t in pairs}
    here.tell({"op": "broadcast_parameters", "root_rank": root_rank, "shapes": shapes})
    spread_all(here.group, [t for _, t in pairs], root_rank)


def broadcast_optimizer_state(optimizer: Optimizer, root_rank: int, model: nn.Module | None = None) -> None:
    """Give all ranks one rank's optimizer state and settings, such as the learning rate. Collective.

    Args:
        optimizer: of the same class and parameters on all ranks; state may be there on the root alone.
        root_rank: whose state.

    Raises:
        OptimizerError: state or settings that are neither tensors nor numbers; LBFGS.
    """
    here = session()
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError("broadcast_optimizer_state of LBFGS", remedy="another optimizer, such as torch.optim.SGD")
    here.tell({"op": "broadcast_optimizer_state", "root_rank": root_rank, "kind": type(optimizer).__name__})
    whole = optimizer.state_dict()
    groups = cast(list[dict[str, object]], whole["param_groups"])
    mine = dict(cast(dict[int, dict[str, object]], whole["state"]))
    for i, group in enumerate(groups):  # as if they were state, under numbers of their own
        mine[-1 - i] = {k: v for k, v in group.items() if k != "params"}
    root = here.group.rank == root_rank
    head, data = packed(mine) if root else ([], torch.empty(0, dtype=torch.uint8))
    told = here.group.share_any("hvd", json.dumps([head, data.numel()]).encode())
    head, size = cast(tuple[list[list[object]], int], json.loads(told[root_rank]))
    data = data if root else torch.empty(size, dtype=torch.uint8)
    spread(here.group, data, root_rank)
    if root:
        return
    state = unpacked(head, data)
    came = [state.pop(-1 - i, {}) for i in range(len(groups))]
    for group, settings in zip(groups, came, strict=True):
        tuples = {k: tuple(cast(list[float], v)) for k, v in settings.items() if isinstance(v, list)}
        group.update(settings | tuples)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
