"""Random numbers that depend on (job seed, step, leaf), never on ranks."""

from __future__ import annotations

import hashlib
import random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def mix(*parts: int | str) -> int:
    """A 63-bit seed from whatever is named."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed(seed: int, step: int, leaf: int | None = None) -> None:
    """Set the global generators (torch on all devices, numpy, random) for one leaf of one step.

    A plain PyTorch loop that calls this before each micro-batch draws the numbers that shoal draws.

    Args:
        seed: the job's seed.
        step: counted from 0.
        leaf: counted from 0 within the step; None: what all ranks draw alike between steps.
    """
    everything(mix("leaf", seed, step, -1 if leaf is None else leaf))


def everything(value: int) -> None:
    """Set all global generators from one number."""
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # torch.manual_seed would note the call stack for every kind of device that is not there
        torch.default_generator.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


class States(NamedTuple):
    """The states of the global generators on the CPU."""

    torch: Tensor
    numpy: object
    python: object


def get_states() -> States:
    return States(torch.get_rng_state(), np.random.get_state(), random.getstate())


def set_states(states: States) -> None:
    torch.set_rng_state(states.torch)
    np.random.set_state(states.numpy)  # type: ignore[arg-type]
    random.setstate(states.python)  # type: ignore[arg-type]
