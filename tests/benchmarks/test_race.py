"""The race from its command line, with a model so small that its numbers mean nothing; and the arithmetic of its report."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
UNITS = {
    "goodput": "byte/s", "step": "ms", "step_min": "ms", "step_max": "ms", "processor": "ms", "final_loss": "nat",
    "ratio": "one process", "ratio_min": "one process", "ratio_max": "one process", "elsewhere": "processor",
    "bound": "ms", "over_bound": "bound", "over_bound_min": "bound", "over_bound_max": "bound",
    "wire": "byte", "payload": "byte", "payload_formula": "byte",
    "at_rest": "byte", "at_rest_formula": "byte", "peak": "byte", "pss_peak": "byte", "failed": "contender",
}  # fmt: skip
NAMES = ("contenders", "formulas", "measure", "models", "networks", "plots", "race", "report", "visit")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The scripts' modules, which import each other by their plain names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torch's own, of its TorchScript
            found = {name: importlib.import_module(name) for name in NAMES}
            found["models"].MODELS[-1].parameters()  # the meta device loads more of it
        yield found
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in NAMES:
            sys.modules.pop(name, None)


def ran(*options: str, network: str = "loopback-2") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "race.py", "--models", "trial", "--networks", network, *options]
    return subprocess.run(
        command, env=os.environ | {"SHOAL_LEAVES": "nonsense"}, capture_output=True, text=True, timeout=110
    )


def test_a_shoal_and_a_torch_contender_race(tmp_path: Path) -> None:
    file, plots = tmp_path / "race.json", tmp_path / "plots"
    options = ("--only", "torch DDP", "shoal zero3", "--rounds", "1", "--steps", "1")
    done = ran(*options, "--json", str(file), "--plots", str(plots))
    assert done.returncode == 0, done.stderr
    lines = json.loads(file.read_text())
    assert all(set(line) == {"bench", "case", "metric", "value", "unit"} for line in lines)
    assert {line["bench"] for line in lines} == {"race"}
    place = "loopback-2 trial"
    talking = [f"{place} {name}" for name in ("torch DDP", "shoal zero3")]
    assert {line["case"] for line in lines} == {place, f"{place} one process", *talking}
    assert all(line["unit"] == UNITS[line["metric"]] for line in lines)
    found = {(line["case"], line["metric"]): line["value"] for line in lines}
    assert len(found) == len(lines)
    assert found[f"{place} one process", "ratio"] == 1
    assert not any(metric == "failed" for _, metric in found)
    losses = [found[case, "final_loss"] for case in talking]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert all(0 < found[case, "at_rest"] <= found[case, "peak"] for case in talking)
    wires = [found[case, "wire"] / found[case, "payload_formula"] for case in talking]
    assert wires[0] > 0.5 > wires[1]  # ours goes through memory
    table = done.stdout[done.stdout.index("loopback-2, trial: 0.03 M parameters") :]
    assert all(case.removeprefix(f"{place} ") in table for case in talking)
    drawn = {path.name for path in plots.iterdir()}
    assert drawn == {"time_loopback-2_trial.svg", "memory_loopback-2_trial.svg"}


@pytest.mark.system
def test_hosts_apart(tmp_path: Path) -> None:
    file = tmp_path / "race.json"
    done = ran("--only", "shoal ddp", "--rounds", "1", "--steps", "2", "--json", str(file), network="200mbit-2")
    assert done.returncode == 0, done.stderr
    found = {(line["case"], line["metric"]): line["value"] for line in json.loads(file.read_text())}
    assert 0.8 * 25e6 < found["200mbit-2 trial", "goodput"] < 25e6
    sent = [found["200mbit-2 trial shoal ddp", metric] for metric in ("payload_formula", "payload", "wire")]
    assert sent[0] <= sent[1] < sent[2] < 1.2 * sent[0]


def test_no_time_no_leg(bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    race = bench["race"]
    args = argparse.Namespace(quick=True, all=False, networks=["loopback-2"], models=["trial"], minutes=-1.0)
    assert race.race(args, bench["contenders"].CONTENDERS, print) == []
    assert capsys.readouterr().out == "loopback-2 trial: left out: -1 minutes are over\n"


@pytest.mark.slow
def test_a_failing_and_a_silent_contender_do_not_end_the_race() -> None:
    """One raises, one hangs, one dies, one is not installed; the last one runs."""
    script = """
import dataclasses, os, sys, time
from contextlib import contextmanager
sys.argv = ["race.py", "--models", "trial", "--networks", "loopback-2", "--rounds", "1", "--steps", "1", "--patience", "2"]
import race
from contenders import CONTENDERS, Contender
from formulas import Function

def opens(act):
    @contextmanager
    def opened(task):
        print("so far so good", flush=True)
        act()
        yield
    return opened

def bad(name, act, **more):
    return Contender(name=name, function=Function.DDP, open=opens(act), **more)

race.CONTENDERS = (
    CONTENDERS[0], bad("raises", lambda: 1 / 0), bad("hangs", lambda: time.sleep(60)),
    bad("dies", lambda: os._exit(7)), bad("absent", lambda: None, package="no_such_package"),
    CONTENDERS[1],
)
race.Course._weigh = lambda self, entry, failures: None
race.main()
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "ZeroDivisionError" in done.stdout
    assert "so far so good" in done.stdout
    table = done.stdout[done.stdout.index("loopback-2, trial:") :]
    assert "raises: rank " in table
    assert "hangs: ranks [0, 1] said nothing for 2 s" in table
    assert "ended with exit status 7" in table
    assert "absent: no_such_package is not installed: pip install 'shoal[race]'" in table
    assert "all, not talking" in table


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("function", "world", "per_copy", "sent", "rest"),
    [
        ("alone", 4, 0, 0, 3), ("ddp", 2, 0, 1, 3), ("ddp", 4, 0, 1.5, 3), ("zero1", 4, 0, 1.5, 1.5),
        ("zero2", 2, 0, 1, 2), ("zero3", 2, 0, 1.5, 1.5), ("zero3", 4, 0, 2.25, 0.75), ("zero3", 4, 2, 2.0, 1.5),
        ("zero3", 1, 0, 0, 3),
    ],
)  # fmt: skip
def test_what_zero_says(
    bench: dict[str, ModuleType], function: str, world: int, per_copy: int, sent: float, rest: float
) -> None:
    formulas = bench["formulas"]
    kind = formulas.Function(function)
    grid = formulas.Grid.of(kind, world, per_copy)
    assert formulas.payload(kind, grid, 100.0) == pytest.approx(100 * sent)
    assert formulas.at_rest(kind, grid, 100.0) == pytest.approx(100 * rest)


def test_the_bound_is_computing_or_sending(bench: dict[str, ModuleType]) -> None:
    bound = bench["formulas"].bound
    assert bound(1.0, 50.0, 100.0) == 1.0
    assert bound(1.0, 300.0, 100.0) == 3.0


def test_a_visit_is_as_slow_as_its_slowest_rank(bench: dict[str, ModuleType]) -> None:
    rank = {"seconds": [1.0, 2.0, 9.0], "cpu_seconds": [1.0, 1.0, 1.0], "machine": 9.0, "wire": 8.0, "payload": 3.0}
    other = rank | {"seconds": [3.0, 1.0, 4.0], "payload": 5.0, "loss": 4.0}
    visit = bench["report"].visit_of([rank | {"loss": 2.0}, other], shared_wire=True)
    assert (visit.seconds, visit.loss, visit.payload, visit.wire) == (3.0, 3.0, 4.0, 4.0)
    assert visit.elsewhere == (9.0 - 6.0) / 14.0
    assert bench["report"].visit_of([rank | {"loss": 2.0}, other], shared_wire=False).wire == 8.0


def test_ratios_are_taken_within_rounds_and_failed_visits_left_out(bench: dict[str, ModuleType]) -> None:
    report, contenders = bench["report"], bench["contenders"]

    def visit(seconds: float) -> object:
        return report.Visit(seconds=seconds, cpu_seconds=seconds, loss=1.0, elsewhere=None, wire=None, payload=7.0)

    by_name = {contender.name: contender for contender in contenders.CONTENDERS}
    one = report.Entry(contender=by_name["one process"], visits=[visit(1.0), visit(2.0), visit(4.0)])
    ddp = report.Entry(contender=by_name["torch DDP"], visits=[visit(3.0), None, visit(4.0)], failure="rank 1 failed")
    leg = report.Leg(
        network="n", model="m", ranks=2, parameters=500, goodput=1000.0, entries=[one, ddp]
    )  # 2000 bytes: 2 s to send
    lines = report.measured(leg)
    found = report.by_contender(leg, lines)
    assert (found["one process"]["step"], found["one process"]["step_max"]) == (2000.0, 4000.0)
    seen = found["torch DDP"]
    assert (seen["ratio"], seen["ratio_min"], seen["ratio_max"]) == (2.0, 1.0, 3.0)
    assert (seen["bound"], seen["over_bound_max"], seen["over_bound_min"]) == (3000.0, 1.5, 1.0)
    assert (seen["payload"], seen["payload_formula"], seen["at_rest_formula"]) == (7.0, 2000.0, 6000.0)
    assert seen["failed"] == 1.0
    assert {line["unit"] for line in lines} <= set(UNITS.values())
    assert report.table(leg).splitlines()[-1] == "torch DDP: rank 1 failed"


def test_the_page_has_the_table(bench: dict[str, ModuleType]) -> None:
    report = bench["report"]
    seen = report.Visit(seconds=0.5, cpu_seconds=0.5, loss=1.5, elsewhere=0.25, wire=2.0**20, payload=None)
    one = report.Entry(contender=bench["contenders"].CONTENDERS[0], visits=[seen])
    leg = report.Leg(network="n", model="m", ranks=2, parameters=500, goodput=2e6, entries=[one])
    lines = report.markdown(leg).splitlines()
    assert lines[2] == "One TCP stream: 2.0 MB/s."
    assert lines[4] == "| case | ms/step | ratio | from | to | /bound | others | wire | told | formula | loss |"
    assert lines[6] == "| one process | 500.0 | 1.00 | 1.00 | 1.00 | 1.00 | 0.25 | 1.0 | - | 0.0 | 1.50000 |"
    assert len(lines) == 7


def test_ranks_of_one_kind_of_network_make_a_plot(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    report, contenders = bench["report"], bench["contenders"].CONTENDERS

    def leg(network: str, ranks: int) -> object:
        seen = report.Visit(seconds=ranks, cpu_seconds=1.0, loss=1.0, elsewhere=None, wire=None, payload=None)
        entries = [report.Entry(contender=contender, visits=[seen]) for contender in contenders[:3]]
        return report.Leg(network=network, model="m", ranks=ranks, parameters=5, goodput=1.0, entries=entries)

    files = bench["plots"].draw([leg("a-2", 2), leg("a-4", 4), leg("a-b-4", 4)], tmp_path)
    assert {file.name for file in files} == {"time_a-2_m.svg", "time_a-4_m.svg", "time_a-b-4_m.svg", "scaling_a_m.svg"}
    assert all(file.exists() for file in files)


def test_every_stage_names_what_there_is(bench: dict[str, ModuleType]) -> None:
    race = bench["race"]
    networks, models = {n.name for n in bench["networks"].NETWORKS}, {m.name for m in bench["models"].MODELS}
    for stage in (*race.QUICK, *race.USUAL, *race.every_stage()):
        assert stage.network in networks
        assert stage.model in models


def test_every_model_takes_its_batch_and_learns(bench: dict[str, ModuleType]) -> None:
    sizes = {
        "gpt-33m": 33.7,
        "gpt-6m": 5.8,
        "vgg": 14,
        "resnet": 2.8,
        "embedding": 25.6,
        "layers": 0.27,
        "perceptron": 0.05,
        "trial": 0.03,
    }
    for model in bench["models"].MODELS:
        assert model.parameters() / 1e6 == pytest.approx(sizes[model.name], rel=0.05)
        if model.parameters() < 10e6:
            made = model.make()
            inputs, targets = model.batch(0, 0)
            loss = model.loss(made(inputs), targets)
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad is not None for p in made.parameters())


def test_the_heap_is_seen_by_a_thread(bench: dict[str, ModuleType]) -> None:
    measure = bench["measure"]
    before = measure.heap()
    with measure.Highest() as highest:
        held = torch.empty(32 << 20, dtype=torch.uint8)
        time.sleep(0.05)
        del held
    assert 32 << 20 <= highest.bytes - before < 33 << 20
    assert measure.heap() - before < 1 << 20


def test_the_interface_of_an_address(bench: dict[str, ModuleType]) -> None:
    measure = bench["measure"]
    assert measure.interface_of("127.0.0.1") == "lo"
    assert measure.interface_of("192.0.2.1") == ""
    before = measure.wire_bytes("lo")
    assert measure.stream(0.05) > 0
    assert measure.wire_bytes("lo") > before
    assert measure.wire_bytes("no such") is None


def test_the_timeline_of_a_step(tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    options = ("shoal zero2", "--network", "loopback-2", "--model", "trial", "--steps", "1", "--json", str(file))
    command = [sys.executable, BENCHMARKS / "timeline.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    cases = {line["case"].partition(": ")[2]: line["value"] for line in json.loads(file.read_text())}
    sent = next(at for what, at in cases.items() if what.startswith("gradients of unit 0 set out"))
    updated = next(at for what, at in cases.items() if what.startswith("updated: units") and "0" in what)
    assert 0 < sent < cases["gradients of unit 0 are there"] < updated < cases["the step is over"]
    assert cases["of processor time: this thread, user"] >= 0
