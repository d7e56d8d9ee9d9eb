"""Where this process stands among all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.errors import EnvironmentFault
from shoal.settings import LAUNCHER

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_ALL = (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT")
_REMEDY = "shoal run --workers N script.py, or torchrun; to run alone: unset " + " ".join(_NUMBERS)


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank's place in the world.

    Args:
        rank, world: this rank and how many there are.
        local_rank, local_world: the same among the ranks of this host.
        host, port: where the store is (to be) found.
        agent_store: a launcher holds the store already; else rank 0 starts it.
        launched_by: "shoal run", "torchrun" or "environment".
        attempt: how often torchrun has restarted all ranks.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    host: str
    port: int
    agent_store: bool
    launched_by: str
    attempt: int = 0


def find_place(environ: Mapping[str, str]) -> Place | None:
    """This process's place, or None when it was started alone.

    Raises:
        EnvironmentFault: variables that are partly missing, no numbers, or contradict each other.
    """
    if not any(name in environ for name in _NUMBERS):
        return None  # clusters set MASTER_ADDR for everybody
    missing = [name for name in _ALL if not environ.get(name)]
    if missing:
        present = [f"{name}={environ[name]}" for name in _ALL if environ.get(name)]
        raise EnvironmentFault(f"{' '.join(present) or 'RANK='} without {', '.join(missing)}", remedy=_REMEDY)
    place = Place(
        rank=_number(environ, "RANK", 0),
        world=_number(environ, "WORLD_SIZE", 1),
        local_rank=_number(environ, "LOCAL_RANK", 0),
        local_world=_number(environ, "LOCAL_WORLD_SIZE", 1),
        host=environ["MASTER_ADDR"],
        port=_number(environ, "MASTER_PORT", 1, 65535),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        launched_by=_launcher(environ),
        attempt=_number(environ, RESTARTS, 0) if environ.get(RESTARTS) else 0,
    )
    for wrong, name, other in (
        (place.rank >= place.world, "RANK", "WORLD_SIZE"),
        (place.local_rank >= place.local_world, "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        (place.local_world > place.world, "LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    ):
        if wrong:
            raise EnvironmentFault(f"{name}={environ[name]} contradicts {other}={environ[other]}", remedy=_REMEDY)
    return place


def _number(environ: Mapping[str, str], name: str, least: int, most: int = 2**31 - 1) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise EnvironmentFault(f"{name}={text!r} is not a whole number from {least} to {most}", remedy=_REMEDY)
    return int(text)


def _launcher(environ: Mapping[str, str]) -> str:
    if LAUNCHER in environ:
        return "shoal run"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "environment"
