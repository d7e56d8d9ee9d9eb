"""Tensors of a device travel through host memory, over a carrier that knows only the host's.

For ranks whose devices have no way to each other: several ranks on one of them, or a network that no library of the
device knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shoal.comm.boxes import Boxes
from shoal.comm.group import Box, Carrier, Common, Kept, MakeSums, Parcel, Pending, Strips
from shoal.comm.levels import Levels
from shoal.comm.pool import Pool

HOST = torch.device("cpu")


class Staged:
    """Copies what is sent to the host, and what comes from there.

    Args:
        host: moves what lies in the host's memory.
        pinned: use memory that the device reaches by itself.
    """

    ordered = False

    def __init__(self, host: Carrier, *, pinned: bool) -> None:
        self.host, self.pinned = host, pinned
        self.rank, self.size, self.sent, self.plenty = host.rank, host.size, host.sent, host.plenty
        self.spare = Pool()
        self.stages = Pool(
            lambda numel, dtype, _: torch.empty(numel, dtype=dtype, device=HOST, pin_memory=pinned),
            least=0,
        )

    @property
    def levels(self) -> Levels:
        return self.host.levels

    @property
    def closed(self) -> bool:
        return self.host.closed

    @property
    def failed(self) -> bool:
        return self.host.failed

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        boxes = Boxes(receives, self.spare)
        copies: dict[int, Tensor] = {}  # what goes to several ranks is copied once
        for strip in (strip for _, strips in sends for strip in strips):
            if id(strip) not in copies:
                copies[id(strip)] = self.stage_of(strip).copy_(strip.view(-1), non_blocking=self.pinned)
        self.copied(strip for _, strips in sends for strip in strips)
        landing = [[self.stage_of(strip) for strip in strips] for _, strips in boxes.filled]
        under_way = self.host.post(
            label,
            [(peer, [copies[id(strip)] for strip in strips]) for peer, strips in sends],
            [(peer, stages) for (peer, _), stages in zip(boxes.filled, landing, strict=True)],
        )
        return Landing(self, under_way, boxes, landing, list(copies.values()))

    def stage_of(self, strip: Tensor) -> Tensor:
        """Memory of the host for it."""
        return self.stages.take(strip.numel(), strip.dtype, HOST)

    def copied(self, strips: Iterable[Tensor]) -> None:
        """Return when copies from or to these strips are done."""
        if self.pinned:
            for device in {strip.device for strip in strips}:
                torch.accelerator.current_stream(device).synchronize()

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        return None

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def idle(self, tensor: Tensor) -> bool:
        return True

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        return None

    def sums(self, device: torch.device) -> MakeSums | None:
        return None

    def note(self, mark: str) -> None:
        self.host.note(mark)

    def hold(self, reason: str) -> None:
        self.host.hold(reason)

    def rest(self) -> None:
        return

    def kept(self) -> Kept:
        return Kept(self.spare.out, self.spare.nbytes) + Kept(self.stages.out, self.stages.nbytes)

    def fail(self, why: str) -> None:
        self.host.fail(why)

    def close(self) -> None:
        self.host.close()


class Landing:
    """What comes into the host's memory and has to go on."""

    def __init__(
        self, carrier: Staged, under_way: Pending, boxes: Boxes, landing: list[list[Tensor]], sent: list[Tensor]
    ) -> None:
        self.carrier, self.under_way, self.boxes, self.landing, self.sent = carrier, under_way, boxes, landing, sent

    def ready(self) -> bool:
        return self.under_way.ready()

    def wait(self) -> Sequence[Strips]:
        self.under_way.wait()
        if self.landing or self.sent:
            pairs = [
                pair
                for (_, strips), stages in zip(self.boxes.filled, self.landing, strict=True)
                for pair in zip(strips, stages, strict=True)
            ]
            for strip, stage in pairs:
                strip.view(-1).copy_(stage, non_blocking=self.carrier.pinned)
            self.carrier.copied(strip for strip, _ in pairs)  # or what comes next would overtake the copy
            for stage in (*(stage for _, stage in pairs), *self.sent):
                self.carrier.stages.give(stage)
            self.landing, self.sent = [], []
        return self.boxes.received()

    def release(self) -> None:
        self.under_way.release()
        self.boxes.release()
