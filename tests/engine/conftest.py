"""What the engine's tests share."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module", autouse=True)
def _old_objects_apart() -> None:
    """A job looks through all objects for learning-rate schedulers: those that were there before need not be seen."""
    linear = nn.Linear(1, 1)
    torch.optim.SGD(linear.parameters(), lr=0.1).step()  # torch imports half of itself at the first step
    gc.collect()
    gc.freeze()
