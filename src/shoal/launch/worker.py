"""`python -m shoal.launch.worker script.py args...`: one rank of `shoal run`.

The script sees what it would see under plain `python script.py args...`. How it failed goes to a file that the launcher
reads. The worker dies with its launcher.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType, TracebackType
from typing import cast

from shoal.errors import PeerError, ShoalError
from shoal.launch.failure import Failure
from shoal.settings import FAILURE_FILE, LAUNCHER

_PR_SET_PDEATHSIG = 1
_PATIENCE = 2.0  # seconds for threads and exit handlers of a failed script


def main() -> None:
    """Run the script that the command line names. Never returns after a failure."""
    die_with(int(os.environ[LAUNCHER]))
    _speak_in_lines()
    sys.argv = sys.argv[1:]
    code = _run(sys.argv[0])
    if code:
        hurry = threading.Timer(_PATIENCE, os._exit, (code,))
        hurry.daemon = True
        hurry.start()
        sys.exit(code)


def die_with(launcher: int) -> None:
    """Have the kernel kill this process when its launcher dies, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the line above
        os._exit(1)


def _speak_in_lines() -> None:
    """What a killed rank has printed must be in its log."""
    cast("TextIOWrapper", sys.stdout).reconfigure(line_buffering=True)
    faulthandler.enable()


def _run(script: str) -> int:
    """Run the script as the main module; its exit code."""
    path = Path(script).absolute()
    sys.path.insert(0, str(path.resolve().parent))
    sys.excepthook = _silent  # the launcher prints the traceback
    module = ModuleType("__main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module  # for good: exit handlers and pickled functions look there after the script's end
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    except SystemExit as error:
        return _left(error)
    except BaseException as error:
        code = _failed(error)
        sys.excepthook(type(error), error, _without_us(error.__traceback__))  # the script's, or what shoal made of ours
        return code
    return 0


def _silent(_kind: type[BaseException], _error: BaseException, _trace: TracebackType | None) -> None:
    return


def _left(error: SystemExit) -> int:
    """As Python does: `sys.exit("message")` prints the message and means 1."""
    if error.code is None or isinstance(error.code, int):
        code, message = (error.code or 0) & 0xFF, ""
    else:
        code, message = 1, str(error.code)
        print(message, file=sys.stderr)
    if code:
        _record(error, code, message)
    return code


def _failed(error: BaseException) -> int:
    code = error.exit_code if isinstance(error, ShoalError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    _record(error, code, str(error))
    return code


def _record(error: BaseException, code: int, message: str) -> None:
    """Say in the failure file how this rank failed; ranks other than 0 also in their log."""
    kind = type(error)
    text = "".join(traceback.format_exception(kind, error, _without_us(error.__traceback__)))
    failure = Failure(
        rank=int(os.environ["RANK"]),
        time=time.time(),
        type=kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}",
        message=message,
        code=error.code if isinstance(error, ShoalError) else None,
        traceback=text,
        exit_code=code,
        secondary=isinstance(error, PeerError),
    )
    failure.write(Path(os.environ[FAILURE_FILE]))
    if failure.rank:
        print(text, end="")  # into its log; the launcher would repeat lines of standard error that start with "shoal"


def _without_us(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    main()
