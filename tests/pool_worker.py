"""The other side of `tests.pool`: a nursery, and the workers that it forks.

The nursery imports what tests need, torch above all, and then only forks: 5 ms where a fresh interpreter takes seconds.
It never runs a tensor operation, because OpenMP's threads do not survive a fork. Its orders come over one connection:
None forks a worker around the socket that follows and is answered with its pid; a pid waits for that worker's end and
is answered with its exit status. Its end of file ends the nursery, and the kernel ends the workers with it.

Workers share what was settled before the fork, the seed of string hashes above all: a mistake that only shows when
ranks iterate over a set in different orders needs real programs to be seen.

Run as: python -Pu pool_worker.py FILE_DESCRIPTOR SYS_PATH_AS_JSON
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pickle
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import numpy
import torch
import torch.distributed as dist

# torch._dynamo: torch's optimizers import it at their first use, which takes a second.
PRELOAD = ("torch._dynamo", "pydantic", "pytest", "rich", "safetensors.torch", "typer")


def main(descriptor: str, path: str) -> None:
    sys.path[:] = json.loads(path)
    warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # workers share these pages as long as nobody writes to them
    link = nursery(Connection(int(descriptor)))
    if link is not None:
        leave(work(link))


def nursery(orders: Connection) -> Connection | None:
    """Fork workers until the orders end. Returns a worker's link in a worker, None in the nursery itself."""
    while True:
        try:
            order = orders.recv()
        except EOFError:
            return None
        if order is not None:
            orders.send(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]))
            continue
        handle = recv_handle(orders)
        pid = os.fork()
        if pid == 0:
            orders.close()
            return become_worker(handle)
        os.close(handle)
        orders.send(pid)


def become_worker(handle: int) -> Connection:
    link = Connection(handle)
    # Python never closes this one: the link's end of file is the end of the process, not of the interpreter in it.
    held = [os.dup(handle)]

    def let_go() -> None:  # a data loader's worker must not keep the link open
        link.close()
        while held:
            os.close(held.pop())

    os.register_at_fork(after_in_child=let_go)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the nursery, even when stuck
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    return link


def work(link: Connection) -> int:
    """Answer calls until the link ends, or one of them by `sys.exit`. Returns the exit code."""
    while True:
        try:
            request = link.recv_bytes()
            link.send_bytes(answer(*pickle.loads(request)))
        except EOFError:
            return 0
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)


def leave(code: int) -> None:
    """As a program ends, but for the second that torch takes to tidy up what was copied from the nursery."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer(target: str, arguments: bytes, environment: dict[str, str], folder: str) -> bytes:
    """Call `module:function`. Returns, pickled: (True, value) or (False, text of the traceback, pickled exception)."""
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        module, _, name = target.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return pickle.dumps((True, call(function, pickle.loads(arguments))))
    except SystemExit:
        raise
    except BaseException as error:
        return pickle.dumps((False, traceback.format_exc(), pickled_exception(error)))


def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call from the same state every time, with warnings as strict as pytest's own."""
    importlib.import_module("shoal.engine.units").SIZE = 0  # as in pytest's own process: see conftest.py
    torch.set_num_threads(1)
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
        value = function(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
    return value


def pickled_exception(error: BaseException) -> bytes | None:
    """Class, arguments and attributes: pickle's own way would call `__init__` again, with other arguments."""
    try:
        return pickle.dumps((type(error), error.args, vars(error)))
    except Exception:
        return None


if __name__ == "__main__":
    main(*sys.argv[1:])
