"""Never wait for nothing: every rank publishes what it does; who waits too long reads what the others do.

A wait is reported after `REPORT` seconds and ends after `timeout` seconds without a change of any living rank's mark. A
rank that works under a lease (saving, `job.whole`) changes its mark all the time, as long as it lives. Why the job
cannot go on is said once: the first verdict counts, and all ranks raise it.

A background thread talks to the store, which hangs when the rank that serves it is stopped; the thread that waits has
only the clock.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

from torch._C._distributed_c10d import Store

from shoal.comm.group import LAST_DOING
from shoal.errors import PeerError, PeerLost, StalledError

REPORT = 5.0
"""Seconds until a wait is reported."""
TICK = 0.2
"""Seconds between two looks."""
LOOK = 0.3
"""Seconds of a wait until the others' marks are read."""
LEFT = 0.5
"""Seconds until a wait for a rank that has closed the job ends."""
ANSWER = 0.5
"""Seconds that the store has to answer when something has failed."""
LINGER = 0.5
"""Seconds that the rank which serves the store stays for the others to read why."""


class Mark(NamedTuple):
    """What a rank does, for the others to read."""

    number: int = 0
    doing: str = "starts"
    where: str = ""
    lease: str = ""
    waits: bool = False
    beat: int = 0  # counts while this rank works under a lease

    def __str__(self) -> str:
        state = f"holds: {self.lease}" if self.lease else "waits" if self.waits else "runs"
        place = f" {'in' if self.waits else 'since'} '{self.where}'" if self.where else ""
        return f"{state}{place} ({self.doing})"


class Verdict(NamedTuple):
    """Why the job cannot go on. `code` of a PeerError; `deaf`: so many ranks will not read this."""

    code: str
    what: str
    cause: str
    remedy: str
    deaf: int = 0

    def error(self, rank: int, where: str) -> PeerError:
        """What `rank` raises, which was in the transfer `where`."""
        if self.code == StalledError.code:
            return StalledError(self.what, cause=self.cause, remedy=self.remedy)
        return PeerLost(f"{self.what}; rank {rank} was in '{where}'", cause=self.cause, remedy=self.remedy)


class Watch:
    """Publishes this rank's mark and watches the others' while this rank waits.

    Args:
        store: keys of this job alone, in which every rank has called `enter`. Used from one background thread only.
        timeout: see above.
        report: called with a text when a wait takes long.
        alive: is the store still there? Torch prints traces when it finds that out itself.
        server: the rank whose process serves the store; None: none of them.
    """

    def __init__(
        self, store: Store, rank: int, size: int, *, timeout: float, report: Callable[[str], None],
        alive: Callable[[], bool], server: int | None,
    ) -> None:  # fmt: skip
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.report, self.alive, self.server = report, alive, server
        self.number, self.doing, self.where, self.leases = 0, Mark().doing, "", list[str]()
        self.since: float | None = None
        self.reported = False
        self.marks, self.changed = list[Mark | None]([None]) * size, 0.0
        self.ended: Verdict | None = None
        self.deaf = False  # the store is gone
        self._published, self._read_before, self._heard = Mark(), list[bytes](), 0
        self._said: Verdict | None = None
        self._asking: float | None = None  # since when the store owes an answer
        self._asked, self._answered, self._news = 0, 0, threading.Condition()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="shoal-look", daemon=True)
        self._thread.start()

    @staticmethod
    def enter(store: Store, rank: int) -> None:
        """Leave the first mark, before any rank reads it."""
        store.compare_set("verdict", "", "")
        store.set(f"mark/{rank}", json.dumps(Mark()))

    # ---------------------------------------------------------------- this rank

    def note(self, doing: str) -> None:
        """What this rank does now, in words."""
        self.doing, self.number = doing, self.number + 1

    def at(self, label: str) -> None:
        """Which transfer this rank has come to."""
        self.where, self.number = label, self.number + 1

    def hold(self, reason: str) -> None:
        """Take a lease, or ("") give the latest back."""
        if reason:
            self.leases.append(reason)
        else:
            self.leases.pop()
        self.number += 1

    @contextmanager
    def waiting(self, label: str) -> Generator[None]:
        outer = self.where, self.since, self.reported
        self.where, self.since, self.reported = label, time.monotonic(), False
        try:
            yield
        finally:
            self.since = None
            if outer[1] is not None:  # what was looked after while this rank waited for something else
                self.where, self.since, self.reported = outer

    def end(self, verdict: Verdict) -> Verdict:
        """Say why the job cannot go on. Returns the first word on it, from whatever rank."""
        if self.ended is None:
            self._said = self._said or verdict
            self._ask(ANSWER)
        if self.ended is None:  # the store does not answer
            self.ended = verdict
        return self.ended

    def verdict(self) -> Verdict | None:
        """What any rank has said, as far as the store answers."""
        if self.ended is None:
            self._ask(ANSWER)
        return self.ended

    def linger(self) -> None:
        """Where this process serves the store: let the others read the verdict before it goes."""
        deadline = time.monotonic() + LINGER
        readers = self.size - (self.ended.deaf if self.ended else 0)
        while self.server == self.rank and self._heard < readers and time.monotonic() < deadline:
            self._ask(TICK)
            time.sleep(0.01)

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._thread.join(ANSWER)  # if it came back from torch during the interpreter's end, that would abort us
        if not self._thread.is_alive():
            del self.store  # its connection ends with it

    def _mark(self) -> Mark:
        lease = self.leases[-1] if self.leases else ""
        return Mark(self.number, self.doing, self.where, lease, self.since is not None)

    # ---------------------------------------------------------------- the store

    def _ask(self, patience: float) -> None:
        """Have the store looked at now; return when it has answered, or after `patience` seconds."""
        with self._news:
            self._asked += 1
            mine = self._asked
            self._wake.set()
            self._news.wait_for(lambda: self.deaf or self._answered >= mine, patience)

    def _look(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(TICK)
            self._wake.clear()
            asked = self._asked
            try:
                self._asking = time.monotonic()
                if not self.alive():
                    raise RuntimeError("the store is gone")
                self._publish()
                self._listen()
                since = self.since
                if asked > self._answered or (since is not None and time.monotonic() - since >= LOOK):
                    self._read()
            except RuntimeError:
                self.deaf = True
            with self._news:
                self._asking, self._answered = None, asked
                self._news.notify_all()
            if self.deaf:
                return

    def _publish(self) -> None:
        mark = self._mark()
        mark = mark._replace(beat=self._published.beat + bool(mark.lease and not mark.waits))
        if mark != self._published:
            self.store.set(f"mark/{self.rank}", json.dumps(mark))
            self._published = mark
        if self._said is not None and self.ended is None:
            self._hear(self.store.compare_set("verdict", "", json.dumps(self._said)))

    def _listen(self) -> None:
        verdict = self.store.get("verdict")
        if verdict:
            self._hear(verdict)
        if self.ended is not None and self.server == self.rank:
            self._heard = int(self.store.add("heard", 0))

    def _read(self) -> None:
        marks = self.store.multi_get([f"mark/{r}" for r in range(self.size)])
        if marks != self._read_before:
            self._read_before, self.changed = marks, time.monotonic()
            self.marks = [Mark(*json.loads(m)) for m in marks]

    def _hear(self, verdict: bytes) -> None:
        if self.ended is None:
            self.ended = Verdict(*json.loads(verdict))
            self.store.add("heard", 1)

    # ---------------------------------------------------------------- the clock

    def judge(self) -> Verdict | None:
        """For who waits, every `TICK` seconds: is it over? Reports a long wait."""
        now, since = time.monotonic(), self.since
        if self.ended is not None or since is None:
            return self.ended
        if now - since >= REPORT and not self.reported:
            self.reported = True
            self.report(f"rank {self.rank} has waited {now - since:.0f} s\n{self.table()}")
        quiet = now - max(since, self.changed)
        left = next((r for r, m in enumerate(self.marks) if m and m.doing == LAST_DOING and r != self.rank), None)
        if left is not None and quiet >= LEFT and not self.where.startswith("meet "):
            return self.end(_left(left))
        return self.end(self._stalled()) if quiet >= self.timeout else None

    def _stalled(self) -> Verdict:
        return Verdict(
            StalledError.code, f"nobody moved for {self.timeout:g} s; the last marks are\n{self.table()}",
            "ranks do different things, or one of them is stuck or stopped",
            "if a rank rightly works for longer, raise timeout= (seconds), or do it inside job.whole(model)",
        )  # fmt: skip

    def table(self) -> str:
        """Every rank's last mark, a line each."""
        marks = [self._mark() if rank == self.rank else mark for rank, mark in enumerate(self.marks)]
        lines = [f"    rank {rank} {mark or 'is not known of'}" for rank, mark in enumerate(marks)]
        asking = self._asking
        if self.deaf or (asking is not None and time.monotonic() - asking > 2 * TICK):
            who = f"rank {self.server}, which keeps these marks," if self.server is not None else "the store"
            lines.append(f"    {who} does not answer: the marks may be old")
        return "\n".join(lines)


def _left(rank: int) -> Verdict:
    return Verdict(
        PeerLost.code, f"rank {rank} {LAST_DOING}", "it left earlier than the others, perhaps by sys.exit()",
        "let all ranks train the same number of steps",
    )  # fmt: skip
