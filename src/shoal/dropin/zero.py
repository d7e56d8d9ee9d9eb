"""`shoal.ZeroRedundancyOptimizer` and `shoal.ZeRO`: every rank updates some parameters and sends them to all.

Sources: torch.distributed.optim.ZeroRedundancyOptimizer; Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.dropin.events import Event, Events
from shoal.dropin.mean import CAP, Averager, spread_all, to_all, together
from shoal.dropin.overlap import Overlap
from shoal.dropin.states import collect
from shoal.dropin.strays import digest, ours
from shoal.dropin.world import world
from shoal.engine.autograd import at_end_of_backward, graph_task
from shoal.errors import OptimizerError, OrderError, StrategyError
from shoal.layout import Item, Layout

Group = dict[str, object]
UNEQUAL = "as many batches on all ranks, or stage=1 under shoal.DistributedDataParallel and its join()"
"""What to do where ranks have unequal numbers of backwards."""


class ZeroRedundancyOptimizer(Optimizer):
    """Cuts an optimizer's state over ranks: each parameter's belongs to one of them. torch's signature and meaning.

    Gradients are the caller's: `DistributedDataParallel` has averaged them. `step()` updates this rank's parameters and
    sends all of them to all. `param_groups` hold all parameters, `state` those of this rank.

    Args:
        params: an iterable of parameters, or of groups; the same ones on all ranks.
        optimizer_class: makes the optimizer of this rank's part; any that updates parameter by parameter.
        process_group: some ranks of torch's; None: all.
        parameters_as_bucket_view: accepted, and needless.
        overlap_with_ddp: False; True is refused.
        defaults: for `optimizer_class`, such as `lr`.

    Raises:
        OptimizerError: no optimizer class, no parameters, or a class that reads all parameters at once.
        StrategyError: `overlap_with_ddp=True`.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[Group], optimizer_class: type[Optimizer],
        process_group: dist.ProcessGroup | None = None, parameters_as_bucket_view: bool = False,
        overlap_with_ddp: bool = False, **defaults: object,
    ) -> None:  # fmt: skip
        _check(optimizer_class, overlap=overlap_with_ddp)
        self._world = world()
        self._group = self._world.group_of(process_group)
        self._loads = [0] * self._group.size
        self._owner: dict[Tensor, int] = {}
        self.optim: Optimizer | None = None
        self._whole: dict[str, object] | None = None
        self._compared = False  # have ranks compared their gradients?
        super().__init__(params, dict(defaults))  # type: ignore[arg-type]
        groups = [self._part(group) for group in self.param_groups]
        self.optim = optimizer_class(groups, **defaults)  # type: ignore[call-arg]
        ours(self.optim)
        _copy_settings(self.optim, self)
        self.state = self.optim.state

    def add_param_group(self, param_group: Group) -> None:
        """More parameters; each goes to the rank that has least to update so far.

        Args:
            param_group: as torch's: `{"params": [...], "lr": ...}`.
        """
        super().add_param_group(param_group)
        added = cast(Group, self.param_groups[-1])
        held = cast(list[nn.Parameter], added["params"])
        items = [Item(str(i), tuple(p.shape), 0) for i, p in enumerate(held)]
        layout = Layout.by_parameter(items, self._group.size, self._loads)
        for rank in range(self._group.size):
            self._owner |= {held[int(piece.name)]: rank for piece in layout.pieces(rank)}
        for p in held:
            self._owner.setdefault(p, 0)  # it has no elements
        if self.optim is not None:
            self.optim.add_param_group(self._part(added))
            _copy_settings(self.optim, self)

    def _part(self, group: Group) -> Group:
        """A group with this rank's parameters only."""
        held = cast(list[nn.Parameter], group["params"])
        return {**group, "params": [p for p in held if self._owner[p] == self._group.rank]}

    @property
    def _all(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in cast(list[nn.Parameter], group["params"])]

    # ---------------------------------------------------------------- the step

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update this rank's parameters, then send all to all. Collective.

        Args:
            closure: computes the loss again, with gradients; called once.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_update()
        assert self.optim is not None
        _copy_settings(self, self.optim)
        self.optim.step()
        _copy_settings(self.optim, self)
        every = self._all
        to_all(self._group, [[p for p in every if self._owner[p] == rank] for rank in range(self._group.size)])
        self._whole = None
        return loss

    def _before_update(self) -> None:
        """At the first step: has somebody averaged the gradients?"""
        if self._compared or self._group.size == 1:
            return
        self._compared = True
        grads = [p.grad for p in self._all if p.grad is not None]
        told = self._group.share("gradients", digest(grads))
        if len(set(told)) > 1:
            self._world.warn(
                "ZeroRedundancyOptimizer.step: the ranks' gradients differ, and each parameter follows those of one "
                "rank alone; shoal.DistributedDataParallel(model) averages them, or shoal.ZeRO(..., stage=2)"
            )

    # ---------------------------------------------------------------- state

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring all state to one rank, whose `state_dict()` works then until the next step. Collective.

        Args:
            to: a rank of the group.

        Raises:
            OrderError: there is no such rank.
        """
        if not 0 <= to < self._group.size:
            raise OrderError(
                f"consolidate_state_dict(to={to}) in a group of {self._group.size}", remedy="a rank of it, such as to=0"
            )
        assert self.optim is not None
        _copy_settings(self, self.optim)
        places = {p: i for i, p in enumerate(self._all)}
        mine = {places[cast(nn.Parameter, p)]: dict(state) for p, state in self.optim.state.items()}
        state = collect(self._group, mine, to)
        if self._group.rank != to:
            self._whole = None
            return
        groups: list[Group] = []
        for group in self.param_groups:
            held = cast(list[nn.Parameter], group["params"])
            numbers: Group = {"params": [places[p] for p in held]}
            groups.append({k: v for k, v in group.items() if k != "params"} | numbers)
        self._whole = {"state": state, "param_groups": groups}

    def state_dict(self) -> dict[str, object]:  # type: ignore[override]
        """The whole state, as the optimizer without ranks would give it, on the rank that has consolidated it.

        Raises:
            OrderError: it was not brought to this rank since the last step.
        """
        if self._whole is None:
            raise OrderError(
                f"state_dict() on rank {self._group.rank}, which has only its own part of the state",
                remedy=f"optimizer.consolidate_state_dict(to={self._group.rank}) on all ranks before",
            )
        return self._whole

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:  # type: ignore[override]
        """Take over a whole state; each rank keeps its own part.

        Args:
            state_dict: of `state_dict()`, of any number of ranks, or of the optimizer without ranks.

        Raises:
            OptimizerError: it is of other parameters.
        """
        assert self.optim is not None
        groups = cast(Sequence[Group], state_dict["param_groups"])
        sizes = [len(cast(list[int], g["params"])) for g in groups]
        here = [len(g["params"]) for g in self.param_groups]
        if sizes != here:
            raise OptimizerError(
                f"load_state_dict: groups of {sizes} parameters, and this optimizer has groups of {here}",
                remedy="the same model and groups as when it was saved",
            )
        numbers = [n for g in groups for n in cast(list[int], g["params"])]
        place = dict(zip(self._all, numbers, strict=True))
        state = cast(Mapping[int, object], state_dict["state"])
        mine = [list(cast(list[nn.Parameter], g["params"])) for g in self.optim.param_groups]
        settings = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        at = {p: i for i, p in enumerate(p for part in mine for p in part)}
        self.optim.load_state_dict({
            "state": {i: state[place[p]] for p, i in at.items() if place[p] in state},
            "param_groups": [
                {**s, "params": [at[p] for p in part]} for s, part in zip(settings, mine, strict=True)
            ],
        })  # fmt: skip
        _copy_settings(self.optim, self)
        self.state = self.optim.state


class ZeRO(ZeroRedundancyOptimizer):
    """Another spelling of `ZeroRedundancyOptimizer`, as tutorials write it.

    Args:
        params: as there.
        optimizer: the class.
        stage: 1: gradients are whole, and the caller's, who wraps the model in `DistributedDataParallel`. 2: gradients
            are averaged here while `backward` runs, without a wrapper, and those stay that this rank updates; the
            others' `p.grad` is None afterwards.
        bucket_bytes_cap: bytes of gradients that travel together in stage 2; None: 25 MiB.
        process_group: as there.
        defaults: for `optimizer`.

    Raises:
        StrategyError: stage 3, which parameters alone do not allow; an unknown stage; a cap that is not positive.
        OptimizerError: as there.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[Group], optimizer: type[Optimizer], stage: int = 1,
        bucket_bytes_cap: int | None = None, process_group: dist.ProcessGroup | None = None, **defaults: object,
    ) -> None:  # fmt: skip
        if stage == 3:
            raise StrategyError(
                "ZeRO(stage=3) knows parameters, and not which module needs which of them when",
                remedy='job = shoal.init("zero3"); model, optimizer = job.prepare(model, optimizer)',
            )
        if stage not in (1, 2):
            raise StrategyError(f"ZeRO(stage={stage!r})", remedy="stage=1 or stage=2")
        if bucket_bytes_cap is not None and bucket_bytes_cap <= 0:
            raise StrategyError(f"bucket_bytes_cap={bucket_bytes_cap}", remedy="bytes, such as 25 * 2**20")
        self.stage = stage
        super().__init__(params, optimizer, process_group, **defaults)  # type: ignore[arg-type]
        self._cap = CAP if bucket_bytes_cap is None else bucket_bytes_cap / 2**20
        self._calls = set[int]()
        if stage == 2:
            trained = [p for p in self._all if p.requires_grad]
            self._averager = Averager(self._group, trained, self._cap)
            self._overlap = Overlap(self._averager)
            self._events = Events(
                self._group, len(trained), len(self._averager.buckets), "shoal.ZeRO(stage=2)", UNEQUAL
            )
            self._world.goodbyes.append(lambda events=self._events: events.tell(Event.LEFT))
            for p in trained:
                p.register_post_accumulate_grad_hook(self._accumulated)
            spread_all(self._group, trained, 0)  # all start from rank 0's values, as the wrapper would do it

    def _accumulated(self, param: Tensor) -> None:
        call = graph_task()
        if call not in self._calls:
            self._calls.add(call)
            at_end_of_backward(lambda: self._over(call))
        self._overlap.accumulated(cast(nn.Parameter, param))

    def _over(self, call: int) -> None:
        self._calls.discard(call)
        if not self._calls:
            self._average()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self._failed()
        super().zero_grad(set_to_none)

    def _before_update(self) -> None:
        if self.stage == 1:
            super()._before_update()
        elif self._failed():
            self._average()

    def _failed(self) -> bool:
        """Has a backward raised, and so had no end, since gradients were averaged? It is forgotten."""
        if not self._calls:
            return False
        self._calls.clear()
        self._overlap.give_up()
        return True

    def _average(self) -> None:
        self._overlap.start_all()
        told = self._events.tell(Event.BACKWARD, touched=self._averager.touched(), late=self._overlap.late)
        left = self._overlap.finish(together(t.touched for t in told), together(t.late for t in told))
        self._averager.average(left, [True] * self._group.size, self._group.size)
        for p in self._averager.params:
            if self._owner[p] != self._group.rank:
                p.grad = None


def _check(optimizer_class: object, *, overlap: bool) -> None:
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise OptimizerError(
            f"optimizer_class={optimizer_class!r} is no optimizer's class",
            remedy="the class itself, such as torch.optim.Adam, and its arguments by name: lr=1e-3",
        )
    if optimizer_class is torch.optim.LBFGS:
        raise OptimizerError(
            "ZeroRedundancyOptimizer with LBFGS, which reads the gradients of all parameters at once",
            remedy="an optimizer that updates parameter by parameter, such as torch.optim.AdamW",
        )
    if overlap:
        raise StrategyError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True)",
            remedy='leave it out; job = shoal.init("zero1") overlaps updates and transfers by itself',
        )


def _copy_settings(source: Optimizer, target: Optimizer) -> None:
    """Learning rates and the like, which schedulers change."""
    for mine, other in zip(source.param_groups, target.param_groups, strict=True):
        for key, value in mine.items():
            if key != "params":
                other[key] = value
