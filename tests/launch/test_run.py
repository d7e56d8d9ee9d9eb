"""`launch` with real processes. The scripts do not import torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.errors import EnvironmentFault, SettingError, StrategyError
from shoal.launch import workers
from shoal.launch.run import launch, run
from shoal.settings import BENCH, INTERNAL, TRACE

HEAD = """\
import json, os, signal, subprocess, sys, time
from pathlib import Path

rank = int(os.environ["RANK"])

def arrive():
    Path(f"{rank}.part").write_text(str(os.getpid()))
    Path(f"{rank}.part").rename(f"{rank}.pid")

def wait_for(other):
    while not Path(f"{other}.pid").exists(): time.sleep(0.01)

def wait_for_end(other):
    wait_for(other)
    while Path(f"/proc/{Path(f'{other}.pid').read_text()}").exists(): time.sleep(0.01)

"""
LINE = len(HEAD.splitlines()) + 1
LAUNCHER = [sys.executable, "-c", "from shoal.cli import main; main()", "run"]
SIGNALS_HELD = (signal.SIGINT, signal.SIGTERM)

Script = Callable[[str], str]
Launched = tuple["subprocess.Popen[str]", list[int]]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # the worker must see to it


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def write(body: str) -> str:
        (tmp_path / "train.py").write_text(HEAD + body)
        return "train.py"

    return write


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LEAVE", 0.2)


def gone(pid: int) -> bool:
    """Whether the process runs no more; somebody may still have to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_rank_is_told_its_place(script: Script, tmp_path: Path) -> None:
    outer = {"TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "9", "SHOAL_FLAGS": '{"seed": 1}', "MINE": "kept"}
    body = "Path(f'{rank}.json').write_text(json.dumps(dict(os.environ)))"
    assert run([script(body)], workers=3, flags={"leaves": 6}, run_dir="here", environ=os.environ | outer) == 0
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, environ in enumerate(told):
        places = [environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")]
        assert places == [str(rank), "3", str(rank), "3", "127.0.0.1"]
        assert environ["MASTER_PORT"] == told[0]["MASTER_PORT"]
        assert json.loads(environ["SHOAL_FLAGS"]) == {"leaves": 6, "run_dir": "here"}
        assert environ["SHOAL_RUN_DIR_ACTIVE"] == str(tmp_path / "here")
        assert {name for name in environ if name.startswith("SHOAL_")} == INTERNAL - {BENCH, TRACE}
        assert environ["MINE"] == "kept"
        assert "TORCHELASTIC_USE_AGENT_STORE" not in environ


def test_only_rank_0_speaks_the_others_warn(script: Script, capfd: pytest.CaptureFixture[str]) -> None:
    body = "print('out', rank); print('shoal: careful\\n  with this\\nerr\\n  more', file=sys.stderr)"
    outcome = launch([script(body)], workers=2)
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    said = ["shoal: careful", "  with this", "err", "  more"]
    assert sorted(err.splitlines()) == sorted(["[rank 1] shoal: careful", "[rank 1]   with this", *said])
    assert outcome.run_dir is not None
    assert sorted((outcome.run_dir / "rank-1.log").read_text().splitlines()) == sorted(["out 1", *said])


def test_quiet_and_stdout_kept_free(script: Script, capfd: pytest.CaptureFixture[str]) -> None:
    body = "print('out', rank); print('shoal: careful', file=sys.stderr); sys.exit(rank)"
    assert launch([script(body)], workers=2, quiet=True, keep_stdout=True).exit_code == 1
    out, err = capfd.readouterr()
    assert (out, sorted(err.splitlines())) == ("", ["out 0", "shoal: careful"])


TRACEBACK = 'rank 1 failed:\nTraceback (most recent call last):\n  File "{}/train.py", line {}, in <module>\n'
FAILURES = {
    "raise ValueError('boom')": (1, TRACEBACK, "ValueError: boom\n"),
    "from shoal.errors import StrategyError as E; raise E('no')": (2, TRACEBACK, "shoal[E01] no\n"),
    "from shoal.errors import ResumeError as E; raise E('no')": (4, TRACEBACK, "shoal[E41] no\n"),
    "from shoal.errors import EnvironmentFault as E; raise E('no')": (5, TRACEBACK, "shoal[E50] no\n"),
    "from shoal.errors import StalledError as E; raise E('no')": (1, TRACEBACK, "shoal[E31] no\n"),
    "raise KeyboardInterrupt": (1, TRACEBACK, "KeyboardInterrupt\n"),
    "sys.exit(3)": (1, "rank 1 left with exit code 3\n", ""),
    "sys.exit(4)": (1, "rank 1 left with exit code 4\n", ""),
    "sys.exit('bye')": (1, "rank 1 left with exit code 1: bye\n", ""),
    "print('last'); os.kill(os.getpid(), signal.SIGKILL)": (1, "rank 1 was killed by SIGKILL\n  cause: ", "    last\n"),
    "os.abort()": (1, "rank 1 was killed by SIGABRT\n  its last words:\n    Fatal Python error: Aborted", ""),
    "print('last'); os._exit(7)": (1, "rank 1 left with exit code 7 and no traceback\n", "    last\n"),
}


def test_the_last_checkpoint_is_named(script: Script, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    body = """
import torch, shoal
with shoal.init("zero3", leaves=2) as job:
    model = torch.nn.Linear(4, 1)
    model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for leaf in range(2 // job.world_size):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    job.save("checkpoints")
    raise ValueError("boom")
"""
    assert run([script(body)], workers=2, run_dir="here") == 1
    assert capfd.readouterr().err.endswith("job.load goes on from checkpoints/step-1\n")
    assert run([script("raise ValueError")], workers=1, run_dir="here") == 1  # and has saved nothing
    assert capfd.readouterr().err.endswith("/here\n")
    with (tmp_path / "here/events.jsonl").open("a") as events:
        events.write('{"time": 1.0, "event": "sa\n')  # its writer was killed
    assert run([script(body.replace("checkpoints", "others"))], workers=2, run_dir="here") == 1
    assert capfd.readouterr().err.endswith("job.load goes on from others/step-1\n")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("failing", FAILURES)
def test_one_rank_fails(failing: str, script: Script, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, head, tail = FAILURES[failing]
    body = f"wait_for_end(2) if rank == 1 else arrive()\nif rank == 1: {failing}\nelif rank == 0: time.sleep(60)"
    outcome = launch([script(body)], workers=3, run_dir="here")
    own, others = capfd.readouterr().err.split("rank 0 was ended by shoal run\n")
    assert own.startswith(head.format(tmp_path, LINE + 1))
    assert own.endswith(tail)
    assert others == f"rank 2 had finished\nlogs: {tmp_path}/here\n"
    assert outcome.exit_code == code
    if "Traceback" in head:
        log = (tmp_path / "here/rank-1.log").read_text()
        assert log == own.removeprefix("rank 1 failed:\n")  # and no launcher's or runpy's lines in either


def test_a_script_that_is_no_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text("x = 1\nx = = 2\n")
    assert run(["train.py"], workers=1) == 1
    err = capfd.readouterr().err
    assert err.startswith(f'rank 0 failed:\n  File "{tmp_path}/train.py", line 2\n    x = = 2\n')
    assert "shoal/launch" not in err


def test_a_failure_that_another_one_caused_is_not_the_first(script: Script, capfd: pytest.CaptureFixture[str]) -> None:
    body = (
        "from shoal.errors import PeerLost\narrive(); wait_for(1 - rank)\nif rank == 0: raise PeerLost('rank 1 left')\n"
        "time.sleep(0.5); raise ValueError(rank)"
    )
    assert run([script(body)], workers=2) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "rank 1 failed:"
    assert lines[-3:-1] == ["ValueError: 1", "rank 0: shoal.errors.PeerLost: shoal[E30] rank 1 left"]


def test_others_have_time_to_leave_by_themselves(script: Script, tmp_path: Path) -> None:
    body = "arrive(); wait_for(1 - rank)\nif rank: sys.exit(1)\ntime.sleep(0.7); Path('left').touch()"
    outcome = launch([script(body)], workers=2, quiet=True)
    assert [end.code for end in outcome.ranks] == [0, 1]
    assert (tmp_path / "left").exists()


def test_who_told_its_story_and_then_takes_too_long_to_leave_is_heard(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "import atexit; atexit.register(time.sleep, 60)\narrive(); wait_for(1 - rank)\n"
    outcome = launch([script(body + "time.sleep(0.5 * rank); raise ValueError(f'of {rank}')")], workers=2)
    assert [(end.code, end.by_launcher) for end in outcome.ranks] == [(1, False), (1, False)]
    assert outcome.exit_code == 1
    assert "\nrank 1: ValueError: of 1\n" in capfd.readouterr().err


def test_a_stubborn_rank_and_its_children_are_killed(script: Script, tmp_path: Path) -> None:
    body = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path("child").write_text(str(child.pid))
    time.sleep(60)
while not Path("child").exists(): time.sleep(0.01)
sys.exit(1)
"""
    begin = time.monotonic()
    outcome = launch([script(body)], workers=2, quiet=True)
    assert workers.LEAVE + workers.TERMINATE < time.monotonic() - begin < workers.LEAVE + workers.TERMINATE + 10
    assert (outcome.ranks[0].code, outcome.ranks[0].by_launcher) == (-signal.SIGKILL, True)
    assert gone(int((tmp_path / "child").read_text()))


def test_what_a_finished_rank_has_started_ends_with_the_job(script: Script, tmp_path: Path) -> None:
    body = "child = subprocess.Popen(['sleep', '60']); Path('child').write_text(str(child.pid)); os._exit(0)"
    assert run([script(body)], workers=1) == 0
    wait_until(lambda: gone(int((tmp_path / "child").read_text())), 5)


def test_a_failed_rank_leaves_though_its_threads_go_on(script: Script) -> None:
    body = "import threading; threading.Thread(target=time.sleep, args=(60,)).start()\nraise ValueError"
    begin = time.monotonic()
    outcome = launch([script(body)], workers=1, quiet=True)
    assert time.monotonic() - begin < 20
    assert (outcome.ranks[0].code, outcome.ranks[0].by_launcher) == (1, False)
    assert outcome.ranks[0].failure is not None


WAITING = """
arrive()
try:
    time.sleep(60)
finally:
    Path(f"{rank}.cleaned").touch()
"""


@pytest.fixture
def launcher(script: Script, tmp_path: Path) -> Iterator[Launched]:
    """A running `shoal run --workers 2` and the pids of its workers."""
    command = [*LAUNCHER, "--workers", "2", script(WAITING)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: all((tmp_path / f"{rank}.pid").exists() for rank in range(2)))
            yield process, [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("signum", "text"),
    [(signal.SIGINT, "shoal run: ended by SIGINT\n"), (signal.SIGTERM, "shoal run: ended by SIGTERM\n")],
)
def test_a_signal_to_the_launcher_ends_all(signum: int, text: str, launcher: Launched, tmp_path: Path) -> None:
    process, pids = launcher
    process.send_signal(signum)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (128 + signum, text)
    assert all(map(gone, pids))
    assert [(tmp_path / f"{r}.cleaned").exists() for r in range(2)] == [signum == signal.SIGINT] * 2


def test_workers_die_with_their_launcher(launcher: Launched) -> None:
    process, pids = launcher
    process.kill()
    process.communicate(timeout=10)
    wait_until(lambda: all(map(gone, pids)), 5)


def test_a_worker_whose_launcher_is_gone_does_not_start(script: Script, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal.launch.worker", script("Path('ran').touch()")]
    environ = os.environ | {"SHOAL_LAUNCHER_PID": "1", "RANK": "0"}
    assert subprocess.run(command, env=environ, timeout=20).returncode == 1
    assert not (tmp_path / "ran").exists()


def test_signal_handlers_come_back_and_threads_can_launch(script: Script) -> None:
    handlers = [signal.getsignal(signum) for signum in SIGNALS_HELD]
    codes: list[int] = []
    argv = [script("")]
    codes.append(run(argv, workers=1))
    thread = threading.Thread(target=lambda: codes.append(run(argv, workers=1)))
    thread.start()
    thread.join(20)
    assert codes == [0, 0]
    assert [signal.getsignal(signum) for signum in SIGNALS_HELD] == handlers


def test_what_a_run_leaves_behind(script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = launch([script("")], workers=2)
    assert outcome.run_dir is not None
    assert outcome.run_dir.parent == tmp_path / "runs"
    assert {p.name for p in outcome.run_dir.iterdir()} == {"events.jsonl", "rank-1.log"}
    events = [json.loads(line) for line in (outcome.run_dir / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e.get("exit_code")) for e in events] == [("launched", None), ("ended", 0)]
    assert str(outcome.run_dir) not in capfd.readouterr().err


def test_a_run_without_a_directory(script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "assert os.environ['SHOAL_RUN_DIR_ACTIVE'] == 'none'; sys.exit('bye') if rank else None"
    outcome = launch([script(body)], workers=2, run_dir="none")
    assert outcome.run_dir is None
    assert capfd.readouterr().err == "rank 1 left with exit code 1: bye\nrank 0 had finished\n"
    assert [p.name for p in tmp_path.iterdir()] == ["train.py"]


def test_a_directory_of_an_earlier_failed_run(script: Script, tmp_path: Path) -> None:
    assert run([script("raise ValueError")], workers=1, run_dir="here", quiet=True) == 1
    assert launch([script("os._exit(1)")], workers=1, run_dir="here", quiet=True).ranks[0].failure is None


@pytest.mark.parametrize(
    ("argv", "more", "kind", "text"),
    [
        (["gone.py"], {}, SettingError, "there is no script 'gone.py' in {}\n  try:   the path of a Python file"),
        (["."], {}, SettingError, "there is no script '.' in {}\n  try:   the path of a Python file"),
        ([], {}, SettingError, "no script to run\n  try:   shoal run --workers 2 train.py"),
        (["train.py"], {"workers": 0}, SettingError, "workers=0: a job has at least one worker\n  try:   --workers 1"),
        (["train.py"], {"flags": {"sed": 1}}, SettingError, "unknown setting 'sed' (flag --set sed)\n"),
        (["train.py"], {"flags": {"strategy": "zero9"}}, StrategyError, "there is no strategy 'zero9'\n"),
    ],
)  # fmt: skip
def test_mistakes_are_seen_before_anything_starts(
    argv: list[str], more: dict[str, object], kind: type[SettingError], text: str, script: Script, tmp_path: Path
) -> None:
    script("Path('ran').touch()")
    with pytest.raises(kind) as caught:
        launch(argv, **{"workers": 1} | more)
    assert str(caught.value).startswith(f"shoal[{kind.code}] " + text.format(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["train.py"]


def test_a_worker_that_cannot_start_ends_those_that_did(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = workers.Workers.start
    pids: list[int] = []

    def failing(self: workers.Workers, *args: object, **rest: object) -> None:
        if self._processes:
            pids.append(self._processes[0].pid)
            monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
            args = ([sys.executable], *args[1:])
        start(self, *args, **rest)

    monkeypatch.setattr(workers.Workers, "start", failing)
    with pytest.raises(EnvironmentFault) as caught:
        launch([script("time.sleep(60)")], workers=2)
    reason = f"worker 1 could not be started: No such file or directory ({tmp_path}/nothing)"
    assert str(caught.value) == f"shoal[E50] {reason}\n  try:   fewer --workers, or another --run-dir"
    assert all(map(gone, pids))
    assert len(pids) == 1


def test_rank_0_has_the_terminal_and_the_cursor_comes_back(script: Script) -> None:
    ours, theirs = os.openpty()
    command = [*LAUNCHER, "--workers", "1", script("print(sys.stdout.isatty()); sys.exit(1)")]
    try:
        assert subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, timeout=20).returncode == 1
        assert os.read(ours, 1000) == b"True\r\n\x1b[?25h"
    finally:
        os.close(ours)
        os.close(theirs)


def test_the_launcher_does_not_import_torch(script: Script) -> None:
    program = f"""
import sys
from shoal.launch.run import run
assert run(["{script("")}"], workers=1) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)
