"""A thread that waits in gloo, so that nobody else must.

Who waits in gloo may never come back: a receive of which a part had arrived when its sender died is forgotten there;
neither the end of the connection nor gloo's own time-out ends it. An interrupt from the keyboard is not heard in it.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue

import torch.distributed as dist

Transfer = tuple[int, dist.Work]
"""What is under way, and with which rank."""
Lost = tuple[int, Exception]
"""The rank with which a transfer failed, and what gloo says."""


class Waiter:
    """Threads that wait for transfers, one for each list under way: none waits behind another that depends on it."""

    def __init__(self) -> None:
        self._threads: list[_Thread] = []

    @property
    def peers(self) -> set[int]:
        """For whom they wait now."""
        return {t.peer for t in self._threads if t.busy and t.peer is not None}

    def wait_for(self, works: list[Transfer]) -> SimpleQueue[Lost | None]:
        """Where the outcome will come: None if all is well."""
        thread = next((t for t in self._threads if not t.busy), None)
        if thread is None:
            thread = _Thread()
            self._threads.append(thread)
        return thread.wait_for(works)

    def close(self) -> None:
        for thread in self._threads:
            thread.close()


class _Thread:
    def __init__(self) -> None:
        self.peer: int | None = None  # for whom it waits now
        self.busy = False
        self._todo: SimpleQueue[tuple[list[Transfer], SimpleQueue[Lost | None]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="shoal-wait", daemon=True)
        self._thread.start()

    def wait_for(self, works: list[Transfer]) -> SimpleQueue[Lost | None]:
        outcome = SimpleQueue[Lost | None]()
        self.busy = True
        self._todo.put((works, outcome))
        return outcome

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join(0.1)

    def _run(self) -> None:
        while (task := self._todo.get()) is not None:
            works, outcome = task
            lost = self._wait(works)
            self.busy = False
            outcome.put(lost)
            del task, works, outcome  # buffers are not kept until the next

    def _wait(self, works: list[Transfer]) -> Lost | None:
        for self.peer, work in works:
            try:
                work.wait()
            except RuntimeError as e:
                return self.peer, e
        return None
