"""What `shoal bench` sees of a script's job: one file a rank, written when the job is over."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from shoal.bench.clock import Clock, Clocked
from shoal.bench.traffic import formula
from shoal.data.feed import LeafFeed
from shoal.engine.binding import Binding
from shoal.engine.holding import measured, memory
from shoal.errors import OrderError
from shoal.settings import BENCH
from shoal.tracking import Tracking

_BY_ITSELF = ("lr", "grad norm", "loss scale", "memory", "steps/s", "tokens/s", "MFU")  # what job.log adds
_MODEL = ("gather", "reduce", "agree")  # verbs of parameters and gradients
_LINES, _PRINTED = 1000, 160  # of what the script prints so many lines are kept, so many characters of each

States = Callable[[], Mapping[str, Mapping[str, object]]]
"""Every model's whole state dict by the model's name; collective, on rank 0."""


class Step(NamedTuple):
    """One step of a rank, from the end of the one before it.

    Args:
        seconds: by the clock on the wall, of which it `waited` so many for others.
        sent: bytes of parameters and gradients.
        samples: that this rank was handed; 0: not known.
        aside: an evaluation or a checkpoint lies in it.
        wait: seconds of its longest single wait.
        at: the transfer of that wait.
    """

    seconds: float
    waited: float
    sent: int
    samples: float
    aside: bool
    wait: float
    at: str


class Value(NamedTuple):
    """A number that the script has measured after so many steps. `origin`: what it was told by."""

    origin: str
    name: str
    step: int
    value: float


class Bytes(BaseModel):
    """Memory of a rank.

    Attributes:
        rest, most: as the ledger (`job.memory()`) predicts, between steps and at most.
        exchange: of `rest`, what serves to exchange.
        before: of the process when the job began, in RAM.
        peak: the most that it had since.
        share: what it had in the end, pages that several processes share divided by their number.
        device: the most that tensors took on an accelerator.
    """

    model_config = ConfigDict(frozen=True)

    rest: int
    most: int
    exchange: int
    before: int
    peak: int
    share: int
    device: int


class Record(BaseModel):
    """What one rank has seen.

    Attributes:
        first: steps that a checkpoint had brought.
        formula: bytes to send in a step.
        starved: the share of its time in which it could have run and had no processor; 0 where nobody tells.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    rank: int
    world: int
    strategy: str
    leaves: int
    device: str
    first: int
    steps: list[Step]
    values: list[Value]
    tokens_per_second: list[float]
    memory: Bytes
    formula: float
    starved: float
    sha256: str
    printed: list[str]


class Asked(NamedTuple):
    """Where records go, and after how many steps the script ends; 0: by itself."""

    path: Path
    steps: int

    def variable(self) -> dict[str, str]:
        """What asks for it."""
        return {BENCH: json.dumps({"path": str(self.path), "steps": self.steps})}

    def records(self) -> list[Record]:
        """Of all ranks that have taken steps, in their order."""
        files = sorted(self.path.glob("rank-*.json"), key=lambda file: int(file.stem.removeprefix("rank-")))
        return [Record.model_validate_json(text) for file in files if (text := file.read_text())]


def record(
    environ: Mapping[str, str], feed: LeafFeed, tracking: Tracking, bindings: Mapping[str, Binding], states: States
) -> None:
    """Keep a record of this job, if `shoal bench` asks for one."""
    if BENCH in environ:
        wanted = cast("dict[str, object]", json.loads(environ[BENCH]))
        asked = Asked(Path(str(wanted["path"])), int(str(wanted["steps"])))
        tracking.add([Recorder(asked, feed, bindings, states)])


class Recorder:
    """A tracker that looks at the clock after every step.

    Args:
        asked: see there.
        feed: tells of steps and of what is measured. Its `after_step` is taken over: a trace that is also there only
            leads checkpoints elsewhere.
        bindings: the job's models.
        states: see there.
    """

    def __init__(self, asked: Asked, feed: LeafFeed, bindings: Mapping[str, Binding], states: States) -> None:
        self._asked, self._feed, self._bindings, self._states = asked, feed, bindings, states
        self._world = feed.mesh.world
        self._file = asked.path / f"rank-{self._world.rank}.json"
        carrier = self._world.carrier
        self._clock = carrier.clock if isinstance(carrier, Clocked) else Clock()
        self._steps: list[Step] = []
        self._values: list[Value] = []
        self._speeds: list[float] = []
        self._aside, self._first = False, 0
        self._before = _new_peak()
        self._heard = Heard(sys.stdout)
        if self._world.rank == 0:
            sys.stdout = cast(TextIO, self._heard)
        feed.after_step, feed.averaged, feed.measured = self._stepped, self._averaged, self._evaluated
        self._last = self._now()
        self._begun = self._last[0], _starved()

    def _now(self) -> tuple[float, float, int, float]:
        sent = self._world.carrier.sent
        return time.perf_counter(), self._clock.waited, sum(sent[verb] for verb in _MODEL), self._feed.samples

    def _stepped(self) -> None:
        """Look at the clock.

        Raises:
            SystemExit: it was the last step that is wanted. With code 0, on every rank.
            OrderError: another job of the same process has taken steps.
        """
        now = self._now()
        if not self._steps:
            self._claim()
        seconds, waited, sent, samples = (b - a for a, b in zip(self._last, now, strict=True))
        wait = self._clock.longest()
        self._first = self._first if self._steps else self._feed.step - 1
        self._steps.append(Step(seconds, waited, int(sent), samples, self._aside, wait.seconds, wait.label))
        self._last, self._aside = now, False
        if len(self._steps) == self._asked.steps:
            raise SystemExit(0)

    def _claim(self) -> None:
        try:
            self._file.touch(exist_ok=False)
        except FileExistsError as e:
            raise OrderError("a second job of one script", remedy="shoal bench follows one job per script") from e

    def _averaged(self, value: float) -> None:
        self._values.append(Value("job.mean", "", self._feed.step, value))

    def _evaluated(self, values: Mapping[str, object]) -> None:
        self._aside = True
        for name, value in values.items():
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                self._values.append(Value("job.evaluate", name, self._feed.step, float(value)))

    # ---------------------------------------------------------------- as a tracker

    def begin(self, settings: Mapping[str, object]) -> None:
        return

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Rank 0's."""
        told = [(name, value) for name, value in values.items() if name not in _BY_ITSELF]
        self._values += [Value("job.log", name, step, value) for name, value in told]
        self._speeds += [values["tokens/s"]] if "tokens/s" in values else []

    def saved(self, step: int, path: Path) -> None:
        self._aside = True

    def end(self) -> None:
        """Write the record. Collective, unless the job has failed or has taken no step."""
        if sys.stdout is self._heard:
            sys.stdout = self._heard.inner
        if self._steps and not self._world.carrier.failed:
            held = self._held()  # before the whole state lies here
            self._file.write_text(self._record(held, fingerprint(self._states())).model_dump_json())

    def _held(self) -> Bytes:
        bindings = list(self._bindings.values())
        ledger, device = memory(bindings, self._world), self._device()
        found = measured(device)
        return Bytes(
            rest=ledger.rest, most=ledger.peak, exchange=sum(e.rest for e in ledger.entries if e.kind == "staging"),
            before=self._before, peak=_status("VmHWM"),
            share=found.get("pages, shared ones by part", 0), device=found.get("tensors on the device at most", 0),
        )  # fmt: skip

    def _record(self, held: Bytes, sha256: str) -> Record:
        return Record(
            rank=self._world.rank, world=self._world.size, strategy=self._feed.strategy.name, leaves=self._feed.leaves,
            device=str(self._device()), first=self._first, steps=self._steps, values=self._values,
            tokens_per_second=self._speeds, memory=held, sha256=sha256, printed=list(self._heard.lines),
            formula=sum(_formula(binding) for binding in self._bindings.values()),
            starved=(_starved() - self._begun[1]) / (time.perf_counter() - self._begun[0]),
        )  # fmt: skip

    def _device(self) -> torch.device:
        return next(iter(self._bindings.values())).engine.units[0].device


class Heard:
    """An output, and the last lines with a number that were written to it."""

    def __init__(self, inner: TextIO) -> None:
        self.inner, self.lines, self._open = inner, deque[str](maxlen=_LINES), ""

    def write(self, text: str) -> int:
        *lines, self._open = (self._open + text).split("\n")
        self.lines += [line.strip()[:_PRINTED] for line in lines if any(c.isdigit() for c in line)]
        return self.inner.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def fingerprint(models: Mapping[str, Mapping[str, object]]) -> str:
    """sha256 of all parameters and buffers; "" where there are none, as on ranks other than 0."""
    digest, names = hashlib.sha256(), 0
    for model, state in models.items():
        for name, value in state.items():
            names += 1
            assert isinstance(value, Tensor)
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digest.update(f"{model}/{name} {value.dtype} {tuple(value.shape)}".encode() + raw)
    return digest.hexdigest() if names else ""


def _formula(binding: Binding) -> float:
    engine = binding.engine
    return formula(
        binding.strategy.shard, copies=engine.mesh.copies.size, per_copy=engine.mesh.shard.size,
        turns=engine.turns.count, parameters=sum(u.layout.used * u.dtypes.compute.itemsize for u in engine.units),
        gradients=sum(u.layout.used * u.dtypes.reduce.itemsize for u in engine.units if u.trainable),
    )  # fmt: skip


def _new_peak() -> int:
    """Bytes of this process now; from here on the system looks for the most."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _starved() -> float:
    """Seconds that this process's main thread could have run and had no processor; 0 where the system does not tell."""
    with suppress(OSError, IndexError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _status(field: str) -> int:
    """Bytes; 0 where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
