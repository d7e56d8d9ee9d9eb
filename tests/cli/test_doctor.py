"""`shoal doctor`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli import app
from tests.cli.test_main import MAIN
from tests.doctor.test_across import free_port


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SHOAL_", "GLOO_"))]:
        monkeypatch.delenv(name)


def start(*words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MAIN, "doctor", *words], env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=50)
    return process.returncode, out, err


def test_this_host() -> None:
    code, out, err = result(start(SHOAL_SEED="7"))
    assert (code, err) == (0, "")
    names = [line.split("  ")[0] for line in out.splitlines()]
    for name in ("host", "shoal", "python", "torch", "processor", "cores", "memory", "/dev/shm", "limits", "clock"):
        assert name in names
    for line in (
        "interface lo ",
        "gloo  ",
        "shared memory  ",
        "nccl ",
        "mpi ",
        "fabric  ",
        "meeting port  ",
        "  SHOAL_SEED=7",
    ):
        assert f"\n{line}" in out


def test_json_and_an_unusable_environment() -> None:
    code, out, err = result(start("--json", RANK="0"))
    report = json.loads(out)
    assert (code, err, report["usable"]) == (5, "", False)
    assert report["findings"][0] == {
        "what": "RANK=0 without WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
        "remedy": "shoal run --workers N script.py, or torchrun; to run alone: unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE",
        "fatal": True,
    }
    gloo = report["carriers"][0]
    assert (gloo["name"], gloo["usable"]) == ("gloo", True)
    assert ["RANK", "0"] in report["environment"]


def test_a_torch_that_does_not_load(tmp_path: Path) -> None:
    """The rest is printed all the same."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, out, err = result(start(PYTHONPATH=path))
    assert (code, err) == (5, "")
    assert "\nunusable: torch cannot be imported: libtorch_cpu.so: cannot open shared object file\n" in out
    assert "\nmeeting port  " in out


def both(*words: str) -> list[tuple[int, str, str]]:
    names = ["127.0.0.1", "127.0.0.2"]
    options = ["--hosts", ",".join(names), "--port", str(free_port()), *words]
    started = [start(*options, "--as", name) for name in names]
    return [result(process) for process in started]


def test_two_hosts() -> None:
    (code, first, err), second = both()
    assert (code, err) == (0, "")
    lines = first.splitlines()
    assert lines[0].startswith("rate and delay of one TCP stream, from the host of a row to that of a column; port ")
    assert lines[1].split() == ["127.0.0.1", "127.0.0.2"]
    assert lines[2].startswith("127.0.0.1 ")
    assert lines[2].count(" Mbit/s, ") == lines[3].count(" Mbit/s, ") == 1
    assert lines[4].startswith("clock of 127.0.0.2: ")
    assert [line.split(": ")[0] for line in lines[5:7]] == ["127.0.0.1", "127.0.0.2"]
    assert lines[-1] == "nothing is wrong"
    assert second == (0, "127.0.0.2: the table is printed on 127.0.0.1\nnothing is wrong\n", "")


def test_two_hosts_as_json() -> None:
    found: Sequence[Any] = [json.loads(out) for _, out, _ in both("--json")]
    for own, one in zip(("127.0.0.1", "127.0.0.2"), found, strict=True):
        assert (one["own"], one["usable"], one["findings"]) == (own, True, [])
        assert [report["name"] for report in one["reports"]] == ["127.0.0.1", "127.0.0.2"]
        assert [report["ways"][0]["meeting"] for report in one["reports"]] == ["open", "open"]


def test_other_versions_are_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import platform; platform.python_version = lambda: '3.99.1'")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    options = ["--hosts", "127.0.0.1,127.0.0.2", "--port", str(free_port())]
    first, second = start(*options, "--as", "127.0.0.1"), start(*options, "--as", "127.0.0.2", PYTHONPATH=path)
    for code, out, _ in (result(first), result(second)):
        assert code == 5
        assert "\nunusable: python is 3." in f"\n{out}"
        assert " on 127.0.0.1, 3.99.1 on 127.0.0.2\n  try: the same major and minor version on all hosts" in out


def test_a_host_that_does_not_come() -> None:
    port = str(free_port())
    code, out, err = result(
        start("--hosts", "127.0.0.1,127.0.0.2", "--as", "127.0.0.1", "--port", port, "--timeout", "2")
    )
    assert (code, err) == (5, "")
    assert f"unusable: no sign of 127.0.0.2 on 127.0.0.1: port {port} there: refused" in out


def test_across_does_not_import_torch() -> None:
    program = (
        "import sys; import shoal.doctor.across, shoal.doctor.text, shoal.cli.doctor; print('torch' in sys.modules)"
    )
    done = subprocess.run([MAIN[0], "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_mistakes() -> None:
    said = CliRunner().invoke(app, ["doctor", "--hosts", "127.0.0.1,127.0.0.2"])
    assert (said.exit_code, said.stdout) == (2, "")
    assert said.stderr.startswith("shoal[E02] 127.0.0.1 and 127.0.0.2 are both this host\n  try:   --as 127.0.0.1")
    told = CliRunner().invoke(app, ["doctor", "--json", "--hosts", "127.0.0.1"])
    assert json.loads(told.stdout)["code"] == "E02"
    assert CliRunner().invoke(app, ["doctor", "--timeout", "1"]).exit_code == 2
