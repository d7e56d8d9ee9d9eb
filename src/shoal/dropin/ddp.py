"""`shoal.DistributedDataParallel`: torch's wrapper over shoal's sums.

Source: torch.nn.parallel.DistributedDataParallel; Li et al., PyTorch Distributed, VLDB 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.comm.meet import Meeting
from shoal.dropin.events import Event, Events, Told
from shoal.dropin.mean import CAP, Averager, Hook, spread_all, together
from shoal.dropin.overlap import Overlap
from shoal.dropin.strays import digest, power_of_eight
from shoal.dropin.world import world
from shoal.engine.autograd import at_end_of_backward, graph_task, in_backward
from shoal.engine.precision import each_tensor, tensors
from shoal.engine.setup import compare
from shoal.errors import ModelError, OrderError, SettingError

LOOKS = 2
"""Backwards whose inputs are compared over ranks: as many equal ones in a row are no chance."""
REFUSED = {
    "device_mesh": 'process_group=mesh.get_group("data")',
    "delay_all_reduce_named_params": "requires_grad_(False), or a model of its own, for what is not to be averaged",
    "param_to_hook_all_reduce": "requires_grad_(False), or a model of its own, for what is not to be averaged",
    "mixed_precision": 'torch.autocast, or job = shoal.init(precision="bfloat16"); job.prepare(model, optimizer)',
}


class DistributedDataParallel(nn.Module):
    """Averages gradients over ranks while `backward` runs, with the signature and meaning of torch's wrapper.

    After `backward` every `p.grad` is the plain mean of all ranks', summed in a fixed order: the same bits again at the
    same number of ranks. Data, generators and the optimizer are the caller's. All ranks start from rank 0's parameters
    and buffers, and every forward from rank 0's buffers.

    Ranks are found at the first use, from the launcher's environment; torch's process group need not exist. Mistakes
    that torch leaves alone are said: the same batch on all ranks, and parameters that differ after some steps.

    Args:
        module: whose floating parameters are trained; on any one device that the ranks' carrier serves.
        device_ids: None, or one device to which inputs are moved; not for modules on the CPU.
        output_device, dim: as torch's; without effect for one device.
        broadcast_buffers: send rank 0's buffers at once and before every forward.
        forward_sync_buffers: the same before every forward only.
        init_sync: compare shapes, and send rank 0's values, at once.
        process_group: some ranks of torch's; None: all.
        bucket_cap_mb: MiB of gradients that travel together; None: 25.
        find_unused_parameters, static_graph, check_reduction, gradient_as_bucket_view: accepted, and needless: which
            parameters have gradients is told with every backward.

    Raises:
        ModelError: nothing to train.
        SettingError: an argument that torch has and this wrapper has not, with what takes its place.
        DivergedError: ranks wrap different models.
        EnvironmentFault: the rank that a script has given torch contradicts the environment.
    """

    def __init__(
        self, module: nn.Module, device_ids: Sequence[int | torch.device] | None = None,
        output_device: int | torch.device | None = None, dim: int = 0, broadcast_buffers: bool | None = None,
        init_sync: bool = True, process_group: dist.ProcessGroup | None = None, bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False, check_reduction: bool = False, gradient_as_bucket_view: bool = False,
        static_graph: bool = False, forward_sync_buffers: bool | None = None, **others: object,
    ) -> None:  # fmt: skip
        super().__init__()
        _refuse(others)
        self.module = module
        names = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not names:
            raise ModelError(
                f"{type(module).__name__} has no parameter that is trained: there is nothing to average",
                remedy="call the module itself, without DistributedDataParallel",
            )
        self._params = list(names.values())
        self._to = _device(device_ids, self._params[0].device)
        self._world = world(self._params[0].device)
        self._group = self._world.group_of(process_group)
        every = broadcast_buffers if forward_sync_buffers is None else forward_sync_buffers
        self.broadcast_buffers = every is None or every
        self.require_backward_grad_sync = True
        self._averager = Averager(self._group, self._params, CAP if bucket_cap_mb is None else bucket_cap_mb)
        self._overlap = Overlap(self._averager)
        self._events = Events(self._group, len(names), len(self._averager.buckets))
        self._world.goodbyes.append(lambda events=self._events: events.tell(Event.LEFT))
        self._hook: tuple[Hook, object] | None = None
        self._join: _Join | None = None
        self._sync, self._calls = True, set[int]()
        self._steps, self._batch, self._alike = 0, b"", 0
        self._active = [True] * self._group.size
        if init_sync:
            compare({n: f"{tuple(p.shape)} {p.dtype}" for n, p in module.named_parameters()}, self._meeting())
            buffers = [] if broadcast_buffers is False else list(module.buffers())
            spread_all(self._group, [*module.parameters(), *buffers], 0)
        for p in self._params:
            p.register_post_accumulate_grad_hook(self._accumulated)

    def _meeting(self) -> Meeting:
        meeting = Meeting(self._group)
        meeting.make_room(32)
        return meeting

    # ---------------------------------------------------------------- forward

    def forward(self, *args: object, **kwargs: object) -> object:
        """The module's own, after rank 0's buffers have come."""
        if self._to is not None:
            to = self._to
            args, kwargs = each_tensor((args, kwargs), lambda t: t.to(to, non_blocking=True))
        if self._sync and self.broadcast_buffers and self._group.size > 1 and any(True for _ in self.module.buffers()):
            self._learn(self._tell(Event.FORWARD))
            self._send_buffers()
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        if self._calls and not in_backward():
            self._calls.clear()  # a backward that raised has no end
            self._overlap.give_up()
        self._sync = self.require_backward_grad_sync
        if self._sync and self._alike < LOOKS and self._group.size > 1 and not self._batch:
            self._batch = digest(tensors((args, kwargs)))
        output = self.module(*args, **kwargs)
        for tensor in tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(self._begins)
        return output

    def _send_buffers(self) -> None:
        """Those of rank 0; inside `join`, of the last rank that has data, as torch does it."""
        owner = 0 if self._join is None else max(r for r, here in enumerate(self._active) if here)
        spread_all(self._group, list(self.module.buffers()), owner)

    # ---------------------------------------------------------------- backward

    def _begins(self, _grads: tuple[Tensor | None, ...]) -> None:
        """A backward call has come to the module. It may run others inside, as some checkpointing does."""
        call = graph_task()
        if call not in self._calls:
            self._calls.add(call)
            at_end_of_backward(lambda: self._over(call))

    def _accumulated(self, param: Tensor) -> None:
        if not self._calls:  # the way here did not lead through the module's outputs
            self._begins(())
        if self._sync and self._overlaps:
            self._overlap.accumulated(cast(nn.Parameter, param))

    @property
    def _overlaps(self) -> bool:
        """May gradients travel while backward runs? Not while ranks may be out of data."""
        return self._hook is None and self._join is None and self._group.size > 1

    def _over(self, call: int) -> None:
        self._calls.discard(call)
        if self._sync and not self._calls:
            self._average()

    def _average(self) -> None:
        if self._group.size == 1 and self._hook is None:
            return
        self._steps += 1
        late = 0
        if self._overlaps:
            self._overlap.start_all()
            late = self._overlap.late
        state = digest(self.module.parameters()) if self._looks_at_state() else b""
        told = self._tell(Event.BACKWARD, self._averager.touched(), late, self._batch, state)
        self._learn(told)
        self._compare(told)
        self._batch = b""
        self._exchange(told)

    def _looks_at_state(self) -> bool:
        """After the first step, and at every eightfold: comparing costs a pass over all parameters."""
        return power_of_eight(self._steps - 1)

    def _exchange(self, told: Sequence[Told]) -> None:
        whole = self._join is None or self._join.initial
        divisor = self._group.size if whole else sum(self._active)
        touched = together(each.touched for each in told)
        if self._overlaps:
            touched = self._overlap.finish(touched, together(each.late for each in told))
        self._averager.average(touched, self._active, divisor, self._hook)

    def _tell(
        self, event: Event, touched: int = 0, late: int = 0, batch: bytes = b"", state: bytes = b""
    ) -> list[Told]:  # fmt: skip
        joins, strict = self._join is not None, self._join is not None and self._join.strict
        return self._events.tell(
            event, steps=self._steps, touched=touched, late=late, batch=batch, state=state, joins=joins, strict=strict
        )  # fmt: skip

    def _learn(self, told: Sequence[Told]) -> None:
        self._active = [t.event is not Event.DONE for t in told]

    def _compare(self, told: Sequence[Told]) -> None:
        """Say what torch's wrapper leaves alone."""
        busy = [t for t in told if t.event is Event.BACKWARD]
        if len(busy) < 2:
            return
        batches, states = {t.batch for t in busy}, {t.state for t in busy}
        if self._alike < LOOKS and batches != {b""}:
            self._alike = self._alike + 1 if len(batches) == 1 else LOOKS + 1
            if self._alike == LOOKS:
                self._world.warn(
                    f"the same batch on all {len(busy)} ranks, {LOOKS} times in a row: they compute the same gradient; "
                    "DataLoader(..., sampler=torch.utils.data.DistributedSampler(dataset)), or job.loader"
                )
        if len(states) > 1:
            self._world.warn(
                f"replicas drifted apart: after {self._steps - 1} steps the ranks' parameters differ; the same "
                "optimizer, learning rate and steps on all ranks, and no writes to parameters on some of them"
            )

    # ---------------------------------------------------------------- torch's other names

    @contextmanager
    def no_sync(self) -> Generator[None]:
        """Backwards of forwards inside stay on this rank: `p.grad` grows until the next one outside averages it."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    @contextmanager
    def join(
        self, divide_by_initial_world_size: bool = True, enable: bool = True, throw_on_early_termination: bool = False
    ) -> Generator[None]:
        """For unequal numbers of batches: a rank that leaves the block takes part in the others' with nothing.

        Afterwards all ranks have the parameters and buffers of the last one that had data.

        Args:
            divide_by_initial_world_size: False: by the number of ranks that still have data.
            enable: False: do nothing.
            throw_on_early_termination: raise on all ranks as soon as one is out of data.

        Raises:
            OrderError: with `throw_on_early_termination`.
        """
        if not enable or self._group.size == 1:
            yield
            return
        self._join = _Join(divide_by_initial_world_size, throw_on_early_termination)
        try:
            yield
            self._shadow()
        finally:
            self._join, self._active = None, [True] * self._group.size

    def _shadow(self) -> None:
        """Take part until all are out of data; then take over the last one's model."""
        while True:
            told = self._tell(Event.DONE)
            busy = {t.event for t in told} - {Event.DONE}
            if not busy:
                break
            self._learn(told)
            if Event.FORWARD in busy:
                self._send_buffers()
            else:
                self._exchange(told)
        last = max(r for r, here in enumerate(self._active) if here)
        spread_all(self._group, [*self.module.parameters(), *self.module.buffers()], last)

    def register_comm_hook(self, state: object, hook: Callable[..., object]) -> None:
        """Let `hook(state, bucket)` exchange gradients: it returns a future of the bucket's new buffer.

        `bucket` has the methods of torch's `GradBucket`. Buffers come as this rank's gradients, not divided.

        Raises:
            OrderError: there is one already, or it is no function.
        """
        if self._hook is not None:
            raise OrderError("register_comm_hook was called twice", remedy="one hook that does both")
        if not callable(hook):
            raise OrderError(
                f"register_comm_hook(state, {type(hook).__name__})", remedy="a function of (state, bucket)"
            )
        self._hook = (cast(Hook, hook), state)

    def _set_static_graph(self) -> None:
        """Accepted, and needless."""


class _Join:
    def __init__(self, initial: bool, strict: bool) -> None:
        self.initial, self.strict = initial, strict


def _refuse(others: dict[str, object]) -> None:
    """What torch's wrapper also takes."""
    accepted = ("skip_all_reduce_unused_params", "bucket_cap_mb_list", "batched_grad_copy")
    for name, value in others.items():
        if name in accepted or (name in REFUSED and value is None):
            continue
        if name not in REFUSED:
            raise TypeError(f"DistributedDataParallel() got an unexpected keyword argument {name!r}")
        raise SettingError(f"DistributedDataParallel({name}=...) is not among shoal's", remedy=REFUSED[name])


def _device(device_ids: Sequence[int | torch.device] | None, at: torch.device) -> torch.device | None:
    """Where inputs are moved."""
    if not device_ids:
        return None
    if len(device_ids) > 1 or at.type == "cpu":
        raise SettingError(
            f"device_ids={list(device_ids)!r} with a module on {at}",
            cause="one process serves one device" if len(device_ids) > 1 else "its parameters are in host memory",
            remedy=f"device_ids=[{device_ids[0]}]" if len(device_ids) > 1 else "leave device_ids out",
        )
    one = device_ids[0]
    return torch.device(at.type, one) if isinstance(one, int) else one
