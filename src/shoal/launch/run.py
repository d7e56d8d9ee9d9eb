"""`shoal run`: the workers of one host, from their start to the last one's end."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import SettingError
from shoal.launch.failure import Ended, Failure, exit_code, report
from shoal.launch.place import places_here
from shoal.launch.rundir import RunDir, make_run_dir
from shoal.launch.workers import Asked, Exit, Workers
from shoal.settings import ACTIVE_RUN_DIR, FAILURE_FILE, FLAGS, LAUNCHER, resolve
from shoal.strategy import Strategy

_LAST_WORDS = 10  # lines
_SHOW_CURSOR = "\x1b[?25h"  # a live view hides it, and may have been killed


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended.

    Args:
        exit_code: 0 all is fine, 1 the user's program failed, 2 usage or configuration, 4 a checkpoint, 5 the
            environment, 128 and more: ended by that signal to the launcher.
        ranks: how each rank ended.
        run_dir: what the run has left behind, or None.
    """

    exit_code: int
    ranks: tuple[Ended, ...]
    run_dir: Path | None


def run(
    argv: Sequence[str],
    *,
    workers: int,
    flags: Mapping[str, object] | None = None,
    run_dir: str | None = None,
    environ: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> int:
    """`launch`, for its exit code only."""
    return launch(argv, workers=workers, flags=flags, run_dir=run_dir, environ=environ, quiet=quiet).exit_code


def launch(
    argv: Sequence[str],
    *,
    workers: int,
    flags: Mapping[str, object] | None = None,
    run_dir: str | None = None,
    environ: Mapping[str, str] | None = None,
    quiet: bool = False,
    keep_stdout: bool = False,
) -> Outcome:
    """Run a script as `workers` ranks on this host and wait for their end.

    Rank 0 speaks through this process's standard output and error, the others into `rank-<r>.log` of the run's
    directory. When a rank fails the others have 2 s to leave, then they are ended.

    Args:
        argv: the script and its arguments.
        workers: how many ranks, at least 1.
        flags: settings by name that win over all others.
        run_dir: the setting of that name.
        environ: the environment of the workers; None: this process's.
        quiet: print neither failures nor the other ranks' warnings.
        keep_stdout: rank 0 prints to standard error instead of standard output.

    Raises:
        SettingError: the script does not exist, or a setting is unknown or does not fit.
        StrategyError: there is no strategy of that name.
        EnvironmentFault: a worker cannot be started, or the run's directory cannot be written.
    """
    _check(argv, workers)
    flags = dict(flags or {}) | ({} if run_dir is None else {"run_dir": run_dir})
    base = _outermost(os.environ if environ is None else environ) | {FLAGS: json.dumps(flags)}
    settings = resolve({}, environ=base, cwd=Path.cwd()).settings
    Strategy.named(settings.strategy)
    with _directory(settings.run_dir) as (directory, kept):
        base |= {ACTIVE_RUN_DIR: str(directory.path) if kept else "none", LAUNCHER: str(os.getpid())}
        directory.event("launched", argv=list(argv), workers=workers)
        asked, ranks = _work(argv, base, workers, directory, quiet=quiet, keep_stdout=keep_stdout)
        code = 128 + asked if asked else exit_code(ranks)
        directory.event("ended", exit_code=code, ranks=[str(end) for end in ranks])
        if code and sys.stdout.isatty():
            print(_SHOW_CURSOR, end="", flush=True)
        if not quiet:
            sys.stderr.write(_last_line(asked) if asked else report(ranks))
            sys.stderr.write(_left_behind(directory) if code and kept and not asked else "")
    return Outcome(exit_code=code, ranks=ranks, run_dir=directory.path if kept else None)


def _check(argv: Sequence[str], workers: int) -> None:
    if workers < 1:
        raise SettingError(f"workers={workers}: a job has at least one worker", remedy="--workers 1")
    if not argv:
        raise SettingError("no script to run", remedy="shoal run --workers 2 train.py")
    if not Path(argv[0]).is_file():
        raise SettingError(f"there is no script {argv[0]!r} in {Path.cwd()}", remedy="the path of a Python file")


def _outermost(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what a torchrun around this launcher has told; what a `shoal run` has told is replaced."""
    return {k: v for k, v in environ.items() if not k.startswith("TORCHELASTIC_")}


@contextmanager
def _directory(wanted: str | None) -> Generator[tuple[RunDir, bool]]:
    """The run's directory and True; or, if none is wanted, one for the moment and False."""
    if wanted != "none":
        with RunDir(make_run_dir(wanted, Path.cwd())) as run_dir:
            yield run_dir, True
    else:
        with tempfile.TemporaryDirectory(prefix="shoal-") as path, RunDir(Path(path)) as run_dir:
            yield run_dir, False


def _work(
    argv: Sequence[str], base: Mapping[str, str], count: int, directory: RunDir, *, quiet: bool, keep_stdout: bool
) -> tuple[int, tuple[Ended, ...]]:
    """Start the workers, see them end; the signal that asked us to stop (or 0), and every rank's end."""

    def heard(rank: int, line: str) -> None:
        if not quiet:
            print(f"[rank {rank}] {line}", file=sys.stderr, flush=True)

    workers = Workers(heard)
    command = [sys.executable, "-P", "-m", "shoal.launch.worker", *argv]  # -P: no `shoal` or `signal` that lies about
    sys.stdout.flush()  # what was printed before rank 0 speaks
    with workers.listening():
        try:
            for rank, place in enumerate(places_here(count)):
                failure_file = _failure_file(directory, rank)
                failure_file.unlink(missing_ok=True)  # an earlier run's
                own = {**base, **place, FAILURE_FILE: str(failure_file)}
                log = _log(directory, rank) if rank else None
                workers.start(command, own, log=log, stdout=2 if keep_stdout else None)
            asked = _watch(workers)
        finally:
            workers.close()
    return asked, tuple(_ended(workers.exits[rank], directory) for rank in sorted(workers.exits))


def _watch(workers: Workers) -> int:
    """Wait for all workers, for the first that fails, or for a signal."""
    while workers.running:
        happening = workers.happening()
        if isinstance(happening, Asked):
            workers.end(first=happening.signum)
            return happening.signum
        if happening is not None and happening.code:
            workers.end()
    return 0


def _ended(end: Exit, directory: RunDir) -> Ended:
    failure = Failure.read(_failure_file(directory, end.rank)) if end.code else None
    itself = end.told is None or (failure is not None and failure.time <= end.told)
    return Ended(
        rank=end.rank,
        code=failure.exit_code if failure and itself and end.told is not None else end.code,  # it took long to leave
        time=end.time,
        by_launcher=not itself,
        failure=failure,
        last_words="" if failure else _tail(_log(directory, end.rank)),
    )


def _failure_file(directory: RunDir, rank: int) -> Path:
    return directory.path / f"failure-{rank}.json"


def _log(directory: RunDir, rank: int) -> Path:
    return directory.path / f"rank-{rank}.log"


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_WORDS:])
    except OSError:  # rank 0 has no log
        return ""


def _left_behind(directory: RunDir) -> str:
    saved = directory.last_checkpoint()
    return f"logs: {directory.path}\n" + ("" if saved is None else f"job.load goes on from {saved}\n")


def _last_line(asked: int) -> str:
    return f"shoal run: ended by {signal.Signals(asked).name}\n"
