"""Every mistake a user can make, as a tree.

::

    ShoalError                  what happened, why, and the way out
    |-- ConfigError             exit 2: what was asked for cannot be
    |   |-- StrategyError       E01  unknown or impossible strategy
    |   |-- SettingError        E02  unknown setting, or a value that does not fit
    |   |-- BatchError          E03  global batch, micro-batch and leaves contradict each other
    |   |-- ModelError          E04  a model that cannot be trained as it is
    |   |-- OptimizerError      E05  an optimizer that cannot be used as it is
    |   `-- DataError           E06  a data set that cannot be read as it was described
    |-- AwayError               E10  something was touched that is not on this rank now
    |-- ProgramError            the program and its plan disagree
    |   |-- DivergedError       E20  ranks do different things
    |   |-- PlanError           E21  this leaf differs from the recorded one
    |   `-- OrderError          E22  a call that makes no sense at this moment
    |-- PeerError               another rank cannot go on
    |   |-- PeerLost            E30  a rank died or left
    |   |-- StalledError        E31  nobody moved for `timeout` seconds
    |   `-- PeerFailed          E32  what a rank did for all of them has failed
    |-- CheckpointError         exit 4: a checkpoint cannot be used
    |   |-- DamagedError        E40  truncated, flipped or missing
    |   |-- ResumeError         E41  whole, but it does not fit this job
    |   `-- SaveError           E42  it could not be written; older ones are intact
    `-- EnvironmentFault        E50  exit 5: the machine or its variables do not allow it

The text of every error is one line of what happened, with values, then the likely cause, then the command or setting
that helps.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class ShoalError(Exception):
    """Base of all errors that shoal raises on purpose.

    Args:
        what: one line: what happened, with values.
        cause: the likely cause, if it is not obvious.
        remedy: the line to write, the setting to change or the command to run.
    """

    code: ClassVar[str] = "E00"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, cause: str = "", remedy: str = "") -> None:
        self.what, self.cause, self.remedy = what, cause, remedy
        lines = [f"shoal[{self.code}] {what}"]
        if cause:
            lines.append(f"  cause: {cause}")
        if remedy:
            lines.append(f"  try:   {remedy}")
        super().__init__("\n".join(lines))


class ConfigError(ShoalError):
    """What was asked for cannot be."""

    exit_code = 2


class StrategyError(ConfigError):
    """An unknown or impossible strategy."""

    code = "E01"


class SettingError(ConfigError):
    """An unknown setting, or a value that does not fit."""

    code = "E02"


class BatchError(ConfigError):
    """Global batch, micro-batch and leaves contradict each other."""

    code = "E03"


class ModelError(ConfigError):
    """A model that cannot be trained as it is."""

    code = "E04"


class OptimizerError(ConfigError):
    """An optimizer that cannot be used as it is."""

    code = "E05"


class DataError(ConfigError):
    """A data set that cannot be read as it was described."""

    code = "E06"


class AwayError(ShoalError):
    """A parameter, gradient or state was touched that is not on this rank now."""

    code = "E10"


class ProgramError(ShoalError):
    """The program and its plan disagree."""


class DivergedError(ProgramError):
    """Ranks do different things."""

    code = "E20"


class PlanError(ProgramError):
    """This leaf differs from the recorded one."""

    code = "E21"


class OrderError(ProgramError):
    """A call that makes no sense at this moment."""

    code = "E22"


class PeerError(ShoalError):
    """Another rank cannot go on."""


class PeerLost(PeerError):
    """A rank died or left."""

    code = "E30"


class StalledError(PeerError):
    """Nobody moved for `timeout` seconds."""

    code = "E31"


class PeerFailed(PeerError):
    """What a rank did for all of them has failed; all ranks are still there."""

    code = "E32"


class CheckpointError(ShoalError):
    """A checkpoint cannot be used."""

    exit_code = 4


class DamagedError(CheckpointError):
    """A checkpoint is truncated, flipped or missing a part."""

    code = "E40"


class ResumeError(CheckpointError):
    """A whole checkpoint that does not fit this job."""

    code = "E41"


class SaveError(CheckpointError):
    """A checkpoint could not be written. Older ones are intact."""

    code = "E42"


class EnvironmentFault(ShoalError):
    """The machine or its variables do not allow it."""

    code = "E50"
    exit_code = 5


def nearest(word: str, known: Iterable[str]) -> str:
    """`'did you mean "zero3"? '` for a near miss, then all that is known."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"
