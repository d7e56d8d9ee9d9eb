"""Workers for a function, from Python or a notebook."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar, cast

from shoal.comm import threads
from shoal.dropin.world import known
from shoal.errors import PeerError, PeerLost, SettingError
from shoal.launch.place import places_here
from shoal.launch.worker import die_with

T = TypeVar("T")
GRACE = 10.0
"""Seconds that the others have once one worker has failed."""
THREADS = "threads:"


def spawn(fn: Callable[..., T], *args: object, workers: int | str = 2) -> list[T]:
    """Run `fn(*args)` on every worker of this machine. Inside, `shoal.init()` and the drop-ins find their places.

    A script calls it under `if __name__ == "__main__":`. In a notebook, where `fn` is defined in a cell, workers are
    forks of the notebook's process: what it has imported and computed is there, on one thread each; devices must not
    be in use yet.

    Args:
        fn: a function at the top of a module, or of a notebook.
        args: for every worker alike; they and the results are pickled.
        workers: a number of processes; or "threads:4", ranks as threads of this process that take turns, so that a
            debugger stops in all of them.

    Returns:
        What every worker returned, in the order of ranks.

    Raises:
        SettingError: `workers` that is neither, or a function that processes cannot find.
        Exception: the first worker's own error, with its traceback as its cause.
    """
    if isinstance(workers, str) and workers.startswith(THREADS) and workers[len(THREADS) :].isdigit():
        count, thread = int(workers[len(THREADS) :]), True
    else:
        count, thread = (int(workers), False) if isinstance(workers, int) or workers.isdigit() else (0, False)
    if count < 1:
        raise SettingError(f"workers={workers!r}", remedy='workers=2 for processes, or workers="threads:2"')
    if thread:
        return threads.run(count, lambda _rank: _and_leave(fn, args))
    return _processes(fn, args, count)


def _and_leave(fn: Callable[..., T], args: tuple[object, ...]) -> T:
    """A thread has no end of the interpreter of its own at which the drop-ins would leave."""
    try:
        return fn(*args)
    finally:
        here = known()
        if here is not None:
            here.leave()


def _in_notebook(fn: Callable[..., object]) -> bool:
    """Is it defined where a fresh interpreter could not find it?"""
    main = sys.modules.get("__main__")
    return fn.__module__ == "__main__" and getattr(main, "__file__", None) is None


def _processes(fn: Callable[..., T], args: tuple[object, ...], count: int) -> list[T]:
    notebook = _in_notebook(fn)
    try:
        payload = fn if notebook else pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SettingError(
            f"{getattr(fn, '__qualname__', fn)} and its arguments cannot be sent to other processes: {error}",
            remedy=f'a function at the top of its module; or workers="{THREADS}{count}"',
        ) from None
    context = multiprocessing.get_context("fork" if notebook else "spawn")
    threads_each = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    links: dict[Connection, int] = {}
    workers: list[BaseProcess] = []
    try:
        for rank, place in enumerate(places_here(count)):
            ours, theirs = context.Pipe(duplex=False)
            told = place | threads_each
            process = context.Process(target=_work, args=(payload, args, told, theirs, os.getpid()))  # pyright: ignore
            process.start()
            theirs.close()
            links[ours] = rank
            workers.append(cast(BaseProcess, process))
        return cast(list[T], _results(links, workers))
    finally:
        for process in workers:
            if process.is_alive():
                process.kill()
            process.join()


def _work(payload: object, args: tuple[object, ...], place: dict[str, str], link: Connection, parent: int) -> None:
    """A worker's whole life."""
    import torch

    die_with(parent)
    os.environ.update(place)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        if isinstance(payload, bytes):
            fn, args = cast("tuple[Callable[..., object], tuple[object, ...]]", pickle.loads(payload))
        else:
            fn = cast("Callable[..., object]", payload)
        link.send_bytes(pickle.dumps((True, _and_leave(fn, args))))
    except BaseException as error:
        peer = isinstance(error, PeerError)
        link.send_bytes(pickle.dumps((False, (_pickled(error), traceback.format_exc(), peer))))
        raise SystemExit(1) from None


def _pickled(error: BaseException) -> tuple[type[BaseException], tuple[object, ...], dict[str, object]] | None:
    """Class, arguments and attributes: pickle's own way would call `__init__` again, with other arguments."""
    try:
        parts = (type(error), error.args, vars(error))
        pickle.dumps(parts)
        return parts
    except Exception:
        return None


def _results(links: dict[Connection, int], workers: list[BaseProcess]) -> list[object]:
    found: dict[int, object] = {}
    failures: list[tuple[bool, int, BaseException]] = []
    open_ = dict(links)
    while open_:
        ready = wait(list(open_), GRACE if failures else None)
        if not ready:
            break
        for link in cast("list[Connection]", ready):
            rank = open_.pop(link)
            try:
                fine, value = pickle.loads(link.recv_bytes())
            except EOFError:
                workers[rank].join()
                lost = PeerLost(
                    f"worker {rank} ended with exit code {workers[rank].exitcode} and without a word",
                    remedy=f'what it printed last; workers="{THREADS}{len(workers)}" with a debugger',
                )
                failures.append((False, rank, lost))
                continue
            if fine:
                found[rank] = value
            else:
                failures.append((value[2], rank, _error(rank, *value[:2])))
    if failures:  # a lost peer counts only if nobody had an error of its own
        raise min(failures, key=lambda f: f[0])[2]
    return [found[rank] for rank in range(len(links))]


def _error(
    rank: int, parts: tuple[type[BaseException], tuple[object, ...], dict[str, object]] | None, text: str
) -> BaseException:  # fmt: skip
    told = RuntimeError(f"worker {rank}:\n{text}")
    if parts is None:
        return told
    kind, arguments, attributes = parts
    error = kind.__new__(kind, *arguments)
    vars(error).update(attributes)
    error.__cause__ = told
    return error
