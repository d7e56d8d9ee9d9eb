"""A script in fresh processes, as the ranks of this host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from shoal.launch.place import places_here


def told_by_rank_0(command: Sequence[str], ranks: int, patience: float, what: str) -> dict[str, object]:
    """Run a script of Python once for each rank.

    Args:
        command: the script and its arguments.
        ranks: how many; one alone is not told that it is a rank.
        patience: seconds until all are given up and killed.
        what: it is, for the message if one fails.

    Returns:
        The last line of rank 0's standard output, which is JSON.
    """
    running: list[subprocess.Popen[str]] = []
    try:
        for place in places_here(ranks) if ranks > 1 else [{}]:
            running.append(
                subprocess.Popen(
                    [sys.executable, *command], env=os.environ | place, stdout=subprocess.PIPE, text=True
                )
            )  # fmt: skip
        said = [rank.communicate(timeout=patience)[0] for rank in running]
    finally:
        for rank in running:
            rank.kill()
    if any(rank.returncode for rank in running):
        raise SystemExit(f"{what}: a rank failed; see above")
    return json.loads(said[0].splitlines()[-1])
