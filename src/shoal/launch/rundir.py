"""The directory of a run: its settings, its events, the logs of its ranks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from shoal.errors import EnvironmentFault
from shoal.settings import ACTIVE_RUN_DIR, Resolved


class RunDir:
    """A directory that holds what is known about one run.

    Args:
        path: an existing directory.

    Raises:
        EnvironmentFault: nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._events = (path / "events.jsonl").open("a")
        except OSError as error:
            raise _unwritable(path, error) from None

    def event(self, kind: str, **fields: object) -> None:
        """Append one line to `events.jsonl`: `{"time": seconds since 1970, "event": kind, ...}`.

        Raises:
            OSError: it cannot be written (a full disk).
        """
        line = json.dumps({"time": time.time(), "event": kind, **fields}, default=str)
        self._events.write(line + "\n")  # appended in one piece: several processes may write
        self._events.flush()

    def last_checkpoint(self) -> Path | None:
        """The newest that has been saved since a launcher last started, if it is still there."""
        found: Path | None = None
        for line in (self.path / "events.jsonl").read_text(errors="replace").splitlines():
            with suppress(ValueError):  # the last line of a run that was killed may be half there
                event = json.loads(line)
                if event["event"] in ("launched", "save"):
                    found = Path(event["path"]) if "path" in event else None
        return found if found is not None and found.exists() else None

    def close(self) -> None:
        """No events after this."""
        self._events.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_run_dir(wanted: str | None, cwd: Path) -> Path:
    """Make the directory `wanted`, which may be there already, or a fresh one named after the time.

    Raises:
        EnvironmentFault: it cannot be made.
    """
    try:
        if wanted is not None:
            (cwd / wanted).mkdir(parents=True, exist_ok=True)
            return cwd / wanted
        return _fresh(cwd / "runs")
    except OSError as error:
        raise _unwritable(cwd / (wanted or "runs"), error) from None


def open_run_dir(resolved: Resolved, *, environ: Mapping[str, str] | None = None) -> RunDir | None:
    """The run's directory with `settings.json` in it, or None if the run keeps none. For rank 0.

    Under `shoal run` it is the directory that the launcher made, whatever the code says.

    Raises:
        EnvironmentFault: it cannot be made or written.
    """
    environ = os.environ if environ is None else environ
    wanted = environ.get(ACTIVE_RUN_DIR, resolved.settings.run_dir)
    if wanted == "none":
        return None
    path = make_run_dir(wanted, Path.cwd())
    values = resolved.settings.model_dump()
    settings = {name: {"value": values[name], "origin": origin} for name, origin in resolved.origins.items()}
    run_dir = RunDir(path)
    try:
        (path / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        run_dir.close()
        raise _unwritable(path, error) from None
    return run_dir


def _fresh(parent: Path) -> Path:
    """A directory that was not there: several jobs of one process may start within a second."""
    name, number = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}", 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


def _unwritable(path: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(
        f"the run directory {path} cannot be written: {error.strerror}", remedy="another run_dir, or run_dir=none"
    )
