"""What shoal says on stderr: rank 0 speaks, others only to warn. Every line begins with "shoal"."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """For rank 0: something worth knowing."""
    print(f"shoal: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """From any rank: something is not as it should be."""
    print(f"shoal: warning: {text}", file=sys.stderr, flush=True)
