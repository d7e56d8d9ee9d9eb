"""Finding one's place from a launcher's variables."""

from __future__ import annotations

import pytest

from shoal.errors import EnvironmentFault
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
