"""What lies on the host and what lies on a device travel over carriers of their own, in one job."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.comm.group import Box, Carrier, Common, Kept, Like, MakeSums, Parcel, Pending, Strips
from shoal.comm.levels import Levels

Far = Callable[[torch.device], bool]


def off_host(device: torch.device) -> bool:
    """Is it anything but the CPU, or nothing at all?"""
    return device.type not in ("cpu", "meta")


class Routed:
    """Sends each strip over the carrier of its device.

    Args:
        host: for the host's memory; it also carries marks and says why the job ends.
        device: for everything else.
        far: which devices are not the host.
    """

    def __init__(self, host: Carrier, device: Carrier, far: Far = off_host) -> None:
        self.host, self.device, self.far = host, device, far
        self.rank, self.size, self.sent = host.rank, host.size, host.sent

    @property
    def ordered(self) -> bool:
        return self.host.ordered or self.device.ordered

    @property
    def plenty(self) -> int:
        return max(self.host.plenty, self.device.plenty)

    @property
    def levels(self) -> Levels:
        return self.host.levels

    @property
    def closed(self) -> bool:
        return self.host.closed

    @property
    def failed(self) -> bool:
        return self.host.failed or self.device.failed

    def post(self, label: str, sends: Sequence[Parcel], receives: Sequence[Box]) -> Pending:
        near = [not self._is_far(box) for _, box in receives]
        both = [
            carrier.post(
                label,
                [parcel for parcel in sends if self._is_far(parcel[1]) == away],
                [box for box, is_near in zip(receives, near, strict=True) if is_near != away],
            )
            for away, carrier in ((False, self.host), (True, self.device))
            if any(is_near != away for is_near in near) or any(self._is_far(s) == away for _, s in sends)
        ]
        return both[0] if len(both) == 1 else Both(both, near)

    def expect(self, label: str, receives: Sequence[Box]) -> object:
        return None if any(self._is_far(box) for _, box in receives) else self.host.expect(label, receives)

    def _is_far(self, box: Strips | Like) -> bool:
        if isinstance(box, Like):
            return self.far(box.device)
        return bool(box) and self.far(box[0].device)

    def _of(self, device: torch.device) -> Carrier:
        return self.device if self.far(device) else self.host

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._of(device).empty(numel, dtype, device)

    def idle(self, tensor: Tensor) -> bool:
        return self._of(tensor.device).idle(tensor)

    def common(
        self, label: str, ranks: Sequence[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Common | None:  # fmt: skip
        return self._of(device).common(label, ranks, numel, dtype, device)

    def sums(self, device: torch.device) -> MakeSums | None:
        return self._of(device).sums(device)

    def note(self, mark: str) -> None:
        self.host.note(mark)

    def hold(self, reason: str) -> None:
        self.host.hold(reason)

    def rest(self) -> None:
        self.host.rest()
        self.device.rest()

    def kept(self) -> Kept:
        return self.host.kept() + self.device.kept()

    def fail(self, why: str) -> None:
        self.host.fail(why)  # first: who waits for the device is freed by it
        self.device.fail(why)

    def close(self) -> None:
        if self.host.failed and not self.device.failed:
            self.device.fail("the job has failed")  # or it would wait for the others to end in good order
        self.device.close()
        if not self.host.closed:  # both may be one
            self.host.close()


class Both:
    """Transfers over both carriers. `near`: which boxes the first of them fills."""

    def __init__(self, both: list[Pending], near: list[bool]) -> None:
        self.both, self.near = both, near

    def ready(self) -> bool:
        return all(pending.ready() for pending in self.both)

    def wait(self) -> Sequence[Strips]:
        came = [iter(pending.wait()) for pending in self.both]
        return [next(came[0 if is_near else 1]) for is_near in self.near]

    def release(self) -> None:
        for pending in self.both:
            pending.release()
