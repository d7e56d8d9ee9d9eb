"""What Slurm and Open MPI tell a rank, in torchrun's words. Pure functions of the environment."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from shoal.errors import EnvironmentFault

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NAMES = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")
_PORTS = range(10000, 30000)  # below those that systems hand out by themselves
_NO_STEP = 0xFFFFFFF0  # steps from here on are Slurm's own: the script of a batch, an interactive shell
_OMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")


class Word(NamedTuple):
    """A value, and the variable that says it."""

    variable: str
    value: str


class Told(NamedTuple):
    """What a launcher says: a word for each of `NAMES`. `remedy`: what helps if the words cannot be."""

    launcher: str
    words: Mapping[str, Word]
    remedy: str


# ---------------------------------------------------------------- Open MPI


def told_by_open_mpi(environ: Mapping[str, str]) -> Told | None:
    """What `mpirun` says; None: it has not started this process.

    Raises:
        EnvironmentFault: words are missing, or where rank 0 is cannot be known.
    """
    remedy = f"start all ranks with one mpirun; to run alone: unset {' '.join(_OMPI)} PMIX_RANK"
    if not any(environ.get(name) for name in (*_OMPI, "PMIX_RANK")):
        return None
    _complete(environ, (*_OMPI, "PMIX_RANK"), _OMPI, remedy)
    words = {name: Word(theirs, environ[theirs]) for name, theirs in zip(NUMBERS, _OMPI, strict=True)}
    one_host = words["WORLD_SIZE"].value == words["LOCAL_WORLD_SIZE"].value
    if not environ.get("MASTER_ADDR") and not one_host:
        raise EnvironmentFault(
            f"mpirun has started {words['LOCAL_WORLD_SIZE'].value} of {words['WORLD_SIZE'].value} ranks on this host "
            "and does not say where rank 0 is",
            remedy="mpirun -x MASTER_ADDR=<host of rank 0> ...",
        )
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
    words["MASTER_ADDR"] = _given(environ, "MASTER_ADDR", "127.0.0.1")
    words["MASTER_PORT"] = _port(environ, "mpirun", job, "mpirun -x MASTER_PORT=<a free port> ...")
    return Told("Open MPI", words, remedy)


# ---------------------------------------------------------------- Slurm


def told_by_slurm(environ: Mapping[str, str]) -> Told | None:
    """What `srun` says; None: this process was not started by it (it may be in an allocation all the same).

    Raises:
        EnvironmentFault: words are missing or contradict each other.
    """
    step = environ.get("SLURM_STEP_ID", "")
    if not environ.get("SLURM_PROCID") or not step or (step.isdigit() and int(step) >= _NO_STEP):
        return None
    remedy = "start all ranks with one srun; to run alone: unset SLURM_PROCID"
    count = _first(environ, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), remedy)
    words = {
        "RANK": Word("SLURM_PROCID", environ["SLURM_PROCID"]),
        "WORLD_SIZE": count,
        "LOCAL_RANK": _first(environ, ("SLURM_LOCALID",), remedy),
        "LOCAL_WORLD_SIZE": _tasks_here(environ, count, remedy),
    }
    words["MASTER_ADDR"] = (
        _given(environ, "MASTER_ADDR", "") if environ.get("MASTER_ADDR") else _rank_0(environ, remedy)
    )
    job = environ.get("SLURM_JOB_ID", "")
    words["MASTER_PORT"] = _port(environ, "srun", job and f"{job}.{step}", "export MASTER_PORT=<a free port>")
    return Told("Slurm", words, remedy)


def _tasks_here(environ: Mapping[str, str], count: Word, remedy: str) -> Word:
    """How many ranks this host has."""
    most = environ.get("SLURM_NTASKS_PER_NODE", "")
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if most and not any(environ.get(name) for name in names):
        return Word("SLURM_NTASKS_PER_NODE", most)
    said = _first(environ, names, remedy)
    tasks = tasks_per_node(said)
    if str(sum(tasks)) != count.value:
        raise EnvironmentFault(
            f"{said.variable}={said.value} contradicts {count.variable}={count.value}: it makes {sum(tasks)}",
            remedy=remedy,
        )
    if len(set(tasks)) == 1:
        return said._replace(value=str(tasks[0]))
    node = _first(environ, ("SLURM_NODEID",), remedy)
    if not (node.value.isdigit() and int(node.value) < len(tasks)):
        raise EnvironmentFault(f"{node.variable}={node.value} contradicts {said.variable}={said.value}", remedy=remedy)
    return said._replace(value=str(tasks[int(node.value)]))


def tasks_per_node(said: Word) -> list[int]:
    """`2(x3),1` means 2, 2, 2, 1.

    Raises:
        EnvironmentFault: it is nothing of the kind.
    """
    tasks: list[int] = []
    for part in said.value.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match is None:
            raise EnvironmentFault(f"{said.variable}={said.value!r} is no list like 2(x3),1", remedy="start with srun")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _rank_0(environ: Mapping[str, str], remedy: str) -> Word:
    said = _first(environ, ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"), remedy)
    return said._replace(value=nodes(said)[0])


def nodes(said: Word) -> list[str]:
    """`a,node[01-02,7]` means a, node01, node02, node7.

    Raises:
        EnvironmentFault: it is nothing of the kind.
    """
    found: list[str] = []
    for part in re.split(r",(?![^\[]*\])", said.value):
        if not re.fullmatch(r"(?:[^\[\],\s]|\[[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*\])+", part):
            raise EnvironmentFault(
                f"{said.variable}={said.value!r} is no list like a,node[01-03,7]",
                remedy="export MASTER_ADDR=<host of rank 0>",
            )
        pieces = re.findall(r"[^\[\]]+|\[[^\]]*\]", part)
        found += ["".join(choice) for choice in product(*(_choices(piece) for piece in pieces))]
    return found


def _choices(piece: str) -> list[str]:
    if not piece.startswith("["):
        return [piece]
    found: list[str] = []
    for item in piece[1:-1].split(","):
        first, _, last = item.partition("-")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return found


# ---------------------------------------------------------------- both


def _first(environ: Mapping[str, str], names: tuple[str, ...], remedy: str) -> Word:
    """The first of these variables that is set."""
    for name in names:
        if environ.get(name):
            return Word(name, environ[name])
    raise EnvironmentFault(f"SLURM_PROCID={environ['SLURM_PROCID']} without {' or '.join(names)}", remedy=remedy)


def _complete(environ: Mapping[str, str], known: tuple[str, ...], needed: tuple[str, ...], remedy: str) -> None:
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        present = [f"{name}={environ[name]}" for name in known if environ.get(name)]
        raise EnvironmentFault(f"{' '.join(present)} without {', '.join(missing)}", remedy=remedy)


def _given(environ: Mapping[str, str], name: str, default: str) -> Word:
    return Word(name, environ.get(name) or default)


def _port(environ: Mapping[str, str], launcher: str, job: str, remedy: str) -> Word:
    """The same for all ranks of a job, another for another job on the same host."""
    if not job and not environ.get("MASTER_PORT"):
        raise EnvironmentFault(f"{launcher} does not say which job this is: no port follows from it", remedy=remedy)
    return _given(environ, "MASTER_PORT", str(_PORTS[zlib.crc32(f"{launcher} {job}".encode()) % len(_PORTS)]))
