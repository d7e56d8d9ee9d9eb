"""Where this process stands among all ranks."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.errors import EnvironmentFault
from shoal.launch.clusters import NAMES, NUMBERS, Told, Word, told_by_open_mpi, told_by_slurm
from shoal.settings import LAUNCHER

RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_REMEDY = "shoal run --workers N script.py, or torchrun; to run alone: unset " + " ".join(NUMBERS)


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank's place in the world.

    Args:
        rank, world: this rank and how many there are.
        local_rank, local_world: the same among the ranks of this host.
        host, port: where the store is (to be) found.
        agent_store: a launcher holds the store already; else rank 0 starts it.
        launched_by: "shoal run", "torchrun", "Open MPI", "Slurm" or "environment".
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


def places_here(count: int) -> list[dict[str, str]]:
    """What each of `count` ranks is told in its environment where this host is all of their world."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alike = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [{**alike, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def find_place(environ: Mapping[str, str]) -> Place | None:
    """This process's place, or None when it was started alone.

    torchrun's variables win where they are complete. mpirun's come before those of Slurm, which mpirun may have used
    to reach other hosts: then Slurm speaks of mpirun's helpers.

    Raises:
        EnvironmentFault: variables that are partly missing, no numbers, or contradict each other.
    """
    told = _told(environ)
    if told is None:
        return None
    words = told.words
    place = Place(
        rank=_number(told, "RANK", 0),
        world=_number(told, "WORLD_SIZE", 1),
        local_rank=_number(told, "LOCAL_RANK", 0),
        local_world=_number(told, "LOCAL_WORLD_SIZE", 1),
        host=words["MASTER_ADDR"].value,
        port=_number(told, "MASTER_PORT", 1, 65535),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        launched_by=told.launcher,
        attempt=_whole(Word(RESTARTS, environ[RESTARTS]), 0, 2**31 - 1, _REMEDY) if environ.get(RESTARTS) else 0,
    )
    for wrong, name, other in (
        (place.rank >= place.world, "RANK", "WORLD_SIZE"),
        (place.local_rank >= place.local_world, "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        (place.local_world > place.world, "LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    ):
        if wrong:
            raise _contradiction(words[name], words[other], told.remedy)
    by_hand = words["RANK"].variable == "RANK"  # mpirun and Slurm number the ranks of a host as they like
    if by_hand and place.local_world == place.world and place.local_rank != place.rank:
        raise _contradiction(
            words["RANK"], words["LOCAL_RANK"], "leave RANK to the launcher: shoal run, or torchrun",
            cause=f"all {place.world} ranks are on this host; is a rank written into the script?",
        )  # fmt: skip
    return place


def _told(environ: Mapping[str, str]) -> Told | None:
    """Who has started this process, and what it says."""
    if all(environ.get(name) for name in NAMES):
        return _told_plainly(environ)
    told = told_by_open_mpi(environ) or told_by_slurm(environ)
    if told is None:
        # clusters set MASTER_ADDR for everybody
        return _told_plainly(environ) if any(name in environ for name in NUMBERS) else None
    for name in NUMBERS:
        word = Word(name, environ.get(name) or told.words[name].value)
        if word.value != told.words[name].value:
            raise _contradiction(word, told.words[name], f"unset {name}; or set all of {' '.join(NAMES)}")
    return told


def _told_plainly(environ: Mapping[str, str]) -> Told:
    missing = [name for name in NAMES if not environ.get(name)]
    if missing:
        present = [f"{name}={environ[name]}" for name in NAMES if environ.get(name)]
        raise EnvironmentFault(f"{' '.join(present) or 'RANK='} without {', '.join(missing)}", remedy=_REMEDY)
    return Told(_launcher(environ), {name: Word(name, environ[name]) for name in NAMES}, _REMEDY)


def _number(told: Told, name: str, least: int, most: int = 2**31 - 1) -> int:
    return _whole(told.words[name], least, most, told.remedy)


def _whole(word: Word, least: int, most: int, remedy: str) -> int:
    text = word.value
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise EnvironmentFault(f"{word.variable}={text!r} is not a whole number from {least} to {most}", remedy=remedy)
    return int(text)


def _contradiction(word: Word, other: Word, remedy: str, cause: str = "") -> EnvironmentFault:
    what = f"{word.variable}={word.value} contradicts {other.variable}={other.value}"
    return EnvironmentFault(what, cause=cause, remedy=remedy)


def _launcher(environ: Mapping[str, str]) -> str:
    if LAUNCHER in environ:
        return "shoal run"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "environment"
