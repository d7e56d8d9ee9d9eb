"""An exponential moving average of a model's weights, kept in shards."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shoal.comm.meet import Want
from shoal.engine.binding import Binding
from shoal.engine.unit import Unit
from shoal.errors import OrderError


class Average:
    """`average = decay * average + (1 - decay) * weights` after every step that updates. Made by `job.ema`.

    Each rank keeps the average of its own pieces, in float32 at least. Buffers are not averaged.

    Args:
        binding: of the model.
        decay: at least 0 and less than 1.
    """

    def __init__(self, binding: Binding, decay: float) -> None:
        if not 0 <= decay < 1:
            raise OrderError(f"job.ema(decay={decay:g})", remedy="a decay of at least 0 and less than 1, such as 0.999")
        binding.engine.updates.flush()
        self.binding, self.decay = binding, decay
        self.pieces: dict[str, Tensor] = {}
        self.restart()
        binding.averages.append(self)

    @property
    def kind(self) -> str:
        """How checkpoints call it."""
        return f"state:average-{self.decay!r}"

    def restart(self) -> None:
        """Begin with the weights as they are now."""
        self.pieces.clear()
        for unit in self.binding.engine.units:
            for name, piece in unit.pieces.items():
                narrow = piece.dtype in (torch.float16, torch.bfloat16)
                self.pieces[name] = piece.detach().to(torch.float32 if narrow else piece.dtype, copy=True)

    @torch.no_grad()
    def follow(self, binding: Binding, wholes: Mapping[nn.Parameter, Tensor]) -> None:
        """Go on with a model that has been prepared anew. What is new in it, or of another shape, begins as it is.

        Args:
            wholes: the average so far, by the parameters that it had.
        """
        self.binding = binding
        self.restart()
        for unit in binding.engine.units:
            for place in unit.layout.pieces(unit.shard.rank):
                whole = wholes.get(unit.params[place.name])
                if whole is not None and whole.shape == torch.Size(place.shape):
                    self.pieces[place.name].copy_(unit.cut(place, whole))
        binding.averages.append(self)

    @torch.no_grad()
    def update(self) -> None:
        """The weights have changed."""
        for unit in self.binding.engine.units:
            if unit.trainable:
                for name, piece in unit.pieces.items():
                    average = self.pieces[name]
                    average.lerp_(piece.to(average.dtype), 1 - self.decay)

    @contextmanager
    def whole(self) -> Generator[None]:
        """Inside, the model has the averaged weights, whole on every rank. Collective."""
        engine = self.binding.engine
        engine.updates.flush()
        engine.meeting.meet(Want.WHOLE, 4, model=engine.number)  # nobody uses the weights any more
        units = engine.units
        weights = {unit.index: unit.master.clone() for unit in units}
        for unit in units:
            _put(unit, self.pieces)
        try:
            with self.binding.whole(write=False):
                yield
        finally:
            for unit in units:
                with torch.no_grad():
                    unit.master.copy_(weights[unit.index])
                unit.after_load()


@torch.no_grad()
def _put(unit: Unit, pieces: dict[str, Tensor]) -> None:
    for name, piece in unit.pieces.items():
        piece.copy_(pieces[name])
    unit.after_load()
