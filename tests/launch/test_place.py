"""Finding one's place from a launcher's variables."""

from __future__ import annotations

import pytest

from shoal.errors import EnvironmentFault
from shoal.launch.clusters import Word, nodes, tasks_per_node
from shoal.launch.place import Place, find_place

ENVIRON = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "ten",
    "MASTER_PORT": "29500",
}
PLACE = {"rank": 5, "world": 8, "local_rank": 1, "local_world": 4, "host": "ten", "port": 29500}


@pytest.mark.parametrize(
    ("more", "agent_store", "launched_by"),
    [
        ({}, False, "environment"),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}, True, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "False"}, False, "torchrun"),
        ({"SHOAL_LAUNCHER_PID": "1"}, False, "shoal run"),
    ],
)
def test_place_of_a_launched_rank(more: dict[str, str], agent_store: bool, launched_by: str) -> None:
    assert find_place(ENVIRON | more) == Place(**PLACE, agent_store=agent_store, launched_by=launched_by)


@pytest.mark.parametrize("environ", [{}, {"MASTER_ADDR": "ten", "MASTER_PORT": "1"}, {"HOME": "/"}])
def test_started_alone(environ: dict[str, str]) -> None:
    assert find_place(environ) is None


REMEDY = (
    "\n  try:   shoal run --workers N script.py, or torchrun; "
    "to run alone: unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE"
)


@pytest.mark.parametrize("name", ENVIRON)
def test_one_variable_is_missing(name: str) -> None:
    rest = {k: v for k, v in ENVIRON.items() if k != name}
    shown = " ".join(f"{k}={v}" for k, v in rest.items())
    for environ in (rest, rest | {name: ""}):
        with pytest.raises(EnvironmentFault) as caught:
            find_place(environ)
        assert str(caught.value) == f"shoal[E50] {shown} without {name}" + REMEDY


def test_an_empty_rank_alone() -> None:
    with pytest.raises(EnvironmentFault, match=r"shoal\[E50\] RANK= without RANK, WORLD_SIZE, LOCAL_RANK, "):
        find_place({"RANK": ""})


def test_a_rank_that_is_written_into_the_script() -> None:
    """All ranks are on this host, and both numbers must be one."""
    told = ENVIRON | {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(
        EnvironmentFault, match=r"RANK=0 contradicts LOCAL_RANK=2[\s\S]*is a rank written into the scri"
    ):
        find_place(told)
    assert find_place(told | {"RANK": "2"})


def test_mpirun_numbers_the_ranks_of_a_host_as_it_likes() -> None:
    place = find_place(MPIRUN | {"OMPI_COMM_WORLD_LOCAL_RANK": "3"})
    assert place is not None
    assert (place.rank, place.local_rank) == (1, 3)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"RANK": "8"}, "RANK=8 contradicts WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 contradicts LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 contradicts WORLD_SIZE=8"),
        ({"RANK": "one"}, "RANK='one' is not a whole number from 0 to 2147483647"),
        ({"RANK": "-1"}, "RANK='-1' is not a whole number from 0 to 2147483647"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number from 1 to 2147483647"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is not a whole number from 1 to 65535"),
    ],
)
def test_variables_that_cannot_be(wrong: dict[str, str], text: str) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        find_place(ENVIRON | wrong)
    assert str(caught.value) == f"shoal[E50] {text}" + REMEDY
    assert caught.value.exit_code == 5


# ---------------------------------------------------------------- Slurm

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "node[01-03,7]",
}
SLURM_PLACE = {"rank": 5, "world": 7, "local_rank": 1, "local_world": 2, "agent_store": False}
PORT = 21258


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {k: v for k, v in environ.items() if k not in names}


@pytest.mark.parametrize(
    ("environ", "change"),
    [
        (SRUN, {}),
        (SRUN | {"MASTER_ADDR": "ten", "MASTER_PORT": "29500"}, {"host": "ten", "port": 29500}),
        (SRUN | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"},
         {"rank": 6, "local_rank": 0, "local_world": 1}),
        # `srun --preserve-env`: what has no STEP in its name speaks of the whole allocation
        (SRUN | {"SLURM_NTASKS": "64", "SLURM_TASKS_PER_NODE": "16(x4)", "SLURM_JOB_NODELIST": "a,b,c,d"}, {}),
        (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
         | {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODELIST": "b12,a1"},
         {"world": 8, "local_world": 4, "host": "b12"}),
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID") | {"SLURM_NTASKS_PER_NODE": "4"}, {"local_world": 4}),
        (SRUN | {"RANK": "5", "WORLD_SIZE": "7"}, {}),  # the user's own exports, incomplete and right
        (SRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}, {"attempt": 2}),
    ],
)  # fmt: skip
def test_place_of_a_task_of_slurm(environ: dict[str, str], change: dict[str, object]) -> None:
    expected = SLURM_PLACE | {"host": "node01", "port": PORT, "launched_by": "Slurm"} | change
    assert find_place(environ) == Place(**expected)


def test_torchrun_wins_over_slurm_and_mpirun() -> None:
    """srun has started one torchrun per host, which has started this rank."""
    found = find_place(MPIRUN | SRUN | ENVIRON | {"TORCHELASTIC_RUN_ID": "x"})
    assert found == Place(**PLACE, agent_store=False, launched_by="torchrun")


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8"},  # salloc
        without(SRUN, "SLURM_STEP_ID"),  # sbatch
        SRUN | {"SLURM_STEP_ID": "4294967290"},  # the shell that salloc opens on the first host
        without(SRUN, "SLURM_PROCID"),
    ],
)
def test_a_script_in_an_allocation_is_alone(environ: dict[str, str]) -> None:
    assert find_place(environ) is None


def test_steps_and_jobs_have_ports_of_their_own() -> None:
    ports = [find_place(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
             for job in (4711, 4712) for step in (0, 1)]  # fmt: skip
    assert len(set(ports)) == 4
    assert all(10000 <= port < 30000 for port in ports)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node7", ["node7"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("a,b[8-10],c.d", ["a", "b8", "b9", "b10", "c.d"]),
        ("r[1-2]n[1,3]-ib", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert nodes(Word("SLURM_NODELIST", text)) == names


@pytest.mark.parametrize(("text", "counts"), [("3", [3]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x2)", [1, 2, 2])])
def test_lists_of_tasks(text: str, counts: list[int]) -> None:
    assert tasks_per_node(Word("SLURM_TASKS_PER_NODE", text)) == counts


SLURM_HELP = "start all ranks with one srun; to run alone: unset SLURM_PROCID"


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        (without(SRUN, "SLURM_STEP_NUM_TASKS"), "SLURM_PROCID=5 without SLURM_STEP_NUM_TASKS or SLURM_NTASKS"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_PROCID=5 without SLURM_LOCALID"),
        (without(SRUN, "SLURM_NODEID"), "SLURM_PROCID=5 without SLURM_NODEID"),
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE"),
         "SLURM_PROCID=5 without SLURM_STEP_TASKS_PER_NODE or SLURM_TASKS_PER_NODE"),
        (without(SRUN, "SLURM_STEP_NODELIST"),
         "SLURM_PROCID=5 without SLURM_STEP_NODELIST or SLURM_JOB_NODELIST or SLURM_NODELIST"),
        (SRUN | {"SLURM_PROCID": "7"}, "SLURM_PROCID=7 contradicts SLURM_STEP_NUM_TASKS=7"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID='x' is not a whole number from 0 to 2147483647"),
        (SRUN | {"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2 contradicts SLURM_STEP_TASKS_PER_NODE=2"),
        (SRUN | {"SLURM_NODEID": "4"}, "SLURM_NODEID=4 contradicts SLURM_STEP_TASKS_PER_NODE=2(x3),1"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "8"},
         "SLURM_STEP_TASKS_PER_NODE=2(x3),1 contradicts SLURM_STEP_NUM_TASKS=8: it makes 7"),
    ],
)  # fmt: skip
def test_words_of_slurm_that_cannot_be(environ: dict[str, str], text: str) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        find_place(environ)
    assert str(caught.value) == f"shoal[E50] {text}\n  try:   {SLURM_HELP}"


@pytest.mark.parametrize(
    ("change", "text", "remedy"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE='two' is no list like 2(x3),1", "start with srun"),
        ({"SLURM_STEP_NODELIST": "n[1-"}, "SLURM_STEP_NODELIST='n[1-' is no list like a,node[01-03,7]",
         "export MASTER_ADDR=<host of rank 0>"),
        ({"SLURM_JOB_ID": ""}, "srun does not say which job this is: no port follows from it",
         "export MASTER_PORT=<a free port>"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 contradicts SLURM_STEP_NUM_TASKS=7",
         "unset WORLD_SIZE; or set all of RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"),
    ],
)  # fmt: skip
def test_words_of_slurm_that_say_nothing(change: dict[str, str], text: str, remedy: str) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        find_place(SRUN | change)
    assert str(caught.value) == f"shoal[E50] {text}\n  try:   {remedy}"


# ---------------------------------------------------------------- Open MPI

MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-node7-10314@1",
}
MPI_PLACE = {"rank": 1, "world": 4, "local_rank": 1, "local_world": 4, "agent_store": False, "launched_by": "Open MPI"}
TWO_HOSTS = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "change"),
    [
        (MPIRUN, {}),
        (MPIRUN | TWO_HOSTS | {"MASTER_ADDR": "ten"}, {"local_world": 2, "host": "ten"}),
        (MPIRUN | {"MASTER_PORT": "29500"}, {"port": 29500}),
        (MPIRUN | SRUN, {}),  # mpirun has reached this host through srun
        (without(MPIRUN, "PMIX_RANK", "PMIX_NAMESPACE") | {"OMPI_MCA_ess_base_jobid": "123"}, {"port": 25633}),  # 4.x
    ],
)
def test_place_of_a_rank_of_mpirun(environ: dict[str, str], change: dict[str, object]) -> None:
    assert find_place(environ) == Place(**(MPI_PLACE | {"host": "127.0.0.1", "port": 15731} | change))


def test_two_mpiruns_on_one_host_do_not_meet() -> None:
    assert find_place(MPIRUN).port != find_place(MPIRUN | {"PMIX_NAMESPACE": "prterun-node7-10315@1"}).port


MPI_HELP = (
    "start all ranks with one mpirun; to run alone: unset OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE "
    "OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE PMIX_RANK"
)


@pytest.mark.parametrize(
    ("environ", "text", "remedy"),
    [
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1 without OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, "
         "OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_SIZE", MPI_HELP),
        (MPIRUN | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK=4 contradicts OMPI_COMM_WORLD_SIZE=4", MPI_HELP),
        (MPIRUN | TWO_HOSTS, "mpirun has started 2 of 4 ranks on this host and does not say where rank 0 is",
         "mpirun -x MASTER_ADDR=<host of rank 0> ..."),
        (without(MPIRUN, "PMIX_NAMESPACE"), "mpirun does not say which job this is: no port follows from it",
         "mpirun -x MASTER_PORT=<a free port> ..."),
        (MPIRUN | {"RANK": "0"}, "RANK=0 contradicts OMPI_COMM_WORLD_RANK=1",
         "unset RANK; or set all of RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"),
    ],
)  # fmt: skip
def test_words_of_mpirun_that_cannot_be(environ: dict[str, str], text: str, remedy: str) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        find_place(environ)
    assert str(caught.value) == f"shoal[E50] {text}\n  try:   {remedy}"
