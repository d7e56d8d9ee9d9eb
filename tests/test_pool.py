from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shoal.errors import StrategyError
from tests.pool import Pool, WorkerError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


@dataclass
class Note:
    text: str


class Stubborn(Exception):
    """Does not pickle."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def place() -> tuple[str, ...]:
    return tuple(os.environ[name] for name in PLACE)


def port() -> str:
    return os.environ["MASTER_PORT"]


def pid() -> int:
    return os.getpid()


def add(a: int, b: int) -> int:
    return a + b + int(os.environ["RANK"])


def answered(note: Note) -> Note:
    return Note(note.text + os.environ["RANK"])


def variable(name: str) -> str | None:
    return os.environ.get(name)


def set_variable(name: str) -> None:
    os.environ[name] = "left behind"


def all_reduce(numel: int) -> torch.Tensor:
    dist.init_process_group("gloo")
    ours = torch.full((numel,), float(dist.get_rank() + 1))
    dist.all_reduce(ours)
    return ours


def train_a_step() -> list[float]:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return model.weight.flatten().tolist()


def refuse(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        raise StrategyError("zero9 is not a strategy", remedy="zero3")


def warn() -> None:
    warnings.warn("old ways", DeprecationWarning, stacklevel=1)


def fail_stubbornly() -> None:
    raise Stubborn


def leave(status: int) -> None:
    if os.environ["RANK"] == "1":
        sys.exit(status)


def hang(rank: int) -> int:
    if int(os.environ["RANK"]) == rank:
        threading.Event().wait()
    return rank


def raise_while_another_hangs() -> None:
    hang(0)
    raise ValueError("rank 1 first")


def die_with_a_child_left(path: str) -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    Path(path).write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_the_call() -> None:
    threading.Timer(0.3, os._exit, [7]).start()


def say(text: str) -> None:
    print(text)


def ends(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process that is not ours ends in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        threading.Event().wait(0.01)
    return False


def test_ranks_know_their_place(pool: Pool) -> None:
    assert pool.run(place, world=1) == [("0", "1", "0", "1", "127.0.0.1")]
    assert pool.run(place, world=3) == [(str(rank), "3", str(rank), "3", "127.0.0.1") for rank in range(3)]
    assert [p[:4] for p in pool.run(place, world=4, ranks_per_host=2)] == [
        ("0", "4", "0", "2"),
        ("1", "4", "1", "2"),
        ("2", "4", "0", "2"),
        ("3", "4", "1", "2"),
    ]


def test_every_call_has_a_port_of_its_own(pool: Pool) -> None:
    first, second = pool.run(port), pool.run(port)
    assert first[0] == first[1] != second[0]


def test_arguments_and_values_travel(pool: Pool) -> None:
    assert pool.run(add, 1, 2, world=3) == [3, 4, 5]
    assert pool.run("tests.test_pool:add", 1, 2) == [3, 4]
    assert pool.run(answered, Note("rank ")) == [Note("rank 0"), Note("rank 1")]


def test_workers_are_processes_and_serve_again(pool: Pool) -> None:
    first = pool.run(pid, world=4)
    assert len({*first, os.getpid()}) == 5
    assert sorted(pool.run(pid, world=4)) == sorted(first)


def test_a_call_on_waiting_workers_costs_milliseconds(pool: Pool) -> None:
    pool.run(pid, world=2)
    start = time.monotonic()
    pool.run(pid, world=2)
    assert time.monotonic() - start < 0.5


def test_collectives_work_call_after_call(pool: Pool) -> None:
    for world in (2, 4, 3):
        for reduced in pool.run(all_reduce, 5, world=world):
            assert torch.equal(reduced, torch.full((5,), world * (world + 1) / 2))


def test_every_call_starts_from_the_same_generators(pool: Pool) -> None:
    first, second = pool.run(train_a_step)
    assert first == second
    assert pool.run(train_a_step, world=1) == [first]


def test_environment_and_folder_are_this_process_s(pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_TEST", "outer")
    monkeypatch.chdir(tmp_path)
    assert pool.run(variable, "SHOAL_TEST") == ["outer"] * 2
    assert pool.run(variable, "SHOAL_TEST", env={"SHOAL_TEST": "inner"}) == ["inner"] * 2
    assert pool.run(os.getcwd, world=1) == [str(tmp_path)]
    pool.run(set_variable, "SHOAL_OTHER")
    assert pool.run(variable, "SHOAL_OTHER") == [None] * 2


def test_an_exception_keeps_its_class_its_text_and_its_traceback(pool: Pool) -> None:
    with pytest.raises(StrategyError) as caught:
        pool.run(refuse, 1)
    assert str(caught.value) == "shoal[E01] zero9 is not a strategy\n  try:   zero3"
    assert caught.value.remedy == "zero3"
    assert isinstance(caught.value.__cause__, WorkerError)
    assert "rank 1: Traceback" in str(caught.value.__cause__)
    assert "in refuse" in str(caught.value.__cause__)


def test_an_exception_that_does_not_pickle_is_told(pool: Pool) -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 0: Traceback.*in fail_stubbornly"):
        pool.run(fail_stubbornly)


def test_warnings_are_errors_in_workers_too(pool: Pool) -> None:
    with pytest.raises(DeprecationWarning, match="old ways"):
        pool.run(warn)


def test_a_rank_that_leaves_is_named_and_replaced(pool: Pool) -> None:
    with pytest.raises(WorkerError, match="rank 1: left with exit status 3"):
        pool.run(leave, 3)
    assert pool.run(add, 0, 0) == [0, 1]


def test_too_slow_a_rank_is_killed_and_replaced(pool: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"^rank 0: no result in time \(timeout 0\.5 s"):
        pool.run(hang, 0, timeout=0.5)
    assert time.monotonic() - start < 3
    assert pool.run(add, 0, 0) == [0, 1]


def test_the_first_failure_is_raised_without_waiting_for_the_timeout(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.pool.GRACE", 0.2)
    start = time.monotonic()
    with pytest.raises(ValueError, match="rank 1 first") as caught:
        pool.run(raise_while_another_hangs, timeout=50)
    assert time.monotonic() - start < 5
    assert "rank 0: no result in time" in str(caught.value.__cause__)


def test_killing_a_rank(pool: Pool) -> None:
    running = pool.start(hang, 2, world=3)
    running.kill(2)
    results = running.results(timeout=30)
    assert [result.value for result in results] == [2, 2, None]
    assert [result.signal for result in results] == [None, None, signal.SIGKILL]
    assert results[2].error == "killed by SIGKILL"
    assert ends(running.pids[2])
    running.kill(2)  # its result is taken: nobody else may be hit
    assert pool.run(add, 0, 0, world=3) == [0, 1, 2]


def test_a_stopped_rank_outlasts_the_timeout(pool: Pool) -> None:
    running = pool.start(hang, 1)
    running.kill(1, signal.SIGSTOP)
    results = running.results(timeout=0.5)
    assert results[0].error is None
    assert "no result in time" in str(results[1].error)
    assert results[1].signal == signal.SIGKILL
    assert ends(running.pids[1])


def test_results_tell_without_raising(pool: Pool) -> None:
    good, bad = pool.start(refuse, 1).results(timeout=30)
    assert (good.value, good.error, good.exit_code, good.signal) == (None, None, None, None)
    assert isinstance(bad.exception, StrategyError)
    assert "zero9" in str(bad.error)
    good, gone = pool.start(leave, 5).results(timeout=30)
    assert (gone.error, gone.exit_code, gone.signal) == ("left with exit status 5", 5, None)


def test_a_death_is_seen_in_spite_of_children_left(pool: Pool, tmp_path: Path) -> None:
    start = time.monotonic()
    (result,) = pool.start(die_with_a_child_left, str(tmp_path / "child"), world=1).results(timeout=30)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert result.signal == signal.SIGKILL
    assert time.monotonic() - start < 10


def test_a_worker_that_dies_while_idle_is_replaced(pool: Pool) -> None:
    before = pool.run(pid, world=1)
    pool.run(die_after_the_call, world=1)
    assert ends(before[0])
    assert pool.run(pid, world=1) != before


def test_a_call_nobody_waits_for_is_ended(pool: Pool) -> None:
    running = pool.start(hang, 0)
    pool.end_running()
    assert all(ends(one) for one in running.pids)


def test_only_functions_of_modules_can_be_called(pool: Pool) -> None:
    with pytest.raises(ValueError, match="is not at the top of a module: workers could not find it"):
        pool.run(lambda: 1)


def test_output_reaches_the_test_and_close_ends_every_process(capfd: pytest.CaptureFixture[str]) -> None:
    own = Pool()  # started under capfd, so that it writes where capfd reads
    pids = own.run(pid)
    own.run(say, "from a worker", world=1)
    own.start(hang, 0, world=1).results(timeout=0.5)
    stuck = own.start(hang, 0, world=1).pids
    own.close()
    output = capfd.readouterr()
    assert output.out == "from a worker\n"
    assert "in hang" in output.err  # where the slow one stood when it was killed
    assert own.nursery.process.returncode == 0
    assert all(ends(one) for one in [*pids, *stuck])


def test_a_nursery_that_died_takes_its_workers_along_and_is_named() -> None:
    own = Pool()
    pids = own.start(hang, 0).pids
    own.nursery.process.kill()
    assert all(ends(one) for one in pids)
    with pytest.raises(RuntimeError, match="the nursery of workers ended with status -9"):
        own.run(pid, world=3)
    own.close()


def test_workers_end_with_a_process_that_is_killed() -> None:
    program = (
        "import signal, time\n"
        "from tests.pool import Pool\n"
        "running = Pool().start('tests.test_pool:hang', 0)\n"
        "print(*running.pids, flush=True)\n"
        "signal.pause()\n"
    )
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    assert all(ends(one) for one in pids)
