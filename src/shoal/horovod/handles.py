"""Collectives under way, by Horovod's handles."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from shoal.comm.group import Pending
from shoal.dropin.mean import Flow


class Handle:
    """A collective under way. `synchronize` gives its result.

    Args:
        flow: what is under way.
        after: makes the caller's tensor of its result.
    """

    def __init__(self, flow: Flow, after: Callable[[Tensor], Tensor]) -> None:
        self.flow, self.after = flow, after
        self._result: Tensor | None = None

    def ready(self) -> bool:
        """Is it over? If so, the caller's tensor has the result."""
        if self.flow.ready():
            self.result()
            return True
        return False

    def result(self) -> Tensor:
        """Wait for it."""
        if self._result is None:
            self._result = self.after(self.flow.wait())
        return self._result


def synchronize(handle: Handle) -> Tensor:
    """Wait for a collective. Returns its result."""
    return handle.result()


def poll(handle: Handle) -> bool:
    """Would `synchronize` return at once? Never waits."""
    return handle.ready()


def into(tensor: Tensor, handle: Handle) -> Handle:
    """The result goes into the caller's tensor."""
    after = handle.after

    @torch.no_grad()
    def put(flat: Tensor) -> Tensor:
        tensor.copy_(after(flat))
        return tensor

    handle.after = put
    return handle


def when(pending: Pending, flat: Tensor) -> Flow:
    """`flat`, once something has come."""

    def steps() -> Generator[Pending, None, Tensor]:
        yield pending
        return flat

    return Flow(steps())
