"""What `shoal verify` sees of a script's job: the whole state after every step that acts, one file a step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from shoal.checkpoint.tensors import TensorFile, write_file
from shoal.errors import OrderError
from shoal.settings import TRACE

_FACTS = "job.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """What the same job needs again elsewhere to compute the same numbers."""

    leaves: int
    device: str


class Trace:
    """One job's own record of its steps.

    Args:
        path: an existing directory that all ranks see.
        steps: after so many the process ends.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps, self.done = path, steps, 0

    @classmethod
    def asked(cls, environ: Mapping[str, str]) -> Trace | None:
        """The one that a variable of the environment asks for."""
        if TRACE not in environ:
            return None
        wanted = cast("dict[str, object]", json.loads(environ[TRACE]))
        return cls(Path(str(wanted["path"])), int(str(wanted["steps"])))

    def variable(self) -> dict[str, str]:
        """What asks for this one."""
        return {TRACE: json.dumps({"path": str(self.path), "steps": self.steps})}

    def saved(self, path: Path) -> Path:
        """Where the job's checkpoints go instead: the second run must not meet those of the first."""
        return self.path / "saved" / Path(*path.absolute().parts[1:])

    def take(self, rank: int, facts: Traced, models: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write one step's state.

        Args:
            rank: this rank; rank 0 writes.
            facts: of the job.
            models: every model's state dict by the model's name.

        Raises:
            SystemExit: it was the last step that is wanted. With code 0, on every rank.
            OrderError: another job of the same process has been here.
        """
        if rank == 0:
            self._write(facts, models)
        self.done += 1
        if self.done == self.steps:
            raise SystemExit(0)

    def _write(self, facts: Traced, models: Mapping[str, Mapping[str, Tensor]]) -> None:
        named = {
            f"{model}/{name}" if model else name: t for model, state in models.items() for name, t in state.items()
        }
        numbered = [(f"{number:08d} {name}", t) for number, (name, t) in enumerate(named.items())]  # the model's order
        numbered.sort(key=lambda pair: -pair[1].itemsize)
        try:
            if self.done == 0:
                with (self.path / _FACTS).open("x") as file:
                    file.write(json.dumps(asdict(facts)))
        except FileExistsError as e:
            raise OrderError("a second job of one script", remedy="shoal verify follows one job per script") from e
        write_file(self.path / f"step-{self.done:08d}.safetensors", dict(numbered))

    def facts(self) -> Traced | None:
        """What the job said of itself; None if it took no step."""
        path = self.path / _FACTS
        return Traced(**json.loads(path.read_text())) if path.exists() else None

    def states(self) -> list[State]:
        """The state after every step that was taken."""
        return [State(path) for path in sorted(self.path.glob("step-*.safetensors"))]


class State(Mapping[str, Tensor]):
    """One step's state dict, in the model's order. A tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        self._keys = {key.partition(" ")[2]: key for key in sorted(self._file.keys())}

    def __getitem__(self, name: str) -> Tensor:
        return self._file.whole(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
