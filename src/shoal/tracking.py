"""`job.log`: one line per interval, to `events.jsonl`, to people and to trackers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from shoal.engine.binding import Binding
from shoal.errors import SettingError
from shoal.logs import say, warn
from shoal.trackers.protocol import Tracker


class Tracking:
    """What rank 0 tells of a run.

    Args:
        event: appends to `events.jsonl`.
        settings: of the job, for trackers.
        clock: seconds.
    """

    def __init__(
        self, event: Callable[..., None], settings: Mapping[str, object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._event, self._settings, self._clock = event, settings, clock
        self._trackers: list[Tracker] = []
        self._tokens, self._since, self._steps_since = 0, math.nan, 0
        self._logged = -1
        self._events_work = True

    def add(self, trackers: Sequence[Tracker]) -> None:
        """They get all that comes from now on."""
        for tracker in trackers:
            self._trackers.append(tracker)
            self._try(tracker, lambda tracker=tracker: tracker.begin(self._settings))

    def log(self, step: int, every: int, tokens: int, share: float, values: Mapping[str, float]) -> None:
        """One step's numbers; told if the step is a multiple of `every`. A second call of one step adds nothing.

        Args:
            share: of a second of all devices at their best that one token's work is; 0: not known.
        """
        if step == self._logged:
            return
        self._logged = step
        now = self._clock()
        if math.isnan(self._since):  # how long the first step took is not known
            self._since = now
        else:
            self._tokens, self._steps_since = self._tokens + tokens, self._steps_since + 1
        if step % every == 0:
            self._tell(step, {**values, **self._rates(now, share)})
            self._since, self._tokens, self._steps_since = now, 0, 0

    def _rates(self, now: float, share: float) -> dict[str, float]:
        seconds = now - self._since
        if not self._steps_since or seconds <= 0:
            return {}
        rates = {"steps/s": self._steps_since / seconds}
        speed = self._tokens / seconds
        rates |= {"tokens/s": speed} if speed else {}
        return rates | ({"MFU": speed * share} if speed and share else {})

    def _tell(self, step: int, values: Mapping[str, float]) -> None:
        say(f"step {step}  " + "  ".join(told(name, value) for name, value in values.items()))
        if self._events_work:
            try:
                self._event("log", step=step, **values)
            except OSError as error:
                self._events_work = False
                warn(f"events.jsonl cannot be written and gets no more numbers: {error}; training goes on")
        for tracker in list(self._trackers):
            self._try(tracker, lambda tracker=tracker: tracker.log(step, values))

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is whole."""
        for tracker in list(self._trackers):
            self._try(tracker, lambda tracker=tracker: tracker.saved(step, path))

    def end(self) -> None:
        """The job is over."""
        for tracker in list(self._trackers):
            self._try(tracker, tracker.end)
        self._trackers.clear()

    def _try(self, tracker: Tracker, call: Callable[[], None]) -> None:
        """Whatever a tracker raises ends the tracker."""
        try:
            call()
        except Exception as error:
            if tracker in self._trackers:
                self._trackers.remove(tracker)
            name = type(tracker).__name__
            warn(f"{name} failed and gets nothing more: {type(error).__name__}: {error}; training goes on")


def check_log(every: int, tokens: int, values: Mapping[str, object]) -> None:
    """Raises `SettingError` for what is no number."""
    if every < 1 or tokens < 0:
        raise SettingError(f"job.log(every={every}, tokens={tokens})", remedy="every >= 1 and tokens >= 0")
    wrong = [n for n, v in values.items() if not (v is None or isinstance(v, int | float | torch.Tensor))]
    if wrong:
        raise SettingError(f"job.log({wrong[0]}={values[wrong[0]]!r})", remedy="numbers, tensors of one, or None")


def numbers(values: Mapping[str, float | torch.Tensor | None]) -> dict[str, float]:
    """Those that are there, as Python's."""
    there = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    return {
        n: 0.0 if isinstance(v, torch.Tensor) and v.is_meta else float(v) for n, v in there.items() if v is not None
    }


def share_of_peak(binding: Binding, peak_flops: float, flops_per_token: float | None) -> float:
    """What one token's work is of a second of all devices: by default 6 operations per parameter, forward and backward.

    Kaplan et al., Scaling Laws for Neural Language Models, section 2.1.
    """
    if not peak_flops:
        return 0.0
    parameters = sum(p.numel() for p in binding.model.parameters())
    work = 6.0 * parameters if flops_per_token is None else flops_per_token
    return work / (peak_flops * binding.engine.mesh.world.size)


def facts_of(binding: Binding, device: torch.device) -> dict[str, float]:
    """Learning rate, gradient norm, loss scale and memory, as far as there are such."""
    facts: dict[str, float] = {"lr": float(binding.optimizers[0].param_groups[0]["lr"])}
    if binding.norm is not None:
        facts["grad norm"] = binding.norm
    if binding.engine.scale is not None:
        facts["loss scale"] = binding.engine.scale.scale
    return facts | {"memory": float(memory_of(device))}


def memory_of(device: torch.device) -> int:
    """Bytes of this rank: the most that tensors on its device took, or the process's own."""
    if device.type not in ("cpu", "meta"):
        return torch.accelerator.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc
        return 0


def told(name: str, value: float) -> str:
    """`loss 2.31`, `12,300 tokens/s`, `MFU 31.0 %`, `memory 1.20 GiB`."""
    if name.endswith("/s"):
        return f"{value:,.0f} {name}" if value >= 100 else f"{value:.3g} {name}"
    if name == "MFU":
        return f"MFU {100 * value:.1f} %"
    if name == "memory":
        return f"memory {value / 2**30:.2f} GiB"
    return f"{name} {value:.4g}"
