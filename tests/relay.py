"""A switch in user space between TAP devices that delays and loses frames: python relay.py DELAY LOSS COUNT.

Device `tap<i>` leads to the host whose hardware address ends in i. Prints a line once it forwards.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x0002 | 0x1000
FRAME = 9018  # bytes: the links' MTU and a header
BURST = 64  # frames read in a row before those that are due get their turn


def attach(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP_NO_PI))
    return fd


def relay(taps: dict[int, int], delay: float, loss: float) -> None:
    """Forward for ever. The delay is the same for all, so frames leave in the order of their arrival."""
    draw = random.Random(0).random
    waiting: deque[tuple[float, bytes, list[int]]] = deque()
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select(list(taps.values()), [], [], pause)
        for tap in ready:
            with suppress(BlockingIOError):
                for _ in range(BURST):
                    frame = os.read(tap, FRAME)
                    if draw() >= loss:
                        waiting.append((time.monotonic() + delay, frame, targets(taps, tap, frame)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, frame, to = waiting.popleft()
            for tap in to:
                with suppress(OSError):  # a link that is down or full loses the frame
                    os.write(tap, frame)


def targets(taps: dict[int, int], source: int, frame: bytes) -> list[int]:
    if frame[0] & 1:  # to all
        return [tap for tap in taps.values() if tap != source]
    return [taps[frame[5]]] if frame[5] in taps else []


if __name__ == "__main__":
    delay, loss, count = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    devices = {i: attach(f"tap{i}") for i in range(1, count + 1)}
    print("ready", flush=True)
    relay(devices, delay, loss)
