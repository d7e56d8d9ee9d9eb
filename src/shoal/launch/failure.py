"""How a rank ended, and which rank's end is the reason for the others'."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from shoal.errors import ShoalError


class Failure(BaseModel):
    """What a failing worker leaves behind for its launcher, as `failure-<rank>.json`.

    Args:
        rank: which rank failed.
        time: when, in seconds since 1970.
        type, message: of the exception.
        code: of a shoal error, like "E21".
        traceback: as Python prints it, from the script on.
        exit_code: what the worker exits with.
        secondary: it failed only because another rank could not go on.
    """

    model_config = ConfigDict(frozen=True)

    rank: int
    time: float
    type: str
    message: str
    code: str | None
    traceback: str
    exit_code: int
    secondary: bool

    def write(self, path: Path) -> None:
        """Write it so that a reader finds all or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        beside = path.with_suffix(".part")
        beside.write_text(self.model_dump_json(indent=1) + "\n")
        beside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Failure | None:
        """The failure at `path`, if the worker came to write one."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, UnicodeDecodeError, ValidationError):
            return None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one rank ended.

    Args:
        rank: which.
        code: its exit code, or minus the number of the signal that killed it.
        time: when its end was seen, in seconds since 1970.
        by_launcher: the launcher had told it to go.
        failure: what it said itself.
        last_words: the end of its log, where it could not say why.
    """

    rank: int
    code: int
    time: float
    by_launcher: bool = False
    failure: Failure | None = None
    last_words: str = ""

    def __str__(self) -> str:
        rank, failure = f"rank {self.rank}", self.failure
        if self.code == 0:
            return f"{rank} had finished"
        if self.by_launcher:
            return f"{rank} was ended by shoal run"
        if self.code < 0:
            return f"{rank} was killed by {_signal_name(-self.code)}"
        if failure is None:
            return f"{rank} left with exit code {self.code} and no traceback"
        first_line = failure.message.partition("\n")[0]
        if failure.type == "SystemExit":
            return f"{rank} left with exit code {self.code}" + (f": {first_line}" if first_line else "")
        return f"{rank}: {failure.type}: {first_line}"


def first_failure(ends: Sequence[Ended]) -> Ended | None:
    """The failure that explains the others: the earliest that no other rank's failure explains."""
    failures = [end for end in ends if end.code and not end.by_launcher]
    return min(failures, key=_rank_of_blame, default=None)


def _rank_of_blame(end: Ended) -> tuple[bool, float]:
    return (end.failure.secondary, end.failure.time) if end.failure else (False, end.time)


def exit_code(ends: Sequence[Ended]) -> int:
    """0 if all is fine, a shoal error's own code (2, 4, 5), 1 for anything else the user's program did."""
    first = first_failure(ends)
    if first is None:
        return 0
    named = first.failure is not None and first.failure.code is not None
    return first.failure.exit_code if first.failure and named else ShoalError.exit_code


def report(ends: Sequence[Ended]) -> str:
    """The first failing rank's own traceback, then a line for each other rank."""
    first = first_failure(ends)
    if first is None:
        return ""
    lines = [_in_full(first), *(str(end) for end in ends if end is not first)]
    return "\n".join(lines) + "\n"


def _in_full(end: Ended) -> str:
    if end.failure is not None and end.failure.type != "SystemExit":
        return f"rank {end.rank} failed:\n{end.failure.traceback.rstrip()}"
    lines = [str(end)]
    if end.code == -signal.SIGKILL:
        lines.append("  cause: most often the machine ran out of memory")
    if end.last_words:
        lines += ["  its last words:", *(f"    {line}" for line in end.last_words.splitlines())]
    return "\n".join(lines)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have numbers only
        return f"signal {number}"
