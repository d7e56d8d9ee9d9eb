"""What `shoal verify` sees of a script's job: the whole state after every step that acts, one file a step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shoal.checkpoint.tensors import TensorFile, write_file
from shoal.errors import OrderError
from shoal.settings import TRACE

T = TypeVar("T")

_FACTS = "job.json"


class By(Enum):
    """Who runs the script: a job, or torch alone in its place (see `plain.py`)."""

    SHOAL = "shoal"
    ALONE = "alone"  # one leaf a step, in one process
    WHOLE = "whole"  # the samples of all leaves as one batch, in one process
    DDP = "ddp"  # as many ranks as leaves


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """What the same job needs again elsewhere to compute the same numbers.

    `unlike_whole`: why a batch of all leaves' samples would not compute them; empty if it would.
    """

    leaves: int
    device: str
    unlike_whole: str = ""


class Trace:
    """One job's own record of its steps.

    Args:
        path: an existing directory that all ranks see.
        steps: after so many the process ends.
        by: who runs the script.
        double: in float64, whatever the script says.
    """

    def __init__(self, path: Path, steps: int, by: By = By.SHOAL, *, double: bool = False) -> None:
        self.path, self.steps, self.by, self.double, self.done = path, steps, by, double, 0

    @classmethod
    def asked(cls, environ: Mapping[str, str]) -> Trace | None:
        """The one that a variable of the environment asks for."""
        if TRACE not in environ:
            return None
        wanted = cast("dict[str, object]", json.loads(environ[TRACE]))
        by = By(str(wanted["by"]))
        return cls(Path(str(wanted["path"])), int(str(wanted["steps"])), by, double=bool(wanted["double"]))

    def variable(self) -> dict[str, str]:
        """What asks for this one."""
        told = {"path": str(self.path), "steps": self.steps, "by": self.by.value, "double": self.double}
        return {TRACE: json.dumps(told)}

    def widen(self, model: nn.Module) -> None:
        """Have a model compute in float64, if that is wanted."""
        if self.double:
            torch.set_default_dtype(torch.float64)  # what the script makes from now on
            model.double()
            model.register_forward_pre_hook(lambda _m, a, k: (self.widened(a), self.widened(k)), with_kwargs=True)

    def widened(self, batch: T) -> T:
        """What a model reads or is compared with, in float64 if that is wanted."""
        if not self.double:
            return batch
        return cast(T, pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch))

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
