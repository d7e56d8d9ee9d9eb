"""`job.log` and trackers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import shoal
from shoal import trackers
from shoal.comm.threads import run
from shoal.engine.scale import LossScale
from shoal.errors import EnvironmentFault, SettingError
from shoal.trackers import MLflow, TensorBoard, WandB
from shoal.tracking import Tracking, facts_of, share_of_peak, told


class Recorded:
    """A tracker that notes its calls."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fails = fails

    def _call(self, *call: object) -> None:
        self.calls.append(call)
        if call[0] == self.fails:
            raise ConnectionError("no route")

    def begin(self, settings: Mapping[str, object]) -> None:
        self._call("begin", settings["seed"])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._call("log", step, dict(values))

    def saved(self, step: int, path: Path) -> None:
        self._call("saved", step, path.name)

    def end(self) -> None:
        self._call("end")


def train(job: shoal.Job, steps: int = 4, **log: object) -> None:
    model = nn.Linear(4, 3)
    model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.25))
    for _ in range(steps * 2):  # two leaves a step on one rank
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        job.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        job.log(loss=job.mean(loss), nothing=None, **log)


def test_one_line_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """To people, to events.jsonl and to a tracker alike."""
    monkeypatch.chdir(tmp_path)
    tracker = Recorded()
    with shoal.init("ddp", leaves=2, run_dir="here", device="cpu") as job:
        job.report_to(tracker)
        train(job, every=2, tokens=1000, peak_flops=1e9)
        job.save("saved")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("shoal: step")]
    assert [line.split("  ")[0] for line in lines] == ["shoal: step 2", "shoal: step 4"]
    assert [w.split(" ")[0] for w in lines[1].split("  ")[1:5]] == ["loss", "lr", "grad", "memory"]
    assert "tokens/s" in lines[1]
    assert "MFU" in lines[1]
    events = [json.loads(line) for line in (tmp_path / "here/events.jsonl").read_text().splitlines()]
    logged = [e for e in events if e["event"] == "log"]
    assert [e["step"] for e in logged] == [2, 4]
    assert logged[1]["lr"] == 0.25
    assert logged[1]["MFU"] == pytest.approx(logged[1]["tokens/s"] * 6 * 15 / 1e9)
    begin, *logs, saved, end = tracker.calls
    assert (begin, saved, end) == (("begin", 0), ("saved", 4, "step-4"), ("end",))
    assert [(step, values["loss"]) for _, step, values in logs] == [(e["step"], e["loss"]) for e in logged]


def test_rates_are_of_the_interval() -> None:
    """The first call only starts the clock."""
    times = iter([10.0, 11.0, 12.0, 14.0, 15.0])
    found: list[dict[str, float]] = []
    tracking = Tracking(lambda _kind, **fields: found.append(fields), {}, clock=lambda: next(times))
    for step in (1, 2, 2, 3, 4):
        tracking.log(step, 2, 300, 0.001, {})
    assert found[0] == {"step": 2, "steps/s": 1.0, "tokens/s": 300.0, "MFU": 0.3}
    assert found[1] == {"step": 4, "steps/s": 2 / 3, "tokens/s": 200.0, "MFU": 0.2}


def test_nothing_is_said_before_the_clock_runs() -> None:
    found: list[dict[str, float]] = []
    Tracking(lambda _kind, **fields: found.append(fields), {}).log(1, 1, 300, 0.0, {"loss": 2.0})
    assert found == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("fails", ["begin", "log", "saved", "end"])
def test_a_trackers_failure_is_said_once_and_ends_only_the_tracker(
    fails: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad, good = Recorded(fails), Recorded()

    def rank_main(_rank: int) -> int:
        with shoal.init("zero3", leaves=2, run_dir="none", device="cpu") as job:
            job.report_to(bad, good)
            model = nn.Linear(4, 3)
            model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.25))
            for _ in range(3):
                model(torch.ones(2, 4)).sum().backward()
                optimizer.step()
                job.log()
                job.save(tmp_path)
            return job.step

    assert run(2, rank_main) == [3, 3]
    warned = [line for line in capfd.readouterr().err.splitlines() if "Recorded failed" in line]
    assert warned == [
        "shoal: warning: Recorded failed and gets nothing more: ConnectionError: no route; training goes on"
    ]
    assert [c[0] for c in good.calls] == ["begin", *["log", "saved"] * 3, "end"]
    assert [c[0] for c in bad.calls].count(fails) == 1
    assert bad.calls[-1][0] == fails


def test_a_full_disk_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    def event(_kind: str, **_fields: object) -> None:
        raise OSError(28, "No space left on device")

    tracking = Tracking(event, {})
    for step in (1, 2, 3):
        tracking.log(step, 1, 0, 0.0, {"loss": 1.0})
    text = capfd.readouterr().err
    assert text.count("events.jsonl cannot be written and gets no more numbers") == 1
    assert text.count("shoal: step") == 3


def test_loss_scale_and_norm() -> None:
    """Only where there are such."""
    engine = SimpleNamespace(scale=None)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    binding = SimpleNamespace(optimizers=[optimizer], norm=None, engine=engine)
    assert list(facts_of(binding, torch.device("cpu"))) == ["lr", "memory"]
    engine.scale, binding.norm = LossScale(), 3.0
    facts = facts_of(binding, torch.device("cpu"))
    assert (facts["loss scale"], facts["grad norm"]) == (LossScale().scale, 3.0)
    assert facts["memory"] > 2**20


def test_mfu_counts_all_ranks() -> None:
    world = SimpleNamespace(size=4)
    binding = SimpleNamespace(model=nn.Linear(9, 1), engine=SimpleNamespace(mesh=SimpleNamespace(world=world)))
    assert share_of_peak(binding, 100.0, None) == 6 * 10 / 400
    assert share_of_peak(binding, 100.0, 8.0) == 8 / 400
    assert share_of_peak(binding, 0.0, 8.0) == 0.0


def test_what_cannot_be_logged() -> None:
    with shoal.init("ddp", run_dir="none") as job:
        with pytest.raises(SettingError, match=r"job.log\(loss='low'\)[\s\S]*numbers"):
            job.log(loss="low")
        with pytest.raises(SettingError, match=r"job.log\(every=0, tokens=0\)"):
            job.log(every=0)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 2.34567, "loss 2.346"), ("tokens/s", 12300.4, "12,300 tokens/s"), ("steps/s", 0.51234, "0.512 steps/s"),
        ("MFU", 0.313, "MFU 31.3 %"), ("memory", 3 * 2**29, "memory 1.50 GiB"),
    ],
)  # fmt: skip
def test_how_numbers_are_told(name: str, value: float, text: str) -> None:
    assert told(name, value) == text


# ---------------------------------------------------------------- libraries


class Stand:
    """Stands for an outside library: notes what is called, with what."""

    def __init__(self, calls: list[tuple[str, tuple[object, ...], dict[str, object]]]) -> None:
        self.calls, self.summary = calls, dict[str, object]()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: object, **kwargs: object) -> Stand:
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand([])
    for name in ("tensorboard", "wandb", "mlflow", "torch.utils.tensorboard"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__getattr__ = lambda attribute: getattr(stand, attribute)  # type: ignore[method-assign]
        monkeypatch.setitem(sys.modules, name, module)
    return stand


def through(tracker: trackers.Tracker) -> None:
    tracker.begin({"seed": 3})
    tracker.log(7, {"loss": 2.0, "tokens/s": 5.0})
    tracker.saved(7, Path("run/step-7"))
    tracker.end()


def test_tensorboard(library: Stand) -> None:
    through(TensorBoard("board"))
    assert library.calls == [
        ("SummaryWriter", ("board",), {}), ("add_text", ("settings", "seed: 3"), {}),
        ("add_scalar", ("loss", 2.0, 7), {}), ("add_scalar", ("tokens/s", 5.0, 7), {}), ("flush", (), {}),
        ("add_text", ("checkpoint", "run/step-7", 7), {}), ("close", (), {}),
    ]  # fmt: skip


def test_wandb(library: Stand) -> None:
    through(WandB("birds", "first"))
    assert library.calls == [
        ("init", (), {"project": "birds", "name": "first", "config": {"seed": 3}}),
        ("log", ({"loss": 2.0, "tokens/s": 5.0},), {"step": 7}), ("finish", (), {}),
    ]  # fmt: skip
    assert library.summary == {"checkpoint": "run/step-7"}


def test_mlflow(library: Stand) -> None:
    through(MLflow("birds"))
    assert library.calls == [
        ("set_experiment", ("birds",), {}), ("start_run", (), {"run_name": None}), ("log_params", ({"seed": 3},), {}),
        ("log_metrics", ({"loss": 2.0, "tokens/s": 5.0},), {"step": 7}),
        ("set_tag", ("checkpoint", "run/step-7"), {}), ("end_run", (), {}),
    ]  # fmt: skip


def test_names_that_mlflow_refuses(library: Stand) -> None:
    tracker = MLflow("birds")
    tracker.begin({})
    tracker.log(1, {"acc@1": 0.5, "val/loss (mean)": 2.0})
    assert library.calls[-1] == ("log_metrics", ({"acc_1": 0.5, "val/loss _mean_": 2.0},), {"step": 1})


@pytest.mark.parametrize(
    ("make", "extra"), [(lambda: TensorBoard("x"), "tensorboard"), (lambda: WandB("x"), "wandb"), (lambda: MLflow("x"), "mlflow")],
    ids=["tensorboard", "wandb", "mlflow"],
)  # fmt: skip
def test_a_library_that_is_not_there(make: object, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.trackers.protocol.find_spec", lambda _name: None)
    with pytest.raises(EnvironmentFault, match=rf"the package {extra} is not installed[\s\S]*shoal\[{extra}\]"):
        make()
