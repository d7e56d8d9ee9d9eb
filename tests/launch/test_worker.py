"""A script sees under `shoal run` what it sees under plain Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.launch.run import launch

SCRIPT = """
import atexit, json, pickle, sys
import beside

class Local:
    pass

def annotated(x: 1 + 1): pass

seen = {
    "argv": sys.argv,
    "path": sys.path[0],
    "names": [__name__, __file__, __spec__, __doc__, __package__],
    "main": sys.modules["__main__"].Local is Local,
    "pickle": type(pickle.loads(pickle.dumps(Local()))) is Local,
    "future": annotated.__annotations__["x"],
    "beside": beside.__file__,
}

@atexit.register
def write():
    seen["late"] = sys.modules["__main__"].Local is Local
    open(sys.argv[1], "w").write(json.dumps(seen))
"""


@pytest.mark.parametrize("name", ["train.py", "deep/train.py", "link.py"])
def test_same_as_plain_python(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "deep"):
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(SCRIPT)
        (folder / "beside.py").touch()
        (folder / "signal.py").write_text("raise RuntimeError('the wrong module')")  # must not reach the worker's start
    (tmp_path / "link.py").symlink_to("deep/train.py")
    subprocess.run([sys.executable, name, "plain", "--workers", "--", "-x"], check=True, timeout=20)
    assert launch([name, "shoal", "--workers", "--", "-x"], workers=1, run_dir="none").exit_code == 0
    plain, ours = (json.loads((tmp_path / kind).read_text()) for kind in ("plain", "shoal"))
    assert plain["argv"].pop(1) == "plain"
    assert ours["argv"].pop(1) == "shoal"
    assert ours == plain


@pytest.mark.parametrize("leaving", ["sys.exit()", "sys.exit(0)", "sys.exit(256)", "sys.exit(-1)", "sys.exit('bye')"])
def test_same_exit_code_as_plain_python(leaving: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(f"import sys\n{leaving}\n")
    plain = subprocess.run([sys.executable, "train.py"], timeout=20).returncode
    assert launch(["train.py"], workers=1, run_dir="none", quiet=True).ranks[0].code == plain
