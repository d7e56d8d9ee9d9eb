"""What hosts tell each other of the ways between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from shoal.doctor.facts import Finding


class Reach(StrEnum):
    """What became of connecting to a port."""

    OPEN = "open"
    SILENT = "no answer"
    REFUSED = "refused"
    NO_WAY = "no route"
    STRANGER = "another program answers"
    UNTRIED = "not tried"


@dataclass(frozen=True, kw_only=True)
class Way:
    """From one host to another, as the first one saw it.

    Args:
        meeting: the port where ranks meet.
        ephemeral: ports that the system hands out; gloo listens on such.
        heard: datagrams of the other one arrive here.
        heard_us: the other one says that ours arrive there.
        rate: bytes per second of one TCP stream to the other one; None: not measured.
        delay: seconds, the median of small round trips.
        offset: seconds that the other one's clock is ahead, give or take `uncertainty`.
    """

    to: str
    meeting: Reach
    ephemeral: Reach = Reach.UNTRIED
    heard: bool = False
    heard_us: bool = False
    rate: float | None = None
    delay: float | None = None
    offset: float | None = None
    uncertainty: float | None = None

    @property
    def whole(self) -> bool:
        """Whether ranks can use it."""
        return self.meeting is Reach.OPEN and self.ephemeral is Reach.OPEN


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """What one host has found so far.

    Args:
        versions: of python, torch and shoal.
        edition: how many of its ways it knows: a later report replaces an earlier one.
        done: nothing more will come.
    """

    name: str
    versions: tuple[tuple[str, str], ...]
    ways: tuple[Way, ...]
    edition: int
    done: bool

    def way(self, to: str) -> Way | None:
        """The way to another host, if it is known yet."""
        return next((way for way in self.ways if way.to == to), None)


@dataclass(frozen=True, kw_only=True)
class Across:
    """What is known of all hosts.

    Args:
        hosts: their names as given.
        own: which of them this one is.
        reports: of the hosts that were heard of.
        findings: what is wrong.
    """

    hosts: tuple[str, ...]
    own: str
    port: int
    reports: tuple[HostReport, ...]
    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """Whether a job over these hosts can work."""
        return not any(finding.fatal for finding in self.findings)
