"""Work that every rank does a part of, and that succeeds on all ranks or fails on all with the same error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple, cast

from shoal.errors import CheckpointError, ShoalError

Share = Callable[[bytes], list[bytes]]
"""An all-gather: hand in this rank's bytes, get those of all ranks in rank order. Lengths may differ."""


class Report(NamedTuple):
    """What went wrong on one rank, as it travels. `code` is empty for what shoal did not raise itself."""

    rank: int
    code: str
    what: str
    cause: str
    remedy: str


def together(work: Callable[[], object], share: Share, error: Callable[[Report], CheckpointError]) -> list[object]:
    """Do this rank's part and hand out what came of it.

    Args:
        work: gives a value that JSON can hold.
        share: the all-gather over the ranks that call this.
        error: makes the error to raise from the report of the first rank that failed.

    Returns:
        The values of all ranks in rank order.

    Raises:
        CheckpointError: a rank failed. On every rank, with the same text.
    """
    failure: Exception | None = None
    try:
        mine: dict[str, object] = {"value": work()}
    except Exception as e:  # any rank that leaves here without a word leaves the others waiting
        failure, mine = e, {"failed": _tell(e)}
    replies: list[dict[str, object]] = [json.loads(reply) for reply in share(json.dumps(mine).encode())]
    for rank, reply in enumerate(replies):
        if "failed" in reply:
            raise error(Report(rank, *cast("list[str]", reply["failed"]))) from failure
    return [reply["value"] for reply in replies]


def _tell(error: Exception) -> list[str]:
    if isinstance(error, ShoalError):
        return [error.code, error.what, error.cause, error.remedy]
    return ["", str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}", "", ""]
