"""What shoal needs of torch's autograd engine that has no public name."""

from __future__ import annotations

from collections.abc import Callable

import torch


def graph_task() -> int:
    """A number for the backward call under way on this thread; -1: none."""
    return torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]


def in_backward() -> bool:
    """Is this forward a recomputation that runs inside a backward?"""
    return graph_task() != -1


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Run `call` when the backward call under way has ended, before it returns."""
    torch.autograd.Variable._execution_engine.queue_callback(call)  # type: ignore[attr-defined]
